"""Log-probabilities in the three shapes that clients know: chat, completions, and vLLM's for prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from runtime.protocol import TokenLogprobs

if TYPE_CHECKING:
    from runtime.text.tokenizer import Tokenizer

# JSON has no minus infinity; clients of OpenAI's API know this figure in its place.
_LOWEST = -9999.0


class TokenNames:
    """How tokens are called in answers: by their text or, with `as_ids`, unmistakably as `token_id:5`."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def text(self, token_id: int) -> str:
        """The token's own text."""
        return self._tokenizer.token_text(token_id)

    def bytes(self, token_id: int) -> list[int]:
        """The token's own bytes."""
        return list(self._tokenizer.token_bytes(token_id))

    def name(self, token_id: int) -> str:
        """What the token is called."""
        return f"token_id:{token_id}" if self._as_ids else self._tokenizer.token_text(token_id)


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def chat_content(entries: list[TokenLogprobs], names: TokenNames) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat choice: one entry per token, with its alternatives."""

    def describe(token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": names.name(token_id),
            "logprob": _finite(logprob),
            "bytes": names.bytes(token_id),
        }

    return [
        describe(entry.token_id, entry.logprob)
        | {"top_logprobs": [describe(token_id, logprob) for token_id, logprob in entry.top]}
        for entry in entries
    ]


class CompletionLogprobs:
    """`logprobs` of a completion choice: parallel lists, with each token's offset in the text."""

    def __init__(self, names: TokenNames, num_top: int) -> None:
        self._names = names
        self._num_top = num_top
        self._offset = 0

    def take(self, entries: list[TokenLogprobs], first: list[int] | None = None) -> dict[str, Any]:
        """The lists for the next tokens; `first` are ids in front of them that have no probability."""
        tokens, logprobs, tops, offsets = [], [], [], []
        rows: list[tuple[int, TokenLogprobs | None]] = [(token_id, None) for token_id in first or ()]
        rows += [(entry.token_id, entry) for entry in entries]
        for token_id, entry in rows:
            tokens.append(self._names.name(token_id))
            offsets.append(self._offset)
            self._offset += len(self._names.text(token_id))
            logprobs.append(None if entry is None else _finite(entry.logprob))
            tops.append(None if entry is None else self._top(entry))
        return {
            "tokens": tokens,
            "token_logprobs": logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        best = entry.top[: self._num_top]
        top = {self._names.name(token_id): _finite(logprob) for token_id, logprob in best}
        # The chosen token is always among them, even where it was not likely.
        return top | {self._names.name(entry.token_id): _finite(entry.logprob)}


def prompt_entries(
    entries: list[TokenLogprobs | None], names: TokenNames, top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's `prompt_logprobs`: for each prompt token, its own entry and the `top` best, by token id."""

    def describe(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": names.text(token_id)}

    result: list[dict[str, dict[str, Any]] | None] = []
    for entry in entries:
        if entry is None:
            result.append(None)
            continue
        rows = {
            str(token_id): describe(token_id, logprob, rank)
            for rank, (token_id, logprob) in enumerate(entry.top[:top], 1)
        }
        result.append({str(entry.token_id): describe(entry.token_id, entry.logprob, entry.rank)} | rows)
    return result


def extend(whole: dict[str, Any] | None, piece: dict[str, Any]) -> dict[str, Any]:
    """`whole` with the lists of `piece` added to the ends of its own."""
    if whole is None:
        return piece
    for name, values in whole.items():
        values.extend(piece[name])
    return whole
