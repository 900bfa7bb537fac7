"""Grammars, compiled for the model's vocabulary by llguidance, the recently used ones kept."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import FirstlightError
from runtime.protocol import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from runtime.engine.vocabulary import Vocabulary

_MAX_KEPT = 64
# Masks are computed in so many threads, if there are as many cores.
_MAX_LANES = 8
# Another compilation for each of so many sequences, up to one a lane; then one in the place of the oldest.
_COPIES = 8


class GrammarError(FirstlightError):
    """A grammar that cannot be followed; says why."""


class Compiled:
    """A grammar, compiled once for each lane, as far as there is use for that.

    Matchers that are copies of one share what they find out about the grammar, which makes their masks
    cheap, and the lock around it, so that they are of one lane: a lane's masks are computed one after the
    other. What is shared only grows, so that a compilation that has served long is replaced.
    """

    def __init__(self, first: LLMatcher, first_lane: int, num_lanes: int) -> None:
        self._compilations = [first]
        self._num_copies = [0]
        self._num_due = 0
        self._first_lane = first_lane
        self._num_lanes = num_lanes

    def copy(self) -> tuple[LLMatcher, int]:
        """A matcher at the beginning, and its lane: the one with the fewest so far."""
        place = self._num_copies.index(min(self._num_copies))
        self._num_copies[place] += 1
        return self._compilations[place].deep_copy(), (self._first_lane + place) % self._num_lanes

    def wants_another(self) -> bool:
        """Whether it is time for another compilation; says so once."""
        rounds = sum(self._num_copies) // _COPIES
        due = min(rounds, self._num_lanes - 1) + rounds // self._num_lanes // _COPIES
        if due <= self._num_due:
            return False
        self._num_due += 1
        return True

    def add(self, another: LLMatcher) -> None:
        """Take in another compilation."""
        if len(self._compilations) < self._num_lanes:
            self._compilations.append(another)
            self._num_copies.append(0)
        else:
            self._compilations[self._num_due % self._num_lanes] = another


class Grammars:
    """Compiles grammars on any thread. Whatever that takes is imported, and read, for the first of them."""

    def __init__(self, directory: Path, vocab_size: int) -> None:
        """`directory` holds the model's tokenizer; `vocab_size` is how many logits the model has."""
        self._directory = directory
        self._vocab_size = vocab_size
        self._vocabulary: Vocabulary | None = None
        self._reading = threading.Lock()
        self._compiled: OrderedDict[str, Compiled | str] = OrderedDict()
        self._num_lanes = min(_MAX_LANES, len(os.sched_getaffinity(0)))
        self._num_found = 0
        self._keeping = threading.Lock()
        self._mine = threading.local()  # each thread tries grammars in a process of its own

    def __len__(self) -> int:
        """How many compiled grammars are kept."""
        return len(self._compiled)

    def compile(self, grammar: Grammar) -> None:
        """Have the grammar ready for `matcher`, or known to be faulty."""
        found = self._find(grammar)
        if isinstance(found, str):
            return
        with self._keeping:
            more = found.wants_another()
        another = self._compile(grammar.source, tried=True) if more else None
        if another is not None and not isinstance(another, str):
            with self._keeping:
                found.add(another)

    def verdict(self, grammar: Grammar) -> str | None:
        """What is wrong with the grammar, if anything is; it is compiled if it has not been yet."""
        found = self._find(grammar)
        return found if isinstance(found, str) else None

    def settle(self, grammar: Grammar, verdict: str | None) -> None:
        """Have the grammar ready for `matcher`, with another process's verdict on it.

        How far a trial comes depends on the machine's mood, and ranks must be of one mind.
        """
        with self._keeping:
            if grammar.source in self._compiled:
                return
        self._keep(grammar, verdict or self._compile(grammar.source, tried=True))

    def matcher(self, grammar: Grammar) -> tuple[LLMatcher, int]:
        """A matcher of one sequence's own, at the beginning, and its lane; see `Compiled`.

        Raises `GrammarError` for a faulty grammar.
        """
        found = self._find(grammar)
        if isinstance(found, str):
            raise GrammarError(found)
        with self._keeping:
            return found.copy()

    def _find(self, grammar: Grammar) -> Compiled | str:
        """The compiled grammar, or what is wrong with it."""
        with self._keeping:
            known = self._compiled.get(grammar.source)
            if known is not None:
                self._compiled.move_to_end(grammar.source)
                return known
        return self._keep(grammar, self._compile(grammar.source, tried=False))

    def _keep(self, grammar: Grammar, first: LLMatcher | str) -> Compiled | str:
        with self._keeping:
            # Different grammars begin in different lanes.
            self._num_found += 1
            lane = self._num_found % self._num_lanes
            found = first if isinstance(first, str) else Compiled(first, lane, self._num_lanes)
            found = self._compiled.setdefault(grammar.source, found)
            while len(self._compiled) > _MAX_KEPT:
                self._compiled.popitem(last=False)
        return found

    def _try(self, source: str) -> str | None:
        from runtime.engine.trial import Trial

        if not hasattr(self._mine, "trial"):
            self._mine.trial = Trial(self._vocab_size, self._read().special)
        problem: str | None = self._mine.trial.problem(source)
        return problem

    def _compile(self, source: str, tried: bool) -> LLMatcher | str:
        try:
            problem = None if tried else self._try(source)
            return self._compile_now(source) if problem is None else problem
        except Exception as error:  # nothing is promised, and no grammar may end the engine
            return f"it cannot be compiled: {error}"

    def _compile_now(self, source: str) -> LLMatcher | str:
        from llguidance import LLMatcher

        from runtime.engine.trial import limits

        matcher = LLMatcher(self._read().tokens, source, log_level=0, limits=limits())
        if not matcher.is_error():
            # Masks share what is computed for the first one; and some faults only show in it.
            matcher.compute_bitmask()
        return matcher.get_error() if matcher.is_error() else matcher

    def _read(self) -> Vocabulary:
        from runtime.engine.vocabulary import read_vocabulary

        with self._reading:
            if self._vocabulary is None:
                self._vocabulary = read_vocabulary(self._directory, self._vocab_size)
            return self._vocabulary
