"""Grammars, compiled for the model's vocabulary by llguidance, the recently used ones kept."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.engine.grammar.compilations import Compilations, Copy
from runtime.errors import FirstlightError
from runtime.protocol import Grammar

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from runtime.engine.grammar.vocabulary import Vocabulary

_MAX_KEPT = 64
_MAX_MESSAGE = 1000


class GrammarError(FirstlightError):
    """A grammar that cannot be followed; says why."""


def _cannot(error: Exception) -> str:
    return f"it cannot be compiled: {error}"


class Grammars:
    """Compiles grammars on any thread. Whatever that takes is imported, and read, for the first of them,
    unless there was time for it before."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        """`directory` holds the model's tokenizer; `vocab_size` is how many logits the model has."""
        self._directory = directory
        self._vocab_size = vocab_size
        self._vocabulary: Vocabulary | None = None
        self._parts: Generator[None, None, Vocabulary] | None = None
        self._reading = threading.Lock()
        self._compiled: OrderedDict[str, Compilations | str] = OrderedDict()
        self._keeping = threading.Lock()
        self._under_way: dict[str, threading.Event] = {}
        self._spare: ThreadPoolExecutor | None = None
        self._mine = threading.local()  # each thread tries grammars in a process of its own

    def __len__(self) -> int:
        """How many compiled grammars are kept."""
        return len(self._compiled)

    def knows(self, grammar: Grammar) -> bool:
        """Whether the grammar is ready for `matcher`, or known to be faulty."""
        with self._keeping:
            return grammar.source in self._compiled

    def compile(self, grammar: Grammar) -> None:
        """Have the grammar ready for `matcher`, or known to be faulty."""
        self._find(grammar)

    def verdict(self, grammar: Grammar) -> str | None:
        """What is wrong with the grammar, if anything is; it is compiled if it has not been yet."""
        found = self._find(grammar)
        return found if isinstance(found, str) else None

    def settle(self, grammar: Grammar, verdict: str | None) -> None:
        """Have the grammar ready for `matcher`, with another process's verdict on it.

        How far a trial comes depends on the machine's mood, and ranks must be of one mind.
        """
        if not self.knows(grammar):
            self._keep(grammar.source, verdict or self._compile(grammar.source))

    def matcher(self, grammar: Grammar) -> Copy:
        """A matcher of one sequence's own, at the beginning.

        Raises `GrammarError` for a faulty grammar.
        """
        found = self._find(grammar)
        if isinstance(found, str):
            raise GrammarError(found)
        with self._keeping:
            if found.wants_another():
                if self._spare is None:
                    from concurrent.futures import ThreadPoolExecutor

                    self._spare = ThreadPoolExecutor(1, "spare grammar")
                self._spare.submit(self._compile_wanted, grammar.source, found)
            return found.copy()

    def _find(self, grammar: Grammar) -> Compilations | str:
        """The compiled grammar, or what is wrong with it."""
        source = grammar.source
        with self._keeping:
            known = self._compiled.get(source)
            if known is not None:
                self._compiled.move_to_end(source)
                return known
            done = self._under_way.get(source)
            if done is None:
                self._under_way[source] = threading.Event()
        if done is not None:
            done.wait()
            return self._find(grammar)
        try:
            return self._keep(source, self._try(source) or self._compile(source))
        finally:
            with self._keeping:
                self._under_way.pop(source).set()

    def _keep(self, source: str, made: Compilations | str) -> Compilations | str:
        if isinstance(made, str):
            made = made[:_MAX_MESSAGE]  # the compiler quotes what it was given
        with self._keeping:
            found = self._compiled.setdefault(source, made)
            while len(self._compiled) > _MAX_KEPT:
                self._compiled.popitem(last=False)
        return found

    def _try(self, source: str) -> str | None:
        """What is wrong with a grammar, as far as shows without the model's vocabulary."""
        try:
            from runtime.engine.grammar.trial import Trial

            if not hasattr(self._mine, "trial"):
                self._mine.trial = Trial(self._vocab_size, self._read().special)
            problem: str | None = self._mine.trial.problem(source)
        except Exception as error:  # nothing is promised, and no grammar may end the engine
            return _cannot(error)
        return problem

    def _compile(self, source: str) -> Compilations | str:
        """A grammar that has been tried, or what is wrong with it after all."""
        try:
            from llguidance import LLMatcher

            from runtime.engine.grammar.trial import limits

            tokens = self._read().tokens
            began = time.thread_time()
            matcher = LLMatcher(tokens, source, log_level=0, limits=limits())
            if not matcher.is_error():
                # Masks share what is computed for the first one; and some faults only show in it.
                matcher.compute_bitmask()
        except Exception as error:  # nothing is promised, and no grammar may end the engine
            return _cannot(error)
        if matcher.is_error():
            return matcher.get_error()
        return Compilations(matcher, time.thread_time() - began)

    def _compile_wanted(self, source: str, found: Compilations) -> None:
        made = self._compile(source)
        with self._keeping:
            found.add(made)

    def read_ahead(self) -> bool:
        """Do a part of what the first grammar takes; False if nothing is left of it, or nothing can be done.

        It never waits for a thread that has begun to read for a grammar.
        """
        if not self._reading.acquire(blocking=False):
            return False
        try:
            return self._vocabulary is None and self._read_part() is None
        except Exception:  # whoever brings a grammar is told
            return False
        finally:
            self._reading.release()

    def _read(self) -> Vocabulary:
        with self._reading:
            while (vocabulary := self._read_part()) is None:
                pass
            return vocabulary

    def _read_part(self) -> Vocabulary | None:
        """The vocabulary, unless that was only a part of it."""
        if self._parts is None:
            from runtime.engine.grammar.vocabulary import read_vocabulary

            self._parts = read_vocabulary(self._directory, self._vocab_size)
        if self._vocabulary is None:
            try:
                next(self._parts)
            except StopIteration as end:
                self._vocabulary = end.value
            except BaseException:
                self._parts = None  # the next one finds out for itself
                raise
        return self._vocabulary
