"""What a tokenizer format has to offer, and what the formats share that know special tokens by name only."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.errors import FirstlightError, RequestError


class TokenizerError(FirstlightError):
    """A model folder whose tokenizer files are missing, damaged or of an unsupported kind."""


@dataclass(frozen=True)
class AddedToken:
    """A token that is matched in the text as a whole, before the vocabulary's own rules apply.

    Attributes:
        special: it marks structure, and decoding leaves it out unless told not to.
        template_only: a text never means it, even where special tokens are parsed: it is a word like others.
    """

    content: str
    id: int
    special: bool = True
    template_only: bool = False


class Backend(Protocol):
    """One model's vocabulary in one file format.

    Attributes:
        vocab_size: the highest token id plus one.
        special: ids of the tokens that mark structure -> their text.
        template_only: the texts of those that only a template means by spelling them.
        normalizes_special: whether text can become a special token that does not spell it exactly.
        joins_bytes: whether decoding is nothing but joining the tokens' bytes and reading UTF-8.
        drops_first_space: whether a decoded text that begins with a space loses that one.
        bos_id, eos_id: what the file itself names as the tokens that begin and end a text.
    """

    vocab_size: int
    special: dict[int, str]
    template_only: frozenset[str]
    normalizes_special: bool
    joins_bytes: bool
    drops_first_space: bool
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        """See `Tokenizer.encode`."""
        ...

    def encode_owned(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """See `Tokenizer.encode_owned`."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of all `ids`, special ones too; an id that no token has is nothing."""
        ...

    def token_bytes(self, index: int) -> bytes:
        """The bytes that one token adds to a text; empty for an id that no token has."""
        ...

    def id_of(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary, or None."""
        ...


class JoiningBackend(ABC):
    """A vocabulary whose text is its tokens' bytes, joined, and whose special tokens are never in the text.

    The formats say how plain text is encoded and which bytes a token has; special tokens are cut out of
    the text here, and what lies between two of them is encoded on its own.
    """

    normalizes_special = True
    joins_bytes = True

    def __init__(
        self,
        added: Iterable[AddedToken],
        *,
        num_tokens: int,
        begin: Sequence[int] = (),
        end: Sequence[int] = (),
        drops_first_space: bool = False,
    ) -> None:
        """`begin` and `end` are put around a text where special tokens are to be added."""
        self._added = {token.content: token for token in added}
        self._by_id = {token.id: token for token in self._added.values()}
        self.special = {token.id: token.content for token in self._added.values() if token.special}
        self.template_only = frozenset(token.content for token in self._added.values() if token.template_only)
        self.vocab_size = max([num_tokens - 1, *self._by_id]) + 1
        self.drops_first_space = drops_first_space
        self._begin, self._end = tuple(begin), tuple(end)
        plain = [token for token in self._added.values() if not token.special]
        self._plain_pattern = _any_of(plain)
        self._text_pattern = _any_of([token for token in self._added.values() if not token.template_only])
        self._bytes_by_id: dict[int, bytes] = {}

    @abstractmethod
    def _encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        """Ids of a text in which nothing is an added token; `at_start`: nothing comes before it."""

    @abstractmethod
    def _plain_bytes(self, index: int) -> bytes:
        """The bytes of a token of the vocabulary; empty for an id that no token has."""

    def _normalize(self, text: str) -> str:
        """The text as added tokens are searched in it."""
        return text

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        text = self._normalize(checked(text))
        pieces = _cut(text, self._text_pattern) if parse_special else [(text, False)]
        ids = self._encode_pieces(pieces)
        return [*self._begin, *ids, *self._end] if add_special_tokens else ids

    def encode_owned(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        return self._encode_pieces(
            [(text if special else self._normalize(checked(text)), special) for text, special in pieces]
        )

    def _encode_pieces(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of pieces that are an added token each (True) or a text without special tokens (False)."""
        ids: list[int] = []
        for piece, is_added in pieces:
            for text, is_token in [(piece, True)] if is_added else _cut(piece, self._plain_pattern):
                if is_token:
                    ids.append(self._added[text].id)
                elif text:
                    ids += self._encode_plain(text, at_start=not ids)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text = b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.drops_first_space else text

    def token_bytes(self, index: int) -> bytes:
        known = self._bytes_by_id.get(index)
        if known is None:
            token = self._by_id.get(index)
            known = self._plain_bytes(index) if token is None else token.content.encode()
            self._bytes_by_id[index] = known
        return known


def checked(text: str) -> str:
    """The text itself. Raises RequestError for one that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        # JSON can spell it, UTF-8 cannot.
        raise RequestError("the text holds half of a surrogate pair, which is not a character") from None
    return text


def _any_of(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    texts = sorted((token.content for token in tokens if token.content), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _cut(text: str, pattern: re.Pattern[str] | None) -> list[tuple[str, bool]]:
    """The text as (piece, whether the pattern matched it)."""
    pieces, at = [], 0
    for match in pattern.finditer(text) if pattern is not None else ():
        pieces += [(text[at : match.start()], False), (match[0], True)]
        at = match.end()
    return [*pieces, (text[at:], False)]
