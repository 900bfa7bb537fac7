"""What chat and text completions have in common: ids, usage, and the frame around a streamed piece."""

from __future__ import annotations

import time
import uuid
from typing import Any

import msgspec

from handler.openai.errors import ApiError
from handler.openai.schema import Sampling
from handler.openai.sse import DONE
from handler.service import Service
from runtime.text.sequence import Sequence

encode = msgspec.json.encode


class BaseAnswer:
    """One request on its way to its answer."""

    def __init__(
        self, service: Service, request: Sampling, *, id_prefix: str, chunk_object: str, num_sequences: int
    ) -> None:
        service.check_model(request.model)
        options = request.stream_options
        if options is not None and not request.stream:
            message = "'stream_options' is only valid together with 'stream': true."
            raise ApiError(400, message, param="stream_options", code="invalid_value")
        if request.stream and request.prompt_logprobs is not None:
            message = "'prompt_logprobs' is not available with 'stream': true."
            raise ApiError(400, message, param="prompt_logprobs", code="unsupported_value")
        self.service = service
        self.stream = request.stream
        self.num_sequences = num_sequences
        # What the engine calls it is ours: clients may use a name of theirs twice.
        self.name = uuid.uuid4().hex
        self.id = f"{id_prefix}-{request.request_id or self.name}"
        self.created = int(time.time())
        self.model = request.model or service.model
        self.sequences: list[Sequence] = []
        self._include_usage = options is not None and options.include_usage
        self._continuous = options is not None and options.continuous_usage_stats
        head = {
            "id": self.id,
            "object": chunk_object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }
        self._head = b"data: " + encode(head)[:-1] + b',"choices":'
        self._tail = (b',"usage":null' if self._include_usage else b"") + b"}\n\n"

    def usage(self) -> dict[str, Any]:
        """How many tokens there are by now; prompts that several choices share count once."""
        firsts = [sequence for sequence in self.sequences if sequence.counts_prompt]
        prompt = sum(len(sequence.submit.prompt_token_ids) for sequence in firsts)
        cached = sum(sequence.num_cached_tokens for sequence in firsts)
        completion = sum(sequence.generated for sequence in self.sequences)
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + completion,
            "completion_tokens": completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def event(self, choices: bytes, **extra: Any) -> bytes:
        """One event around encoded `choices`, with `extra` fields beside them."""
        if self._continuous:
            extra["usage"] = self.usage()
        if not extra:
            return self._head + choices + self._tail
        fields = b"".join([b"," + encode(name) + b":" + encode(value) for name, value in extra.items()])
        return self._head + choices + fields + (b"}\n\n" if self._continuous else self._tail)

    def last(self) -> bytes:
        """The events after the text: the usage, where it was asked for, and the mark of the end."""
        if not self._include_usage:
            return DONE
        return self._head + b'[],"usage":' + encode(self.usage()) + b"}\n\n" + DONE

    def failure(self, error: ApiError) -> bytes:
        """The events that end a stream which fails."""
        return b"data: " + error.encoded() + b"\n\n" + DONE

    def envelope(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The fields around the choices of a whole answer."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            "service_tier": None,
            "system_fingerprint": None,
            "usage": self.usage(),
        }
