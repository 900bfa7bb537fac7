"""One sequence of an answer: the engine's tokens go in, text that can be shown comes out."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

from runtime.errors import FirstlightError, RequestError
from runtime.protocol import Submit, TokenDelta, TokenLogprobs
from runtime.text.detokenizer import Detokenizer
from runtime.text.stops import StopStrings
from runtime.text.tokenizer import Tokenizer


class GenerationError(FirstlightError):
    """The engine gave up on one sequence."""


class TextOptions(Protocol):
    """What a request says about how its text is cut."""

    @property
    def stops(self) -> list[str]: ...
    @property
    def include_stop_str_in_output(self) -> bool: ...
    @property
    def skip_special_tokens(self) -> bool: ...
    @property
    def stop_token_ids(self) -> list[int]: ...


@dataclass(slots=True)
class TextDelta:
    """What has been added to the sequence at `place` of its answer.

    `token_ids` holds every id that was made, also one whose text is still held back or is not shown.
    `stop_reason` is the stop string, or the request's own stop token id, that ended it.
    """

    place: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None


class Sequence:
    """One sequence on its way.

    `counts_prompt` is set on one of those that share a prompt; `shown_ids` are special tokens whose text
    is shown even where others are skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        submit: Submit,
        options: TextOptions,
        place: int,
        *,
        counts_prompt: bool = True,
        shown_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.submit = submit
        self.place = place
        self.counts_prompt = counts_prompt
        self.generated = 0
        self.num_cached_tokens = 0
        self.prefill_seconds = 0.0
        self.prompt_logprobs: list[TokenLogprobs | None] = []
        self._own_stops = frozenset(options.stop_token_ids)
        self._include_stop = options.include_stop_str_in_output
        self._has_stops = bool(options.stops)
        self._stops = StopStrings(options.stops, include_stop=self._include_stop)
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=options.skip_special_tokens,
            prompt_ids=submit.prompt_token_ids,
            shown_ids=shown_ids,
            # A grammar is about whole characters.
            starts_anew=submit.sampling.grammar is not None,
        )
        self._kept: list[TextDelta] = []

    def take(self, deltas: Items[TokenDelta]) -> TextDelta:
        """The text of what the engine sent.

        Raises `RequestError` for a request that the engine refuses, `GenerationError` if it gave it up.
        """
        out = TextDelta(self.place)
        for delta in deltas:
            self._take_one(delta, out)
            if out.finish_reason is not None:
                break
        return out

    def _take_one(self, delta: TokenDelta, out: TextDelta) -> None:
        if self.generated == 0:
            self._take_first(delta)
        if delta.finish_reason == "refused":
            raise RequestError(delta.error or "The engine refuses this request.", delta.param)
        if delta.finish_reason in ("error", "abort"):
            raise GenerationError(delta.error or "The engine gave this request up.")
        if self._has_stops:
            self._take_until_stop(delta, out)
        else:
            out.text += self._detokenizer.push(delta.token_ids)
            out.token_ids += delta.token_ids
            out.logprobs += delta.logprobs
            self.generated += len(delta.token_ids)
        if out.finish_reason is None and delta.finish_reason is not None:
            self._finish(delta, out)

    def _take_first(self, delta: TokenDelta) -> None:
        self.num_cached_tokens = max(self.num_cached_tokens, delta.num_cached_tokens)
        self.prefill_seconds = max(self.prefill_seconds, delta.prefill_seconds)
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs

    def _take_until_stop(self, delta: TokenDelta, out: TextDelta) -> None:
        # Token by token, so that what is counted ends with the token that completed the stop string.
        for position, token_id in enumerate(delta.token_ids):
            self.generated += 1
            out.token_ids.append(token_id)
            out.logprobs += delta.logprobs[position : position + 1]
            text = self._detokenizer.push((token_id,))
            if self.generated <= self.submit.sampling.min_tokens:
                out.text += text
                continue
            self._push_stops(text, out)
            if out.finish_reason is not None:
                return

    def _push_stops(self, text: str, out: TextDelta) -> None:
        safe, found = self._stops.push(text)
        out.text += safe
        if found is not None:
            out.finish_reason, out.stop_reason = "stop", found

    def _finish(self, delta: TokenDelta, out: TextDelta) -> None:
        stop = delta.stop_token_id
        rest = ""
        if stop is not None:
            self.generated += 1
            out.token_ids.append(stop)
            if self._include_stop:
                rest = self._detokenizer.push((stop,))
        rest += self._detokenizer.flush()
        self._push_stops(rest, out)
        if out.finish_reason is None:
            out.text += self._stops.flush()
            out.finish_reason = delta.finish_reason
            out.stop_reason = stop if stop in self._own_stops else None

    def keep(self, delta: TextDelta) -> None:
        """Put a piece aside for `kept`."""
        self._kept.append(delta)

    def kept(self) -> TextDelta:
        """All pieces that were put aside, in one."""
        whole = TextDelta(self.place, text="".join(delta.text for delta in self._kept))
        for delta in self._kept:
            whole.token_ids += delta.token_ids
            whole.logprobs += delta.logprobs
        if self._kept:
            whole.finish_reason = self._kept[-1].finish_reason
            whole.stop_reason = self._kept[-1].stop_reason
        return whole
