"""A conversation -> token ids, where nothing in a message's text can pass for a special token."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runtime.errors import RequestError
from runtime.text.template import ChatTemplate
from runtime.text.tokenizer import Tokenizer


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **variables: Any,
) -> list[int]:
    """The prompt's token ids. Special tokens come from the template alone.

    With `continue_final_message` the prompt ends right behind the last message's text, so that the
    model goes on with it; no generation prompt is added then. `variables` are passed to the template.

    A special token that is spelled out in a message or a tool stays ordinary text there: nobody can
    close a turn by typing its end. All other text gets the ids of the rendered prompt as a whole, or of
    its pieces where the template parts them by `piece_boundary`.
    Raises RequestError where the template refuses the messages.
    """
    guard = _Guard(tokenizer)
    hidden = guard.hide(messages)
    text = template.render(
        hidden,
        tools=guard.hide(tools),
        add_generation_prompt=add_generation_prompt and not continue_final_message,
        **{**guard.hide(variables), "piece_boundary": guard.boundary},
    )
    if continue_final_message:
        text = _cut_behind(text, hidden[-1].get("content"))
    parts = text.split(guard.boundary)
    if len(parts) == 1 and not guard.stand_ins and not tokenizer.normalizes_special:
        return tokenizer.encode(text, add_special_tokens=False)
    return [index for part in parts for index in tokenizer.encode_owned(guard.pieces(part))]


def turn_end(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """The special token that the template puts right behind an assistant's turn, if it does: its end."""
    answer = f"{secrets.randbelow(10**30):030}"
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "?"},
    ]
    try:
        text = template.render(messages, add_generation_prompt=False)
    except RequestError:
        return None
    behind = text.partition(answer)[2].lstrip()
    match = None if tokenizer.special_pattern is None else tokenizer.special_pattern.match(behind)
    return None if match is None else tokenizer.id_of(match[0])


def _cut_behind(text: str, last: object) -> str:
    """A rendered text up to the end of its last message's content."""
    content = last.strip() if isinstance(last, str) else ""
    begin = text.rfind(content)
    if begin < 0 or not content or not isinstance(last, str):
        raise RequestError(
            "'continue_final_message' needs a last message that the chat template shows as it is", "messages"
        )
    whole = last.lstrip()  # with the space at its end, if the template leaves that alone
    return text[: begin + len(whole if text.startswith(whole, begin) else content)]


class _Guard:
    """Hides special tokens in what users wrote while the template runs, and brings them back after.

    Hidden, each is a row of digits that nobody can guess, which templates pass on as they are. The
    beginning of a special token at the end of a string is hidden too, because a template may put the
    rest, from another string, right behind it.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._typed, self._pattern = tokenizer.typed_pattern, tokenizer.special_pattern
        self._prefixes = tokenizer.special_prefixes
        self._longest = max(map(len, self._prefixes), default=0)
        # Digits have no case and need no escapes, whatever filter they pass through.
        self._nonce, self.boundary = (f"{secrets.randbelow(10**30):030}" for _ in range(2))
        self._hidden = re.compile(self._nonce + r"\d{6}")
        self.stand_ins: dict[str, str] = {}

    def hide(self, value: Any) -> Any:
        """A copy of a JSON value in which every string, keys too, is safe to render."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item) for item in value]
        return value

    def pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """A rendered text as (piece, whether it is one of the template's own special tokens)."""
        at = 0
        for match in self._pattern.finditer(text) if self._pattern is not None else ():
            yield self._reveal(text[at : match.start()]), False
            yield match[0], True
            at = match.end()
        yield self._reveal(text[at:]), False

    def _hide_text(self, text: str) -> str:
        if self._typed is not None:
            text = self._typed.sub(lambda match: self._stand_in(match[0]), text)
        visible = text.rstrip()
        for length in range(min(self._longest, len(visible)), 0, -1):
            start = len(visible) - length
            if visible[start:] in self._prefixes:
                return text[:start] + self._stand_in(visible[start:]) + text[len(visible) :]
        return text

    def _stand_in(self, hidden: str) -> str:
        for stand_in, known in self.stand_ins.items():
            if known == hidden:
                return stand_in
        stand_in = f"{self._nonce}{len(self.stand_ins):06}"
        self.stand_ins[stand_in] = hidden
        return stand_in

    def _reveal(self, text: str) -> str:
        return self._hidden.sub(lambda match: self.stand_ins[match[0]], text)
