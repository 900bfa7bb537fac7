"""Token ids -> text while they arrive: never half a character, and little work for each token."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from runtime.text.tokenizer import Tokenizer

# As many of a prompt's last tokens as can matter to the text that follows them: a character has at
# most four bytes, and a decoder that looks at neighbours looks at a few.
_CONTEXT = 6

_BROKEN = "\ufffd"


class Detokenizer:
    """The growing text of one sequence.

    All that `push` and `flush` return, joined, is `tokenizer.decode` of all ids; after `prompt_ids`,
    it is what those ids add to the prompt's text. Special tokens among `shown_ids` are never skipped.
    With `starts_anew` none of the ids completes a character that the prompt has begun.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt_ids: Sequence[int] = (),
        shown_ids: frozenset[int] = frozenset(),
        starts_anew: bool = False,
    ) -> None:
        steps = _Bytes if tokenizer.joins_bytes else _Window
        skipped = tokenizer.special_ids - shown_ids if skip_special_tokens else frozenset[int]()
        context = list(prompt_ids[-_CONTEXT:])
        while starts_anew and tokenizer.decode(context).endswith(_BROKEN):
            context.pop()
        self._steps: _Bytes | _Window = steps(tokenizer, skipped, context)

    def push(self, ids: Sequence[int]) -> str:
        """Take in the next ids and return the text that is now certain."""
        return self._steps.push(ids)

    def flush(self) -> str:
        """The text still held back; an incomplete character becomes U+FFFD. The sequence has ended."""
        return self._steps.flush()


class _Bytes:
    """For decoders that join bytes: an incremental UTF-8 decoder holds back just the incomplete ones."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], context: Sequence[int]) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drops_space = tokenizer.drops_first_space
        self.push(context)

    def push(self, ids: Sequence[int]) -> str:
        skipped = self._skipped
        text = self._decoder.decode(b"".join([self._bytes_of(i) for i in ids if i not in skipped]))
        if self._drops_space and text:
            self._drops_space = False
            return text.removeprefix(" ")
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """For all other decoders: decodes a short window with and without the new ids and compares.

    The window begins with the ids whose text was returned last, so that what a decoder does at the
    beginning of a text (such as dropping a space) happens in both.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._ids = [index for index in context if index not in self._skipped]
        self._num_sent = len(self._ids)
        self._sent = self._decode(self._ids)

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._push_one(index) for index in ids if index not in self._skipped])

    def flush(self) -> str:
        return self._take(self._decode(self._ids))

    def _push_one(self, index: int) -> str:
        self._ids.append(index)
        text = self._decode(self._ids)
        if text.endswith(_BROKEN):
            # Perhaps a character whose other bytes are still to come; one has at most four.
            pending = self._decode(self._ids[self._num_sent :])
            if not pending.endswith(_BROKEN * 4):
                return ""
        return self._take(text)

    def _take(self, text: str) -> str:
        """What `text`, the whole window's, adds to what has been returned; then move the window on."""
        pending = self._ids[self._num_sent :]
        # A decoder of single bytes gives up a whole run of them, the returned part too, for one wrong byte.
        new = text[len(self._sent) :] if text.startswith(self._sent) else self._decode(pending)
        if new:
            self._ids = pending
            self._num_sent = len(pending)
            self._sent = self._decode(pending)
        return new

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
