"""One door for chat and text completions: reads a request, runs it, sends the answer whole or streamed."""

from __future__ import annotations

import asyncio
import sys
import time
import traceback
from contextlib import aclosing
from typing import Any, Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from handler import lifecycle
from handler.asgi import ClientGone, send_bytes, send_error, unless_gone
from handler.limits import Ticket, decode_json, read_body
from handler.openai.errors import ApiError, as_api_error
from handler.openai.sse import EventStream
from handler.record import Record
from handler.service import Service
from runtime.errors import FirstlightError
from runtime.text.generation import run
from runtime.text.sequence import Sequence, TextDelta

# A warm engine starts most answers at once, so a failure should still be able to set the status; while it
# loads, the client is told within a second that somebody is there.
_PATIENCE_LOADING_SECONDS = 1.0
_PATIENCE_WARM_SECONDS = 10.0
# Proxies hang up on connections that are silent for a minute or half of it.
_PATIENCE_ANSWERING_SECONDS = 15.0
_STOPPING = ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=5)


class Answer(Protocol):
    """One request on its way to its answer."""

    id: str
    model: str
    stream: bool
    num_sequences: int

    async def prepare(self) -> list[Sequence]:
        """Tokenize the request and settle how it is sampled."""

    def chunk(self, batch: list[TextDelta]) -> bytes:
        """The events for what has arrived."""

    def last(self) -> bytes:
        """The events after the text."""

    def failure(self, error: ApiError) -> bytes:
        """The last events of a stream that fails, the only way to fail once the status is out."""

    def add(self, batch: list[TextDelta]) -> None:
        """Keep what has arrived for `whole`."""

    def whole(self) -> bytes:
        """The answer in one piece."""


class Kind(Protocol):
    """What tells chat from text completions."""

    route: str
    operation: str

    def parse(self, body: Any) -> Answer:
        """The request in a decoded body. Raises `ApiError` for one that cannot be served."""


class Endpoint:
    """An ASGI application that answers one kind of request."""

    def __init__(self, service: Service, kind: Kind) -> None:
        self.service = service
        self.kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.service.activity.request():
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        service = self.service
        record = Record.of(scope)
        record.operation = self.kind.operation
        events = EventStream(scope, send)
        answer: Answer | None = None
        try:
            body = await decode_json(await read_body(scope, receive, service.settings.max_request_bytes))
            answer = self.kind.parse(body)
            record.id, record.model, record.stream = answer.id, answer.model, answer.stream
            record.choices = answer.num_sequences
            with service.admission.admit(answer.num_sequences) as ticket:
                await unless_gone(receive, self._respond(answer, ticket, events, send, record))
            service.metrics.latency.observe(record.elapsed)
        except ClientGone:
            record.status, record.error = 499, "client_gone"
            service.metrics.disconnects += 1
        except (Exception, asyncio.CancelledError) as error:
            # Cancelled from outside: the time for finishing is over, and whoever still waits is told so.
            failure = _STOPPING if isinstance(error, asyncio.CancelledError) else as_api_error(error)
            _log_unexpected(error)
            record.error = failure.code
            if events.begun and answer is not None:
                await events.end(answer.failure(failure))
            else:
                await send_error(send, failure)
            service.metrics.responses[self.kind.route, str(failure.status)] += 1
            return
        service.metrics.responses[self.kind.route, str(record.status)] += 1

    async def _respond(
        self, answer: Answer, ticket: Ticket, events: EventStream, send: Send, record: Record
    ) -> None:
        reassuring = asyncio.create_task(self._reassure(events, record)) if answer.stream else None
        sequences: list[Sequence] = []
        try:
            async with self.service.place():
                sequences = await answer.prepare()
                await self._generate(answer, sequences, ticket, events, record)
        finally:
            if reassuring is not None:
                reassuring.cancel()  # nothing may come behind the end
            _note(record, sequences)
        if answer.stream:
            await events.end(answer.last())
        else:
            await send_bytes(send, 200, answer.whole())

    async def _generate(
        self,
        answer: Answer,
        sequences: list[Sequence],
        ticket: Ticket,
        events: EventStream,
        record: Record,
    ) -> None:
        metrics = self.service.metrics
        metrics.asked(sequences)
        last: float | None = None
        async with aclosing(run(self.service.client, sequences)) as batches:
            async for batch in batches:
                now = record.elapsed
                if last is None:
                    self._begin(record, sequences, batch, ticket)
                else:
                    metrics.inter_token.observe(now - last)
                last = now
                for delta in batch:
                    metrics.generated_tokens += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        record.finish_reasons.append(delta.finish_reason)
                        decode_seconds = now - (record.ttft or now)
                        metrics.finished(sequences[delta.place], delta.finish_reason, decode_seconds)
                if answer.stream:
                    piece = answer.chunk(batch)
                    if piece:
                        await events.write(piece)
                else:
                    answer.add(batch)

    def _begin(
        self, record: Record, sequences: list[Sequence], batch: list[TextDelta], ticket: Ticket
    ) -> None:
        """The first token is there."""
        ttft = record.elapsed
        queue = max(0.0, ttft - sequences[batch[0].place].prefill_seconds)
        record.ttft, record.queue = ttft, queue
        self.service.metrics.began(ttft, queue)
        ticket.begin()
        lifecycle.note_first_token(self.service.client)

    async def _reassure(self, events: EventStream, record: Record) -> None:
        """Until it is cancelled, tell a client that waits for its next token what it waits for."""
        client, waited = self.service.client, 0.0
        while record.ttft is None:
            await asyncio.sleep(1.0)
            waited += 1.0
            patience = _PATIENCE_WARM_SECONDS if client.state == "warm" else _PATIENCE_LOADING_SECONDS
            if record.ttft is None and (events.begun or waited >= patience):
                await events.comment(lifecycle.describe(client))
        while True:
            left = events.written + _PATIENCE_ANSWERING_SECONDS - time.monotonic()
            if left <= 0:
                await events.comment(lifecycle.describe(client))
            await asyncio.sleep(max(0.1, left))


def _note(record: Record, sequences: list[Sequence]) -> None:
    """What became of a request's tokens, be it complete or not."""
    if not sequences:
        return
    firsts = [sequence for sequence in sequences if sequence.counts_prompt]
    record.prompt_tokens = sum(len(sequence.submit.prompt_token_ids) for sequence in firsts)
    record.cached_tokens = sum(sequence.num_cached_tokens for sequence in firsts)
    record.completion_tokens = sum(sequence.generated for sequence in sequences)
    record.asked = msgspec.structs.asdict(sequences[0].submit.sampling)


def _log_unexpected(error: BaseException) -> None:
    if not isinstance(error, FirstlightError | asyncio.CancelledError):
        traceback.print_exception(error, file=sys.stderr)
