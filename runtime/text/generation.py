"""Runs the sequences of one request on the engine and turns their tokens into text."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol

from runtime.protocol import Submit, TokenDelta
from runtime.text.sequence import Sequence, TextDelta


class TokenStream(Protocol):
    """What the engine makes of several sequences; see `runtime.client.TokenStream`."""

    def __aiter__(self) -> AsyncIterator[list[TokenDelta]]: ...
    def abort(self, request_id: str, /) -> None: ...
    def close(self) -> None: ...
    async def confirmed(self) -> None: ...


class Engine(Protocol):
    """Whoever takes sequences; see `runtime.client.EngineClient`."""

    def submit(self, *requests: Submit) -> TokenStream: ...


async def run(client: Engine, sequences: list[Sequence]) -> AsyncGenerator[list[TextDelta]]:
    """The text of all sequences as it comes; each item holds everything that has arrived, by sequence.

    Ends once every sequence has, which none does before the engine's weights are verified. Closing it,
    cancelling it or an error aborts what is still running. Raises `EngineUnavailable` if the engine dies or
    its weights were wrong, and what `Sequence.take` raises.
    """
    running = {sequence.submit.request_id: sequence for sequence in sequences}
    stream = client.submit(*(sequence.submit for sequence in sequences))
    try:
        async for arrived in stream:
            batch = []
            for request_id, deltas in _by_sequence(arrived):
                sequence = running.get(request_id)
                if sequence is None:
                    continue  # it has ended at a stop string, which the engine did not know of
                text = sequence.take(deltas)
                if text.finish_reason is not None:
                    del running[request_id]
                    stream.abort(request_id)
                batch.append(text)
            if any(text.finish_reason is not None for text in batch):
                await stream.confirmed()
            if batch:
                yield batch
    finally:
        stream.close()


def _by_sequence(arrived: list[TokenDelta]) -> list[tuple[str, list[TokenDelta]]]:
    if len(arrived) == 1:
        return [(arrived[0].request_id, arrived)]
    found: dict[str, list[TokenDelta]] = {}
    for delta in arrived:
        found.setdefault(delta.request_id, []).append(delta)
    return list(found.items())
