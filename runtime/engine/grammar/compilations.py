"""One grammar, compiled as often as sequences follow it side by side.

Matchers that are copies of one compilation share what they find out about the grammar, which makes their
masks cheap, and the lock around it, so that their masks are computed one after the other. A compilation to
each sequence lets them be computed in any number of threads. One that serves the next sequences, too, need
not find out again; but what is shared only grows, so that in the end each one is replaced.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

# What takes longer to compile is large, too, and takes as much memory each time.
_QUICK_SECONDS = 0.01
_MOST_IF_QUICK, _MOST = 64, 8
# Sequences that one compilation serves.
_MOST_COPIES = 512


class _Compilation:
    def __init__(self, first: LLMatcher) -> None:
        self.first = first
        self.number = next(_numbers)
        self.num_copies = 0
        self.num_in_use = 0


_numbers = count()


class Compilations:
    """All compilations of one grammar. One thread makes copies; others may add compilations."""

    def __init__(self, first: LLMatcher, seconds: float) -> None:
        """`seconds` is what it took to compile it."""
        self._all = [_Compilation(first)]
        self._num_coming = 0
        self._num_copies = 0
        self._wanted = 1
        self._most = _MOST_IF_QUICK if seconds < _QUICK_SECONDS else _MOST

    def copy(self) -> Copy:
        """A matcher at the beginning."""
        self._num_copies += 1
        return Copy(self)

    def wants_another(self) -> bool:
        """Before a copy: whether it should be compiled once more, which is then expected."""
        # As many as there ever were sequences side by side.
        self._wanted = min(self._most, max(self._wanted, self._num_copies + 1))
        crowded = len(self._all) + self._num_coming < self._wanted
        worn = self._num_coming == 0 and any(one.num_copies >= _MOST_COPIES for one in self._all)
        self._num_coming += crowded or worn
        return crowded or worn

    def add(self, another: Compilations | str) -> None:
        """Take in the compilation that was wanted; if that is one too many, the one that has served longest
        goes.

        A text says why there is none.
        """
        self._num_coming -= 1
        if isinstance(another, str):
            return
        most_worn_first = sorted(self._all, key=lambda one: -one.num_copies)
        self._all = [*most_worn_first, *another._all][-self._wanted :]

    def take(self) -> _Compilation:
        """The compilation that the fewest sequences follow now."""
        found = min(self._all, key=lambda one: one.num_in_use)
        found.num_copies += 1
        found.num_in_use += 1
        return found

    def drop(self, compilation: _Compilation | None) -> None:
        """Note that a copy is gone, and which compilation it was of."""
        self._num_copies -= 1
        if compilation is not None:
            compilation.num_in_use -= 1


class Copy:
    """A matcher of one sequence's own, at the beginning.

    Which compilation it is of is settled when it is first asked for: while a prompt is computed, there is
    time for another one.
    """

    __slots__ = ("_compilation", "_compilations", "_matcher")

    def __init__(self, compilations: Compilations) -> None:
        self._compilations = compilations
        self._compilation: _Compilation | None = None
        self._matcher: LLMatcher | None = None

    @property
    def matcher(self) -> LLMatcher:
        """What follows the grammar."""
        if self._matcher is None:
            self._compilation = self._compilations.take()
            self._matcher = self._compilation.first.deep_copy()
        return self._matcher

    @property
    def group(self) -> int:
        """Matchers of the same group share a lock."""
        return -1 if self._compilation is None else self._compilation.number

    def __del__(self) -> None:
        self._compilations.drop(self._compilation)
