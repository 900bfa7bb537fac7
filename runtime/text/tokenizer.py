"""A model's tokenizer, read from its files, without transformers and without remote code."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from runtime.errors import FirstlightError, RequestError

if TYPE_CHECKING:
    import tokenizers

_CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenizerError(FirstlightError):
    """A model folder whose tokenizer files are missing, damaged or of an unsupported kind."""


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: the highest token id plus one; a model's embedding may have more rows.
        special_tokens: `bos_token`, `eos_token` and the like -> their text, as far as there are any.
        special_ids: ids of the tokens that mark structure; decoding leaves them out unless told not to.
        normalizes_special: whether text can become a special token that does not spell it exactly.
        bos_token_id: the id that a sequence begins with, or None.
        eos_token_ids: every id that ends a sequence, as the model's files name them between them.
        chat_templates: template name -> source; the one without a name is "default".
        joins_bytes: whether decoding is nothing but joining the tokens' bytes and reading UTF-8, as in
            byte-level BPE. Other decoders also look at a token's neighbours.
    """

    def __init__(self, backend: tokenizers.Tokenizer, files: dict[str, Any], template: str | None) -> None:
        """`files` holds the parsed configuration files by name, `template` chat_template.jinja's text."""
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self.normalizes_special = backend.normalizer is not None and any(
            token.special and token.normalized for token in added.values()
        )
        self.vocab_size = max([backend.get_vocab_size() - 1, *added]) + 1
        self.special_tokens = _special_tokens(files)
        self.bos_token_id = self._find_bos(files)
        self.eos_token_ids = self._find_eos(files)
        self.chat_templates = _chat_templates(files["tokenizer_config.json"], template)
        decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
        self.joins_bytes = decoder["type"] == "ByteLevel"
        self._decoder_steps = decoder.get("decoders", [decoder])
        self._bytes_by_id: dict[int, bytes] = {}

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the tokenizer in a model's folder. Raises TokenizerError, which names file and fault."""
        found = next((name for name in _LOADERS if (directory / name).is_file()), None)
        if found is None:
            raise TokenizerError(_describe_missing(directory))
        files = {name: _read_json(directory / name) for name in _CONFIG_FILES}
        template = directory / "chat_template.jinja"
        source = template.read_text(encoding="utf-8") if template.is_file() else None
        return cls(_LOADERS[found](directory / found), files, source)

    @property
    def chat_template(self) -> str | None:
        """The source of the template that is used unless another is asked for by name."""
        return self.chat_templates.get("default")

    # ---- text -> ids -------------------------------------------------------------------------

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_special_tokens` puts the bos token in front where the model's tokenizer does so;
        `parse_special` reads special tokens that are spelled out in the text as such, instead of as
        ordinary characters. Raises RequestError for text that UTF-8 cannot hold.
        """
        backend = self._backend if parse_special else self._guarded[0]
        return _encode(backend, text, add_special_tokens)

    def encode_owned(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of the pieces' concatenation, in which only pieces marked True are special tokens.

        A piece marked True is one special token's text. All other text is ordinary, whatever it
        spells, and gets the ids that `encode` would give it in that place. Nothing is put in front.
        """
        backend, alias_of, id_behind = self._guarded
        text = "".join(alias_of[piece] if special else piece for piece, special in pieces)
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
        for index, token in self._backend.get_added_tokens_decoder().items():
            if token.special:
                flags = {name: getattr(token, name) for name in _TOKEN_FLAGS}
                aliases[token.content] = AddedToken(f"alias{nonce}x{index}x", special=False, **flags)
        backend.add_tokens(list(aliases.values()))
        alias_of = {content: alias.content for content, alias in aliases.items()}
        id_behind = {_id_in(backend, alias): _id_in(backend, token) for token, alias in alias_of.items()}
        return backend, alias_of, id_behind

    @cached_property
    def _special_texts(self) -> list[str]:
        added = self._backend.get_added_tokens_decoder().values()
        return [token.content for token in added if token.special and token.content]

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Matches any special token's text, the longest first; None where there are no such tokens."""
        texts = sorted(self._special_texts, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts))) if texts else None

    @cached_property
    def special_prefixes(self) -> frozenset[str]:
        """Every text that some special token begins with, the tokens themselves left out."""
        return frozenset(text[:end] for text in self._special_texts for end in range(1, len(text)))

    def id_of(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary, or None."""
        return self._backend.token_to_id(token)

    # ---- ids -> text -------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; incomplete characters become U+FFFD, and ids that no token has nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, index: int) -> bytes:
        """The bytes that one token adds to a text; empty for an id that no token has."""
        known = self._bytes_by_id.get(index)
        if known is None:
            token = self._backend.id_to_token(index)
            known = self._bytes_by_id[index] = b"" if token is None else self._bytes_of(token)
        return known

    def token_text(self, index: int) -> str:
        """The text of one token; bytes that are no character on their own become U+FFFD."""
        return self.token_bytes(index).decode("utf-8", errors="replace")

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

    # ---- what the files say ------------------------------------------------------------------

    def _find_bos(self, files: dict[str, Any]) -> int | None:
        if bos := self.special_tokens.get("bos_token"):
            return self.id_of(bos)
        # A tokenizer_config.json without a bos token means that there is none, whatever config.json says.
        return None if files["tokenizer_config.json"] else files["config.json"].get("bos_token_id")

    def _find_eos(self, files: dict[str, Any]) -> tuple[int, ...]:
        found: list[int] = []
        for name in ("generation_config.json", "config.json"):
            value = files[name].get("eos_token_id")
            values = value if isinstance(value, list) else [value]
            found += [index for index in values if isinstance(index, int)]
        token = self.id_of(self.special_tokens.get("eos_token", ""))
        return tuple(dict.fromkeys(found if token is None else [*found, token]))


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte, as byte-level BPE spells bytes: printable ones as themselves, others from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _encode(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    try:
        return backend.encode(text, add_special_tokens=add_special_tokens).ids
    except TypeError:
        # Half of a surrogate pair: JSON can spell it, UTF-8 cannot.
        raise RequestError("the text holds half of a surrogate pair, which is not a character") from None


def _id_in(backend: tokenizers.Tokenizer, token: str) -> int:
    index = backend.token_to_id(token)
    if index is None:
        raise TokenizerError(f"the tokenizer did not take in the token {token!r}")
    return index


def _special_tokens(files: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL_NAMES:
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            value = files[file].get(name)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                found[name] = text
                break
    return found


def _chat_templates(config: dict[str, Any], template: str | None) -> dict[str, str]:
    value = config.get("chat_template")
    if isinstance(value, list):
        if not all(isinstance(item, dict) and {"name", "template"} <= item.keys() for item in value):
            raise TokenizerError(
                "tokenizer_config.json: a list of chat templates needs `name` and `template`"
            )
        found = {item["name"]: item["template"] for item in value}
    else:
        found = {"default": value} if isinstance(value, str) else {}
    return found if template is None else found | {"default": template}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: is not JSON: {error}; fetch the model again") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: must hold a JSON object")
    return content


def _load_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise TokenizerError(f"{path}: cannot be read as a tokenizer: {error}") from error


_LOADERS: dict[str, Callable[[Path], tokenizers.Tokenizer]] = {"tokenizer.json": _load_tokenizer_json}
"""File name -> what reads it, the preferred format first."""


def _describe_missing(directory: Path) -> str:
    patterns = ("*.tiktoken", "tokenizer.model", "*.spm", "vocab.json", "vocab.txt", "merges.txt")
    others = sorted(path.name for pattern in patterns for path in directory.glob(pattern))
    has = f"it holds {', '.join(others)}" if others else "it holds no tokenizer at all"
    return f"{directory}: no tokenizer in a supported format ({', '.join(_LOADERS)}); {has}"
