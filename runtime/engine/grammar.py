"""Grammars, compiled for the model's vocabulary by llguidance, the recently used ones kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.engine.trial import Trial, limits
from runtime.engine.vocabulary import read_vocabulary
from runtime.errors import FirstlightError
from runtime.protocol import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAX_KEPT = 64


class GrammarError(FirstlightError):
    """A grammar that cannot be followed; says why."""


class Grammars:
    """Compiles grammars on any thread. The vocabulary is read, and llguidance imported, for the first."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        """`directory` holds the model's tokenizer; `vocab_size` is how many logits the model has."""
        self._directory = directory
        self._vocab_size = vocab_size
        self._vocabulary: LLTokenizer | None = None
        self._reading = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher | str] = OrderedDict()
        self._keeping = threading.Lock()
        self._mine = threading.local()  # each thread tries grammars in a process of its own

    def __len__(self) -> int:
        """How many compiled grammars are kept."""
        return len(self._compiled)

    def compile(self, grammar: Grammar) -> None:
        """Have the grammar ready for `matcher`, or known to be faulty."""
        self._find(grammar)

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """A matcher of one sequence's own, at the beginning. Raises `GrammarError` for a faulty grammar."""
        found = self._find(grammar)
        if isinstance(found, str):
            raise GrammarError(found)
        return found.deep_copy()

    def _find(self, grammar: Grammar) -> LLMatcher | str:
        """The compiled grammar, or what is wrong with it."""
        with self._keeping:
            found = self._compiled.get(grammar.source)
            if found is not None:
                self._compiled.move_to_end(grammar.source)
                return found
        try:
            found = self._compile(grammar.source)
        except Exception as error:  # nothing is promised, and no grammar may end the engine
            found = f"it cannot be compiled: {error}"
        with self._keeping:
            self._compiled[grammar.source] = found
            while len(self._compiled) > _MAX_KEPT:
                self._compiled.popitem(last=False)
        return found

    def _compile(self, source: str) -> LLMatcher | str:
        if not hasattr(self._mine, "trial"):
            self._mine.trial = Trial()
        problem: str | None = self._mine.trial.problem(source)
        if problem is not None:
            return problem
        from llguidance import LLMatcher

        matcher = LLMatcher(self._read(), source, log_level=0, limits=limits())
        if not matcher.is_error():
            # Masks share what is computed for the first one; and some faults only show in it.
            matcher.compute_bitmask()
        return matcher.get_error() if matcher.is_error() else matcher

    def _read(self) -> LLTokenizer:
        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = read_vocabulary(self._directory, self._vocab_size)
            return self._vocabulary
