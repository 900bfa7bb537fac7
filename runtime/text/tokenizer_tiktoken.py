"""Vocabularies in tiktoken's format: one line a token, its bytes in base64 and its rank, which is its id.

The file knows neither the rule that splits a text before the merges nor the special tokens, which
follow the ranks: both are known by family. tiktoken itself does the encoding.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import RequestError
from runtime.text.backend import AddedToken, JoiningBackend, TokenizerError

_FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")
# tiktoken's regular expressions walk back through a run of white space, and give up near a million.
_LONGEST_SPACE = 500_000
_LONG_SPACE = re.compile(rf"\s{{{_LONGEST_SPACE}}}")

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class TiktokenRules:
    """What a family's code says about its vocabulary.

    Attributes:
        pattern: the regular expression that splits a text into what is merged on its own.
        special: the special tokens, from the first id behind the ranks on.
        bos, eos: those of them that begin and end a text.
        normalize: what is done to a text first.
    """

    pattern: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    normalize: Callable[[str], str] = str


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


QWEN = TiktokenRules(
    pattern="|".join((_CONTRACTIONS, _WORDS, r"\p{N}", _REST)),
    special=("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))),
    bos=None,
    eos="<|endoftext|>",
    normalize=_nfc,
)
LLAMA3 = TiktokenRules(
    pattern="|".join((_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _REST)),
    special=(
        "<|begin_of_text|>",
        "<|end_of_text|>",
        *(f"<|reserved_special_token_{i}|>" for i in range(4)),
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|reserved_special_token_4|>",
        "<|eot_id|>",
        *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
    ),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
)


def is_tiktoken(beginning: bytes) -> bool:
    """Whether a file that begins so is in this format."""
    return _FIRST_LINE.match(beginning) is not None


class TiktokenBackend(JoiningBackend):
    """A family's vocabulary, encoded by tiktoken."""

    def __init__(
        self, path: Path, rules: TiktokenRules, added: Sequence[AddedToken] = (), *, add_bos: bool | None
    ) -> None:
        """`added` are what the model's other files say about special tokens; they win over the family's.

        `add_bos` None stands for what the family does. Raises TokenizerError for a damaged file.
        """
        import tiktoken

        ranks = _read_ranks(path)
        first = max(ranks.values()) + 1
        named = {token.id for token in added}
        own = [AddedToken(name, first + place) for place, name in enumerate(rules.special)]
        known = [token for token in own if token.id not in named]
        ids = {token.content: token.id for token in (*known, *added)}
        self.bos_id = None if rules.bos is None else ids.get(rules.bos)
        self.eos_id = ids.get(rules.eos)
        begins = self.bos_id is not None and add_bos is not False
        super().__init__(
            [*known, *added],
            num_tokens=first,
            begin=(self.bos_id,) if begins and self.bos_id is not None else (),
        )
        self._rules = rules
        self._encoding = tiktoken.Encoding(
            path.name, pat_str=rules.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def _normalize(self, text: str) -> str:
        return self._rules.normalize(text)

    def _encode_plain(self, text: str, *, at_start: bool) -> list[int]:
        if len(text) >= _LONGEST_SPACE and _LONG_SPACE.search(text):
            raise RequestError(f"the text holds {_LONGEST_SPACE} characters of white space in a row")
        return self._encoding.encode_ordinary(text)

    def _plain_bytes(self, index: int) -> bytes:
        try:
            return self._encoding.decode_single_token_bytes(index)
        except (KeyError, OverflowError):
            return b""

    def id_of(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token].id
        try:
            return self._encoding.encode_single_token(token)
        except KeyError:
            return None


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Bytes -> rank. Raises TokenizerError for lines that are none, and for tokens that are missing."""
    ranks: dict[bytes, int] = {}
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise TokenizerError(
                f"{path}, line {number}: is not a token in base64 and its rank; fetch the model again"
            ) from None
    if sorted(ranks.values()) != list(range(len(lines))):
        raise TokenizerError(f"{path}: its ranks are not 0 to {len(lines) - 1}, each once")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise TokenizerError(f"{path}: has no token for the byte {missing[0]:#04x}; fetch the model again")
    return ranks
