"""Incremental decoding against decoding everything at once."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.text.detokenizer import Detokenizer
from runtime.text.tokenizer import Tokenizer
from tests.runtime.text.texts import ORDINARY, TEXTS


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path], family_folders: dict[str, Path]) -> dict[str, Tokenizer]:
    both = (*folders.items(), *((f"{name} family", folder) for name, folder in family_folders.items()))
    return {name: Tokenizer.load(folder) for name, folder in both}


def chunks(ids: list[int], cuts: list[int]) -> list[list[int]]:
    marks = sorted({0, len(ids), *(cut % (len(ids) + 1) for cut in cuts)})
    return [ids[start:end] for start, end in pairwise(marks)]


def streamed(
    tokenizer: Tokenizer, parts: list[list[int]], skip: bool, prompt: list[int] | None = None
) -> str:
    stream = Detokenizer(tokenizer, skip_special_tokens=skip, prompt_ids=prompt or ())
    return "".join([stream.push(part) for part in parts]) + stream.flush()


CUTS = st.lists(st.integers(0, 400), max_size=8)


@settings(max_examples=150, deadline=None)
@given(seeds=st.lists(st.integers(0, 1 << 20), max_size=40), cuts=CUTS, skip=st.booleans())
def test_random_ids_of_byte_level_tokenizers(
    loaded: dict[str, Tokenizer], seeds: list[int], cuts: list[int], skip: bool
) -> None:
    for tokenizer in loaded.values():
        if tokenizer.joins_bytes:
            ids = [seed % (tokenizer.vocab_size + 2) for seed in seeds]
            whole = tokenizer.decode(ids, skip_special_tokens=skip)
            assert streamed(tokenizer, chunks(ids, cuts), skip) == whole


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, cuts=CUTS, skip=st.booleans())
def test_texts_of_all_tokenizers(
    loaded: dict[str, Tokenizer], text: str, cuts: list[int], skip: bool
) -> None:
    for tokenizer in loaded.values():
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids, skip_special_tokens=skip)
        assert streamed(tokenizer, chunks(ids, cuts), skip) == whole
        assert streamed(tokenizer, [[index] for index in ids], skip) == whole


@settings(max_examples=100, deadline=None)
@given(before=TEXTS, after=TEXTS)
def test_text_after_a_prompt_is_what_it_adds(loaded: dict[str, Tokenizer], before: str, after: str) -> None:
    for tokenizer in loaded.values():
        prompt = tokenizer.encode(before + " x")
        ids = tokenizer.encode("y " + after, add_special_tokens=False)
        whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=False)
        added = whole[len(tokenizer.decode(prompt, skip_special_tokens=False)) :]
        assert streamed(tokenizer, [[index] for index in ids], False, prompt) == added


@pytest.mark.parametrize("text", ORDINARY)
def test_no_broken_character_on_the_way(loaded: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in loaded.values():
        stream = Detokenizer(tokenizer)
        emitted = ""
        ids = tokenizer.encode(text)
        whole = tokenizer.decode(ids)
        for index in ids:
            emitted += stream.push([index])
            assert whole.startswith(emitted)
        assert emitted + stream.flush() == whole


def test_an_incomplete_character_shows_at_the_end(loaded: dict[str, Tokenizer]) -> None:
    for tokenizer in loaded.values():
        first = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xf0")
        stream = Detokenizer(tokenizer)
        assert stream.push([*tokenizer.encode("fox"), first]) == "fox"
        assert stream.flush() == "\ufffd"


def test_wrong_bytes_are_not_held_for_ever(loaded: dict[str, Tokenizer]) -> None:
    for tokenizer in loaded.values():
        wrong = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\x80")
        assert set(Detokenizer(tokenizer).push([wrong] * 50)) == {"\ufffd"}


def test_text_goes_on_after_wrong_bytes(loaded: dict[str, Tokenizer]) -> None:
    for tokenizer in loaded.values():
        first = next(i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i) == b"\xe4")
        ids = tokenizer.encode("你 fox", add_special_tokens=False)
        broken = [*tokenizer.encode("世", add_special_tokens=False), first, *ids]
        assert streamed(tokenizer, [[index] for index in broken], True).endswith(" fox")
