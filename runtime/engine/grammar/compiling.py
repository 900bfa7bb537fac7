"""Compiles grammars beside the step loop: a request joins the engine once its grammar is there."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from runtime.engine.grammar.grammars import Grammars
from runtime.protocol import Submit

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

# A grammar that takes long holds up others' only once so many of them do.
_NUM_THREADS = 4


class Compiling:
    """The requests whose grammars are being compiled. `wake` is called, on any thread, when one is done."""

    def __init__(self, grammars: Grammars, wake: Callable[[], None]) -> None:
        self._grammars = grammars
        self._wake = wake
        self._threads: ThreadPoolExecutor | None = None
        self._pending: set[str] = set()
        self._done: queue.SimpleQueue[Submit] = queue.SimpleQueue()

    @property
    def busy(self) -> bool:
        """Whether any request is still to be handed back."""
        return bool(self._pending)

    def begin(self, request: Submit) -> None:
        """Take in a request that has a grammar. It is handed back at once if that is known already."""
        assert request.sampling.grammar is not None
        self._pending.add(request.request_id)
        if self._grammars.knows(request.sampling.grammar):
            self._done.put(request)
            return
        if self._threads is None:
            from concurrent.futures import ThreadPoolExecutor

            self._threads = ThreadPoolExecutor(_NUM_THREADS, "grammar")
        self._threads.submit(self._work, request)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Never hand these back; unknown ids are ignored."""
        self._pending.difference_update(request_ids)

    def finished(self) -> list[Submit]:
        """The requests whose grammars are compiled, or known to be faulty, in the order of that."""
        finished = []
        while not self._done.empty():
            request = self._done.get()
            if request.request_id in self._pending:
                self._pending.remove(request.request_id)
                finished.append(request)
        return finished

    def _work(self, request: Submit) -> None:
        try:
            assert request.sampling.grammar is not None
            self._grammars.compile(request.sampling.grammar)
        finally:
            self._done.put(request)
            self._wake()
