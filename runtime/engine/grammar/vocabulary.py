"""The model's vocabulary as llguidance takes it, whatever format the model's tokenizer has."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Tokens that are allowed or not all at once, which saves looking at each: white space, and what may stand in
# a JSON string, by length, as schemas bound that.
_IN_STRING = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_IN_STRING}{{1,{most}}}" for most in (4, 8, 12, 16, 30)),
    f"{_IN_STRING}+",
]
# What hardly any vocabulary joins with what follows, so that a text behind it is cut as it is alone.
_BREAK = "\n"
_MAX_SPELLED = 4096
_TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class Vocabulary:
    """A model's tokens; `special` are the texts of those that mark structure."""

    tokens: LLTokenizer
    special: dict[int, str]


def read_vocabulary(directory: Path, vocab_size: int) -> Generator[None, None, Vocabulary]:
    """The vocabulary of the model in a folder, of as many ids as the model has logits, and one more.

    That one stands for the end: a mask has its bit where the answer may end. Which ids end a sequence is
    each request's own affair, so all of the model's ids are ordinary here, or special.
    It is read in parts, none of which takes longer than the package that has to do it.
    """
    from llguidance import LLTokenizer

    yield
    tokenizer = Tokenizer.load(directory)
    tokens: list[bytes] = []
    while len(tokens) < vocab_size:
        yield
        until = min(len(tokens) + _TOKENS_AT_ONCE, vocab_size)
        tokens += [tokenizer.token_bytes(index) for index in range(len(tokens), until)]
    yield
    special = sorted(index for index in tokenizer.special_ids if index < vocab_size)
    found: LLTokenizer | None = None

    def greedily(text: str) -> list[int]:
        assert found is not None  # nothing is tokenized while the vocabulary is being built
        return found.greedy_tokenize(text)

    wrapper = _Wrapper(tokenizer, tokens, special, greedily)
    found = LLTokenizer(wrapper, slices=_SLICES)  # type: ignore[arg-type]  # it has all that is asked for
    return Vocabulary(found, {index: tokenizer.token_text(index) for index in special})


class _Wrapper:
    """What `LLTokenizer` asks for: the tokens, and how a text that a grammar forces is spelled in them."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(
        self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], greedily: Callable[[str], Any]
    ) -> None:
        self.tokens = [*tokens, b""]
        self.eos_token_id = len(tokens)
        self.special_token_ids = special
        self._tokenizer = tokenizer
        self._greedily = greedily
        self._spelled = lru_cache(_MAX_SPELLED)(self._spell)

    def __call__(self, text: str) -> list[int]:
        """The tokens that the model would write the text with. They add up to exactly that text.

        The same few texts come again and again, whenever an answer gets to where they are forced.
        """
        return self._spelled(text)

    def _spell(self, text: str) -> list[int]:
        for before in ("", _BREAK):
            ids = self._encode(before + text)
            spelled = [self.tokens[index] for index in ids]
            # Many sentencepiece vocabularies put a space in front of any text.
            lead = len(b"".join(spelled)) - len(text.encode())
            while lead > 0 and spelled:
                lead -= len(spelled.pop(0))
            if lead == 0 and b"".join(spelled) == text.encode():
                return ids[len(ids) - len(spelled) :]
        return list(self._greedily(text))

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        return ids if all(index < self.eos_token_id for index in ids) else []
