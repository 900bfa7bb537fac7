"""Vocabularies in sentencepiece's format, BPE or unigram, encoded by sentencepiece itself."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from runtime.text.backend import AddedToken, JoiningBackend, TokenizerError
from runtime.text.sentencepiece_file import edited

_SPACE = "▁"


@dataclass(frozen=True, kw_only=True)
class SentencePieceRules:
    """What a model's other files, or its family's code, say about its vocabulary.

    Attributes:
        added: tokens with ids of their own, within the vocabulary or behind it.
        special_names, special_ids: pieces of the vocabulary that mark structure.
        appended: special tokens that follow the vocabulary's last piece.
        begin, end: tokens that are put around a text; None there is the file's own bos or eos.
        prefix_once: a space is put in front of a text at its very beginning only, not once more behind
            each added token.
    """

    added: Sequence[AddedToken] = ()
    special_names: Collection[str] = ()
    special_ids: Collection[int] = ()
    appended: Sequence[str] = ()
    begin: Sequence[str | None] = ()
    end: Sequence[str | None] = ()
    prefix_once: bool = False


class SentencePieceBackend(JoiningBackend):
    """A sentencepiece model and the tokens that belong to it besides.

    Tokens that mark structure are never found in plain text, also not where the file has them as pieces
    that a text may contain.
    """

    def __init__(self, path: Path, rules: SentencePieceRules) -> None:
        """Raises TokenizerError for a damaged file."""
        self._path = path
        self._prefix_once = rules.prefix_once
        self._model = path.read_bytes()
        self._pieces = self._load(self._model)
        self._size: int = self._pieces.vocab_size()
        self.bos_id, self.eos_id = _known(self._pieces.bos_id()), _known(self._pieces.eos_id())
        added = self._added_tokens(rules)
        if openly := [token.id for token in added if token.special and not self._is_closed(token.id)]:
            self._model = self._edit(control=openly)
            self._pieces = self._load(self._model)
        ids = {token.content: token.id for token in added}
        super().__init__(
            added,
            num_tokens=self._size,
            begin=_ids(rules.begin, ids, self.bos_id),
            end=_ids(rules.end, ids, self.eos_id),
            drops_first_space=self._pieces.normalize("a").startswith(_SPACE),
        )

    def _added_tokens(self, rules: SentencePieceRules) -> list[AddedToken]:
        pieces = self._pieces
        special = {index for index in range(self._size) if pieces.is_control(index)}
        special |= {index for name in rules.special_names if (index := self._id_of_piece(name)) is not None}
        # A byte stays one, whatever the files call it: characters are spelled with it.
        special |= {index for index in rules.special_ids if index < self._size and not pieces.is_byte(index)}
        special |= {index for index in (pieces.unk_id(),) if index >= 0}
        found = {index: AddedToken(pieces.id_to_piece(index), index) for index in special}
        for place, name in enumerate(rules.appended):
            index = self._size + place
            found[index] = AddedToken(name, index, template_only=name.isalpha())
        found |= {token.id: token for token in rules.added}
        # A text may have one meaning only, and what the files say about it counts.
        return list({token.content: token for token in found.values()}.values())

    def _is_closed(self, index: int) -> bool:
        """Whether no plain text is ever taken for the piece."""
        pieces = self._pieces
        return index >= self._size or pieces.is_control(index) or pieces.is_unknown(index)

    def _encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        pieces = self._unprefixed if self._prefix_once and not at_start else self._pieces
        ids: list[int] = pieces.encode(text)
        return ids

    @cached_property
    def _unprefixed(self) -> Any:
        return self._load(self._edit(dummy_prefix=False))

    def _plain_bytes(self, index: int) -> bytes:
        if not 0 <= index < self._size:
            return b""
        piece: str = self._pieces.id_to_piece(index)
        if self._pieces.is_byte(index):
            return bytes.fromhex(piece[3:5])  # <0xE4>
        return piece.replace(_SPACE, " ").encode()

    def id_of(self, token: str) -> int | None:
        return self._added[token].id if token in self._added else self._id_of_piece(token)

    def _id_of_piece(self, piece: str) -> int | None:
        index: int = self._pieces.piece_to_id(piece)
        return index if 0 <= index < self._size and self._pieces.id_to_piece(index) == piece else None

    # ---- the file ------------------------------------------------------------------------------

    def _load(self, model: bytes) -> Any:
        from sentencepiece import SentencePieceProcessor

        try:
            return SentencePieceProcessor(model_proto=model)
        except Exception as error:  # nothing narrower is promised
            raise self._damaged(error) from None

    def _edit(self, *, control: Collection[int] = (), dummy_prefix: bool = True) -> bytes:
        try:
            return edited(self._model, control=set(control), dummy_prefix=dummy_prefix)
        except ValueError as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> TokenizerError:
        return TokenizerError(
            f"{self._path}: cannot be read as a sentencepiece model: {error}; fetch it again"
        )


def _known(index: int) -> int | None:
    return index if index >= 0 else None


def _ids(tokens: Iterable[str | None], ids: dict[str, int], own: int | None) -> list[int]:
    """The ids of tokens, as far as there are any; `own` stands for None."""
    found = (own if token is None else ids.get(token) for token in tokens)
    return [index for index in found if index is not None]
