"""Vocabularies in the `tokenizers` package's own format, tokenizer.json."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.text.backend import TokenizerError, checked

if TYPE_CHECKING:
    import tokenizers

_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


# Below this, in characters, a batch's own cost is more than it saves others.
_LONG = 2000


class JsonBackend:
    """A tokenizer.json, read and run by `tokenizers`."""

    # What such a decoder drops, it drops itself.
    drops_first_space = False
    template_only: frozenset[str] = frozenset()

    def __init__(self, path: Path, special_ids: Collection[int] = ()) -> None:
        """`special_ids` mark structure although the file may not say so.

        Raises TokenizerError for a damaged file.
        """
        self._backend = _made_special(_load(path), special_ids)
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_id: int | None = None
        self.eos_id: int | None = None
        self._added = self._backend.get_added_tokens_decoder()
        self.special = {index: token.content for index, token in self._added.items() if token.special}
        self.normalizes_special = self._backend.normalizer is not None and any(
            self._added[index].normalized for index in self.special
        )
        self.vocab_size = max([self._backend.get_vocab_size() - 1, *self._added]) + 1
        state = self._backend.decoder.__getstate__() if self._backend.decoder else b'{"type": null}'
        decoder = json.loads(state)
        self.joins_bytes = decoder["type"] == "ByteLevel"
        self._decoder_steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
        self._bytes_by_id: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        plain = parse_special or not self._may_hold_special(text)
        backend = self._backend if plain else self._guarded[0]
        return _encode(backend, checked(text), add_special_tokens)

    def _may_hold_special(self, text: str) -> bool:
        """Whether special tokens in the text would be read as such, were they not guarded against."""
        return self.normalizes_special or (self._spelled is not None and bool(self._spelled.search(text)))

    @cached_property
    def _spelled(self) -> re.Pattern[str] | None:
        contents = sorted(filter(None, self.special.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, contents))) if contents else None

    def encode_owned(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        backend, alias_of, id_behind = self._guarded
        text = checked("".join(alias_of[piece] if special else piece for piece, special in pieces))
        return [id_behind.get(index, index) for index in _encode(backend, text, False)]

    @cached_property
    def _guarded(self) -> tuple[tokenizers.Tokenizer, dict[str, str], dict[int, int]]:
        """A second backend that takes special tokens for plain text, but for aliases nobody can guess.

        Returns it with alias by special token, and special token's id by alias id. Building it takes
        about as long as loading, so it waits until a text really spells a special token.
        """
        from tokenizers import AddedToken, Tokenizer

        backend = Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        nonce = secrets.token_hex(16)
        aliases: dict[str, AddedToken] = {}
        for index, content in self.special.items():
            flags = {name: getattr(self._added[index], name) for name in _TOKEN_FLAGS}
            aliases[content] = AddedToken(f"alias{nonce}x{index}x", special=False, **flags)
        backend.add_tokens(list(aliases.values()))
        alias_of = {content: alias.content for content, alias in aliases.items()}
        id_behind = {_id_in(backend, alias): _id_in(backend, token) for token, alias in alias_of.items()}
        return backend, alias_of, id_behind

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False)

    def token_bytes(self, index: int) -> bytes:
        known = self._bytes_by_id.get(index)
        if known is None:
            token = self._backend.id_to_token(index)
            known = self._bytes_by_id[index] = b"" if token is None else self._bytes_of(token)
        return known

    def _bytes_of(self, token: str) -> bytes:
        for step in self._decoder_steps:
            if step["type"] == "ByteLevel":
                codes = [_BYTE_OF.get(character) for character in token]
                return token.encode() if None in codes else bytes(code for code in codes if code is not None)
            if step["type"] == "ByteFallback" and (piece := _BYTE_PIECE.fullmatch(token)):
                return bytes.fromhex(piece[1])
            if step["type"] == "Metaspace":
                token = token.replace(step["replacement"], " ")
            if step["type"] == "Replace" and "String" in step["pattern"]:
                token = token.replace(step["pattern"]["String"], step["content"])
        return token.encode()

    def id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte, as byte-level BPE spells bytes: printable ones as themselves, others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _load(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise TokenizerError(f"{path}: cannot be read as a tokenizer: {error}") from error


def _made_special(backend: tokenizers.Tokenizer, ids: Collection[int]) -> tokenizers.Tokenizer:
    """The tokenizer with the tokens of these ids as special ones."""
    from tokenizers import Tokenizer

    added = backend.get_added_tokens_decoder()
    wanted = [index for index in ids if not (index in added and added[index].special)]
    tokens = [token for index in wanted if (token := backend.id_to_token(index)) is not None]
    if not tokens:
        return backend
    backend.add_special_tokens(tokens)
    # A token that was added as an ordinary one becomes special in its written form only.
    written = json.loads(backend.to_str())
    for token in written["added_tokens"]:
        token["special"] = token["special"] or token["content"] in tokens
    return Tokenizer.from_str(json.dumps(written))


def _encode(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    if len(text) < _LONG:
        return backend.encode(text, add_special_tokens=add_special_tokens).ids
    # `encode` holds Python's lock until it is through, and with it every stream of the server; this does not.
    (encoding,) = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    return encoding.ids


def _id_in(backend: tokenizers.Tokenizer, token: str) -> int:
    index = backend.token_to_id(token)
    if index is None:
        raise TokenizerError(f"the tokenizer did not take in the token {token!r}")
    return index
