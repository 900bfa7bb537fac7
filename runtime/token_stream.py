"""The answers to one request as they come from the engine, on the client's side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from runtime.errors import FirstlightError
from runtime.protocol import TokenDelta


class EngineUnavailable(FirstlightError):
    """The engine died, cannot start or is shutting down. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Confirmation:
    """Whether what one engine computes with is what its source promises, which is not known yet if `pending`.

    A pending one belongs to one event loop.
    """

    def __init__(self, pending: bool = False) -> None:
        self._known: asyncio.Future[None] | None = None
        if pending:
            self._known = asyncio.get_running_loop().create_future()

    @property
    def is_pending(self) -> bool:
        """Whether it is not known yet."""
        return self._known is not None and not self._known.done()

    async def wait(self) -> None:
        """Return once it is known to be; raises what it was refuted with."""
        if self._known is not None:
            await asyncio.shield(self._known)

    def confirm(self) -> None:
        """It is."""
        if self._known is not None and not self._known.done():
            self._known.set_result(None)

    def refute(self, error: EngineUnavailable) -> None:
        """It is not, or nobody will find out any more. Nothing changes what is known already."""
        if self._known is not None and not self._known.done():
            self._known.set_exception(error)
            self._known.exception()  # it is no mistake if nobody waits


class TokenStream(AsyncIterator[list[TokenDelta]]):
    """What the engine makes of sequences that were submitted together, as it comes.

    Each item holds all that has arrived by then, in order and at least one delta. The iteration ends when
    every sequence has, and raises `EngineUnavailable` if the engine is gone before.
    """

    def __init__(self, abort: Callable[[Iterable[str]], None], request_ids: Iterable[str]) -> None:
        self._abort = abort
        self._running = set(request_ids)
        self._arrived: list[TokenDelta] = []
        self._failure: EngineUnavailable | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._confirmation = Confirmation()

    async def __anext__(self) -> list[TokenDelta]:
        while not self._arrived:
            if self._failure is not None:
                raise self._failure
            if not self._running:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.close()
                raise
        arrived, self._arrived = self._arrived, []
        if self._confirmation.is_pending:
            # What ends an answer has to wait; what came with it has not.
            under_way = [delta for delta in arrived if delta.finish_reason is None]
            if under_way:
                self._arrived = [delta for delta in arrived if delta.finish_reason is not None]
                return under_way
        return arrived

    def abort(self, request_id: str) -> None:
        """Wait no longer for one of the sequences. The engine is told to forget it unless it has ended."""
        if request_id in self._running:
            self._running.discard(request_id)
            self._abort([request_id])

    def close(self) -> None:
        """Wait for nothing any more, and abort what has not ended."""
        running, self._running = self._running, set()
        if running:
            self._abort(running)

    async def confirmed(self) -> None:
        """Return once what has come so far is known to rest on the right weights: no answer ends before.

        Raises `EngineUnavailable` if it does not, or if the engine ended before that was known.
        """
        await self._confirmation.wait()

    def put(self, delta: TokenDelta, confirmation: Confirmation) -> None:
        """Hand over what the engine sent; called by the client alone."""
        self._confirmation = confirmation
        if delta.finish_reason is not None:
            self._running.discard(delta.request_id)
        self._arrived.append(delta)
        self._wake()

    def fail(self, error: EngineUnavailable) -> None:
        """Nothing more will come; called by the client alone."""
        self._running.clear()
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
