"""One grammar, compiled as often as sequences follow it side by side.

Matchers that are copies of one compilation share what they find out about the grammar, which makes their
masks cheap, and the lock around it, so that their masks are computed one after the other. A compilation to
each sequence lets them be computed in any number of threads. One that serves the next sequences, too, need
not find out again; but what is shared only grows, so that in the end it is replaced.
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


class Copy:
    """A matcher of one sequence's own. Those of the same `group` share a lock."""

    __slots__ = ("_compilation", "group", "matcher")

    def __init__(self, compilation: _Compilation) -> None:
        self.matcher = compilation.first.deep_copy()
        self.group = compilation.number
        self._compilation = compilation
        compilation.num_copies += 1
        compilation.num_in_use += 1

    def __del__(self) -> None:
        self._compilation.num_in_use -= 1


class _Compilation:
    def __init__(self, first: LLMatcher) -> None:
        self.first = first
        self.number = next(_numbers)
        self.num_copies = 0
        self.num_in_use = 0


_numbers = count()


class Compilations:
    """All compilations of one grammar; whoever uses it from several threads holds a lock meanwhile."""

    def __init__(self, first: LLMatcher, seconds: float) -> None:
        """`seconds` is what it took to compile it."""
        self._all = [_Compilation(first)]
        self._num_coming = 0
        self._most = _MOST_IF_QUICK if seconds < _QUICK_SECONDS else _MOST
        self.is_quick = seconds < _QUICK_SECONDS

    def copy(self) -> Copy:
        """A matcher at the beginning, of the compilation that the fewest sequences follow now."""
        return Copy(min(self._all, key=lambda one: one.num_in_use))

    def wants_another(self) -> bool:
        """Whether it should be compiled once more, which is then expected."""
        num_compilations = len(self._all) + self._num_coming
        num_in_use = sum(one.num_in_use for one in self._all)
        crowded = num_in_use >= num_compilations and num_compilations < self._most
        worn = self._num_coming == 0 and any(one.num_copies >= _MOST_COPIES for one in self._all)
        self._num_coming += crowded or worn
        return crowded or worn

    def add(self, another: Compilations | str, *, wanted: bool = False) -> None:
        """Take in another compilation, in the place of one that has served long if there is one.

        A text says why there is none. `wanted` says that it was expected.
        """
        self._num_coming -= wanted
        if isinstance(another, str):
            return
        self._all = [one for one in self._all if one.num_copies < _MOST_COPIES]
        if len(self._all) < self._most:
            self._all += another._all
