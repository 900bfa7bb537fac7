"""A model's tokenizer, read from its files, without transformers and without remote code."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Self

from runtime.text.backend import Backend, TokenizerError
from runtime.text.families import TextFamily, own_templates, text_family
from runtime.text.sentencepiece_file import is_sentencepiece
from runtime.text.tokenizer_files import TokenizerFiles
from runtime.text.tokenizer_json import JsonBackend
from runtime.text.tokenizer_sentencepiece import SentencePieceBackend, SentencePieceRules
from runtime.text.tokenizer_tiktoken import LLAMA3, QWEN, TiktokenBackend, is_tiktoken

__all__ = ["Tokenizer", "TokenizerError"]


class Tokenizer:
    """Text to token ids and back.

    Attributes:
        vocab_size: the highest token id plus one; a model's embedding may have more rows.
        special_tokens: `bos_token`, `eos_token` and the like -> their text, as far as there are any.
        special_ids: ids of the tokens that mark structure; decoding leaves them out unless told not to.
        normalizes_special: whether text can become a special token that does not spell it exactly.
        bos_token_id: the id that a sequence begins with, or None.
        eos_token_ids: every id that ends a sequence, as the model's files name them between them, and
            its family.
        chat_templates: template name -> source; the one without a name is "default". The family's own
            where the files hold none.
        joins_bytes: whether decoding is nothing but joining the tokens' bytes and reading UTF-8, as in
            byte-level BPE. Other decoders also look at a token's neighbours.
        drops_first_space: whether a decoded text that begins with a space loses that one.
    """

    def __init__(self, backend: Backend, files: TokenizerFiles, family: TextFamily) -> None:
        self._backend = backend
        self.special_ids = frozenset(backend.special)
        self.normalizes_special = backend.normalizes_special
        self.vocab_size = backend.vocab_size
        self.joins_bytes = backend.joins_bytes
        self.drops_first_space = backend.drops_first_space
        roles = {name: backend.special.get(index) for name, index in files.role_ids.items()}
        self.special_tokens = files.special_tokens | {name: text for name, text in roles.items() if text}
        self.bos_token_id = self._find_bos(files)
        self.eos_token_ids = self._find_eos(files, family)
        self.chat_templates = files.chat_templates or own_templates(files)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Read the tokenizer in a model's folder. Raises TokenizerError, which names file and fault."""
        files = TokenizerFiles.read(directory)
        family = text_family(files.config)
        return cls(_open_backend(directory, files, family), files, family)

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
        return self._backend.encode(text, add_special_tokens=add_special_tokens, parse_special=parse_special)

    def encode_owned(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of the pieces' concatenation, in which only pieces marked True are special tokens.

        A piece marked True is one special token's text. All other text is ordinary, whatever it
        spells, and gets the ids that `encode` would give it in that place. Nothing is put in front.
        """
        return self._backend.encode_owned(pieces)

    @cached_property
    def _special_texts(self) -> list[str]:
        return sorted(filter(None, self._backend.special.values()), key=len, reverse=True)

    @cached_property
    def special_pattern(self) -> re.Pattern[str] | None:
        """Matches what a template means as a special token, the longest first; None where there are none.

        A special token that is a mere word counts right behind another one only.
        """
        words, texts = self._backend.template_only, self._special_texts
        return _any_of(f"(?<=[]>]){text}" if text in words else re.escape(text) for text in texts)

    @cached_property
    def typed_pattern(self) -> re.Pattern[str] | None:
        """Matches any special token's text, the longest first; None where there are no such tokens."""
        return _any_of(map(re.escape, self._special_texts))

    @cached_property
    def special_prefixes(self) -> frozenset[str]:
        """Every text that some special token begins with, the tokens themselves and mere words left out."""
        texts = (text for text in self._special_texts if text not in self._backend.template_only)
        return frozenset(text[:end] for text in texts for end in range(1, len(text)))

    def id_of(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary, or None."""
        return self._backend.id_of(token)

    # ---- ids -> text -------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; incomplete characters become U+FFFD, and ids that no token has nothing."""
        skipped = self.special_ids if skip_special_tokens else ()
        return self._backend.decode([index for index in ids if index not in skipped])

    def token_bytes(self, index: int) -> bytes:
        """The bytes that one token adds to a text; empty for an id that no token has."""
        return self._backend.token_bytes(index)

    def token_text(self, index: int) -> str:
        """The text of one token; bytes that are no character on their own become U+FFFD."""
        return self.token_bytes(index).decode("utf-8", errors="replace")

    # ---- what the files say ------------------------------------------------------------------

    def _find_bos(self, files: TokenizerFiles) -> int | None:
        if bos := self.special_tokens.get("bos_token"):
            return self.id_of(bos)
        # A tokenizer_config.json without a bos token means that there is none, whatever others say.
        if files.tokenizer_config:
            return None
        named = files.config.get("bos_token_id")
        return named if isinstance(named, int) else self._backend.bos_id

    def _find_eos(self, files: TokenizerFiles, family: TextFamily) -> tuple[int, ...]:
        named = [self.special_tokens.get("eos_token", ""), *family.stops]
        found = [*files.eos_ids, self._backend.eos_id, *map(self.id_of, named)]
        return tuple(dict.fromkeys(index for index in found if index is not None))


def _any_of(patterns: Iterable[str]) -> re.Pattern[str] | None:
    joined = "|".join(patterns)
    return re.compile(joined) if joined else None


def _open_backend(directory: Path, files: TokenizerFiles, family: TextFamily) -> Backend:
    """The vocabulary in a model's folder, in the preferred format where there are several."""
    path = directory / "tokenizer.json"
    if path.is_file():
        return JsonBackend(path, files.role_ids.values())
    for path in (directory / "tokenizer.model", *sorted(directory.glob("*.tiktoken"))):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            beginning = file.read(1024)
        if is_tiktoken(beginning):
            return _open_tiktoken(path, files, family)
        if is_sentencepiece(beginning):
            return _open_sentencepiece(path, files, family)
        raise TokenizerError(f"{path}: is neither a sentencepiece model nor in tiktoken's format")
    raise TokenizerError(_describe_missing(directory))


def _open_tiktoken(path: Path, files: TokenizerFiles, family: TextFamily) -> Backend:
    rules = family.tiktoken
    model_type = files.config.get("model_type")
    if rules is None and model_type is None:
        rules = QWEN if path.suffix == ".tiktoken" else LLAMA3
    if rules is None:
        raise TokenizerError(
            f"{path}: is in tiktoken's format, whose rules for {model_type!r} are not known here; "
            "put the model's tokenizer.json beside it"
        )
    return TiktokenBackend(path, rules, files.added, add_bos=files.tokenizer_config.get("add_bos_token"))


def _open_sentencepiece(path: Path, files: TokenizerFiles, family: TextFamily) -> Backend:
    config = files.tokenizer_config
    bos, eos = files.special_tokens.get("bos_token"), files.special_tokens.get("eos_token")
    adds_bos = config.get("add_bos_token", None in family.begin)
    rules = SentencePieceRules(
        added=files.added,
        special_names={*files.special_names, *family.special},
        special_ids={*files.role_ids.values(), *files.eos_ids},
        appended=family.appended,
        begin=[token for token in family.begin if token is not None] + ([bos] if adds_bos else []),
        end=[eos] if config.get("add_eos_token", False) else [],
        prefix_once=config.get("legacy") is False,
    )
    return SentencePieceBackend(path, rules)


def _describe_missing(directory: Path) -> str:
    patterns = ("*.spm", "spiece.model", "vocab.json", "vocab.txt", "merges.txt")
    others = sorted(path.name for pattern in patterns for path in directory.glob(pattern))
    has = f"it holds {', '.join(others)}" if others else "it holds no tokenizer at all"
    supported = "tokenizer.json, tokenizer.model, *.tiktoken"
    return f"{directory}: no tokenizer in a supported format ({supported}); {has}"
