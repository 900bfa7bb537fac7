"""Words that an answer must not contain, as the tokens that write them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from runtime.text.tokenizer import Tokenizer


class Bans(NamedTuple):
    """`tokens` that never come, and `sequences` of several that never come one after the other."""

    tokens: tuple[int, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()


NOTHING = Bans()


def bans(tokenizer: Tokenizer, words: Iterable[str]) -> Bans:
    """The words as they are written at the beginning of a text and behind a space.

    As in vLLM, that is how the tokenizer writes them; a model that spells a word letter by letter is not
    kept from it.
    """
    spelled: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ") or word
        for text in (bare, f" {bare}"):
            ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
            spelled[tuple(ids)] = None
    return Bans(
        tuple(ids[0] for ids in spelled if len(ids) == 1), tuple(ids for ids in spelled if len(ids) > 1)
    )
