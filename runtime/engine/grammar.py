"""Grammars, compiled for the model's vocabulary by llguidance, the recently used ones kept."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import FirstlightError
from runtime.protocol import Grammar

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

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
        """Take in another compilation, as was wanted."""
        if len(self._compilations) < self._num_lanes:
            self._compilations.append(another)
            self._num_copies.append(0)
        else:
            self._compilations[self._num_due % self._num_lanes] = another

    def add_unasked(self, another: LLMatcher) -> None:
        """Take in a compilation that was made at the same time as the first, if there is use for it."""
        if len(self._compilations) < self._num_lanes:
            self._num_due += 1
            self.add(another)


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
        self._compiled: OrderedDict[str, Compiled | str] = OrderedDict()
        self._num_lanes = min(_MAX_LANES, len(os.sched_getaffinity(0)))
        self._num_found = 0
        self._keeping = threading.Lock()
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
            self._keep(grammar, verdict or self._compile(grammar.source, tried=True))

    def matcher(self, grammar: Grammar) -> tuple[LLMatcher, int]:
        """A matcher of one sequence's own, at the beginning, and its lane; see `Compiled`.

        Raises `GrammarError` for a faulty grammar.
        """
        found = self._find(grammar)
        if isinstance(found, str):
            raise GrammarError(found)
        with self._keeping:
            if found.wants_another():
                self._begin_another(grammar.source, found)
            return found.copy()

    def _begin_another(self, source: str, found: Compiled) -> None:
        """Compile a grammar in demand once more, beside whatever goes on."""
        if self._spare is None:
            from concurrent.futures import ThreadPoolExecutor

            self._spare = ThreadPoolExecutor(1, "spare grammar")

        def compile_another() -> None:
            another = self._compile(source, tried=True)
            if not isinstance(another, str):
                with self._keeping:
                    found.add(another)

        self._spare.submit(compile_another)

    def _find(self, grammar: Grammar) -> Compiled | str:
        """The compiled grammar, or what is wrong with it."""
        with self._keeping:
            known = self._compiled.get(grammar.source)
            if known is not None:
                self._compiled.move_to_end(grammar.source)
                return known
        return self._keep(grammar, self._compile(grammar.source, tried=False))

    def _keep(self, grammar: Grammar, made: LLMatcher | str) -> Compiled | str:
        with self._keeping:
            found = self._compiled.get(grammar.source)
            if found is None:
                # Different grammars begin in different lanes.
                self._num_found += 1
                lane = self._num_found % self._num_lanes
                found = made if isinstance(made, str) else Compiled(made, lane, self._num_lanes)
                self._compiled[grammar.source] = found
            elif not isinstance(found, str) and not isinstance(made, str):
                found.add_unasked(made)
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

    def read_ahead(self) -> bool:
        """Do a part of what the first grammar takes; False if nothing is left of it, or it cannot be done."""
        with self._reading:
            try:
                return self._vocabulary is None and self._read_part() is None
            except Exception:  # whoever brings a grammar is told
                return False

    def _read(self) -> Vocabulary:
        with self._reading:
            while (vocabulary := self._read_part()) is None:
                pass
            return vocabulary

    def _read_part(self) -> Vocabulary | None:
        """The vocabulary, unless that was only a part of it."""
        if self._parts is None:
            from runtime.engine.vocabulary import read_vocabulary

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
