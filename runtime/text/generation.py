"""Runs the sequences of one request on the engine and turns their tokens into text."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from typing import Protocol

from runtime.protocol import Submit, TokenDelta
from runtime.text.sequence import Sequence, TextDelta


class TokenStream(Protocol):
    """The deltas of one submitted sequence, in order; see `runtime.client.TokenStream`."""

    def __aiter__(self) -> AsyncIterator[TokenDelta]: ...
    def take_waiting(self) -> list[TokenDelta]: ...
    async def aclose(self) -> None: ...


class Engine(Protocol):
    """Whoever takes sequences; see `runtime.client.EngineClient`."""

    def submit(self, request: Submit, /) -> TokenStream: ...


_Arrivals = asyncio.Queue[tuple[int, TokenDelta | Exception]]


async def run(client: Engine, sequences: list[Sequence]) -> AsyncGenerator[list[TextDelta]]:
    """The text of all sequences as it comes; each item holds everything that has arrived, by sequence.

    Ends once every sequence has. Closing it, cancelling it or an error aborts what is still running.
    Raises `EngineUnavailable` if the engine dies, `GenerationError` if it gives a sequence up.
    """
    async with AsyncExitStack() as cleanup:
        streams: list[TokenStream] = []
        for sequence in sequences:
            stream = client.submit(sequence.submit)
            cleanup.push_async_callback(stream.aclose)
            streams.append(stream)
        if len(streams) == 1:
            async for batch in _run_one(streams[0], sequences[0]):
                yield [batch]
        else:
            async for batches in _run_many(streams, sequences, cleanup):
                yield batches


async def _run_one(stream: TokenStream, sequence: Sequence) -> AsyncGenerator[TextDelta]:
    async for delta in stream:
        text = sequence.take([delta, *stream.take_waiting()])
        yield text
        if text.finish_reason is not None:
            return


async def _run_many(
    streams: list[TokenStream], sequences: list[Sequence], cleanup: AsyncExitStack
) -> AsyncGenerator[list[TextDelta]]:
    arrivals: _Arrivals = asyncio.Queue()
    for place, stream in enumerate(streams):
        cleanup.callback(asyncio.create_task(_pump(place, stream, arrivals)).cancel)
    running = set(range(len(streams)))
    while running:
        by_place = await _arrived(arrivals)
        batch = [sequences[place].take(deltas) for place, deltas in by_place.items() if place in running]
        for text in batch:
            if text.finish_reason is not None:
                running.discard(text.place)
                await streams[text.place].aclose()
        if batch:
            yield batch


async def _pump(place: int, stream: TokenStream, arrivals: _Arrivals) -> None:
    try:
        async for delta in stream:
            arrivals.put_nowait((place, delta))
    except Exception as error:  # handed over, to be raised where the answer is written
        arrivals.put_nowait((place, error))


async def _arrived(arrivals: _Arrivals) -> dict[int, list[TokenDelta]]:
    """Everything that has arrived, at least one delta, by the place of its sequence."""
    by_place: dict[int, list[TokenDelta]] = {}
    place, item = await arrivals.get()
    while True:
        if isinstance(item, Exception):
            raise item
        by_place.setdefault(place, []).append(item)
        if arrivals.empty():
            return by_place
        place, item = arrivals.get_nowait()
