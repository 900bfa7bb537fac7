"""Vocabularies in tiktoken's format against tiktoken, set up as each family's own code does."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from tiktoken.load import load_tiktoken_bpe

from runtime.errors import RequestError
from runtime.text.tokenizer import Tokenizer, TokenizerError
from tests.runtime.text.texts import ORDINARY, TEXTS
from tests.runtime.text.vocabularies import LLAMA3_PATTERN, QWEN_PATTERN, llama3, qwen, write

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>"]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(4)]
LLAMA3_SPECIAL += ["<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"]
LLAMA3_SPECIAL += [f"<|reserved_special_token_{i}|>" for i in range(5, 256 - 5)]
Pair = tuple[Tokenizer, Callable[[str], list[int]], tiktoken.Encoding]


def reference(path: Path, pattern: str, special: list[str]) -> tiktoken.Encoding:
    ranks = load_tiktoken_bpe(str(path))
    tokens = {token: len(ranks) + place for place, token in enumerate(special)}
    return tiktoken.Encoding("reference", pat_str=pattern, mergeable_ranks=ranks, special_tokens=tokens)


@pytest.fixture(scope="module")
def pairs(family_folders: dict[str, Path]) -> dict[str, Pair]:
    """Family -> our tokenizer, how its own one normalizes a text, and tiktoken with its settings."""
    qwen_file, llama_file = (
        family_folders["qwen"] / "qwen.tiktoken",
        family_folders["llama3"] / "tokenizer.model",
    )
    return {
        "qwen": (
            Tokenizer.load(family_folders["qwen"]),
            lambda text: unicodedata.normalize("NFC", text),
            reference(qwen_file, QWEN_PATTERN, QWEN_SPECIAL),
        ),
        "llama3": (
            Tokenizer.load(family_folders["llama3"]),
            lambda text: text,
            reference(llama_file, LLAMA3_PATTERN, LLAMA3_SPECIAL),
        ),
    }  # type: ignore[dict-item]


@pytest.mark.parametrize("family", ["qwen", "llama3"])
class TestAgainstTiktoken:
    @pytest.mark.parametrize("text", ORDINARY)
    def test_ordinary_text(self, pairs: dict[str, Pair], family: str, text: str) -> None:
        ours, normalized, theirs = pairs[family]
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == theirs.encode(normalized(text))
        assert ours.decode(ids) == theirs.decode(ids) == normalized(text)

    @settings(max_examples=200, deadline=None)
    @given(text=TEXTS)
    def test_any_text(self, pairs: dict[str, Pair], family: str, text: str) -> None:
        ours, normalized, theirs = pairs[family]
        whole = normalized(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(whole, allowed_special="all")
        ids = ours.encode(text, add_special_tokens=False, parse_special=False)
        assert ids == theirs.encode_ordinary(whole)

    def test_every_token(self, pairs: dict[str, Pair], family: str) -> None:
        ours, _, theirs = pairs[family]
        assert ours.vocab_size == theirs.n_vocab
        for index in range(theirs.n_vocab):
            raw = theirs.decode_single_token_bytes(index)
            assert ours.token_bytes(index) == raw
            if raw.isascii():
                assert ours.id_of(raw.decode()) == index
        assert ours.special_ids == {theirs.encode_single_token(token) for token in theirs.special_tokens_set}
        assert ours.token_bytes(theirs.n_vocab) == b""
        assert ours.id_of("<|nothing|>") is None

    def test_a_special_token_in_pieces_is_one_only_where_marked(
        self, pairs: dict[str, Pair], family: str
    ) -> None:
        ours, _, theirs = pairs[family]
        token = sorted(theirs.special_tokens_set)[0]
        ids = ours.encode_owned([("a " + token, False), (token, True), (token + " b", False)])
        own = theirs.encode_single_token(token)
        assert ids == [*theirs.encode_ordinary("a " + token), own, *theirs.encode_ordinary(token + " b")]


def test_qwen_composes_before_it_splits(pairs: dict[str, Pair]) -> None:
    ours = pairs["qwen"][0]
    assert ours.encode("Gru\u0308ße e\u0323\u0302") == ours.encode("Grüße \u1ec7")
    assert ours.encode_owned([("Gru\u0308ße", False)]) == ours.encode("Grüße")


def test_what_begins_a_text(pairs: dict[str, Pair], tmp_path: Path) -> None:
    qwen_ours, llama_ours = pairs["qwen"][0], pairs["llama3"][0]
    assert qwen_ours.encode("") == []
    assert qwen_ours.bos_token_id is None
    begin = pairs["llama3"][2].encode_single_token("<|begin_of_text|>")
    assert llama_ours.encode("") == [begin]
    assert llama_ours.bos_token_id == begin
    without = write(llama3() | {"tokenizer_config.json": {"add_bos_token": False}}, tmp_path)
    assert Tokenizer.load(without).encode("") == []


def test_names_in_the_files_win(pairs: dict[str, Pair], tmp_path: Path) -> None:
    ids = {
        name: pairs["llama3"][2].encode_single_token(f"<|reserved_special_token_{name}|>") for name in (2, 3)
    }
    decoder = {
        str(ids[2]): {"content": "<|finetune_right_pad_id|>", "special": True},
        str(ids[3]): {"content": "<tool>", "special": False},
    }
    config = {"added_tokens_decoder": decoder, "eos_token": "<|eot_id|>"}
    ours = Tokenizer.load(write(llama3() | {"tokenizer_config.json": config}, tmp_path))
    text = "a<|finetune_right_pad_id|><tool>"
    assert ours.encode(text)[-2:] == [ids[2], ids[3]]
    assert ours.encode(text, parse_special=False)[-1] == ids[3]
    assert ids[2] not in ours.encode(text, parse_special=False)
    assert ours.decode([ids[2], ids[3]]) == "<tool>"
    assert ours.id_of("<|reserved_special_token_2|>") is None
    assert ours.id_of("<|eot_id|>") in ours.eos_token_ids


def test_endless_white_space_is_refused(pairs: dict[str, Pair]) -> None:
    for ours, _, theirs in pairs.values():
        assert ours.encode(" " * 100_000, add_special_tokens=False) == theirs.encode(" " * 100_000)
        with pytest.raises(RequestError, match="white space"):
            ours.encode(" " * 2_000_000 + "x")
        assert len(ours.encode("x\n" * 400_000)) >= 400_000


class TestFiles:
    def test_tokenizer_json_has_priority(
        self, folders: dict[str, Path], family_folders: dict[str, Path], tmp_path: Path
    ) -> None:
        shutil.copytree(family_folders["qwen"], tmp_path, dirs_exist_ok=True)
        shutil.copy(folders["chatml"] / "tokenizer.json", tmp_path)
        expected = Tokenizer.load(folders["chatml"]).encode("Hello, world!")
        assert Tokenizer.load(tmp_path).encode("Hello, world!") == expected

    def test_without_a_configuration_the_name_tells(
        self, pairs: dict[str, Pair], family_folders: dict[str, Path], tmp_path: Path
    ) -> None:
        for family, name in (("qwen", "qwen.tiktoken"), ("llama3", "tokenizer.model")):
            (tmp_path / family).mkdir()
            shutil.copy(family_folders[family] / name, tmp_path / family)
            ours = Tokenizer.load(tmp_path / family)
            assert ours.encode("In 123456 e\u0301") == pairs[family][0].encode("In 123456 e\u0301")

    def test_unknown_families_are_refused(self, tmp_path: Path) -> None:
        write(llama3() | {"config.json": {"model_type": "other"}}, tmp_path)
        with pytest.raises(TokenizerError, match=r"tokenizer\.model.*'other'.*tokenizer\.json"):
            Tokenizer.load(tmp_path)

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda raw: raw[: len(raw) // 2] + b"!\n", "line"),
            (lambda raw: raw + b"QUFBQQ==\n", "line"),
            (lambda raw: raw + raw.splitlines(keepends=True)[-1], "ranks"),
            (
                lambda raw: b"".join(line for line in raw.splitlines(keepends=True)[:-1]) + b"QQ== 999\n",
                "ranks",
            ),
            (lambda raw: b"QQ== 0\nQg== 1\n", "byte 0x00"),
            (lambda raw: b"hello", "neither"),
            (lambda raw: b"", "neither"),
        ],
    )
    def test_damaged_files_are_named(
        self, tmp_path: Path, damage: Callable[[bytes], bytes], message: str
    ) -> None:
        files = qwen()
        files["qwen.tiktoken"] = damage(files["qwen.tiktoken"])
        with pytest.raises(TokenizerError, match=rf"qwen\.tiktoken.*{message}"):
            Tokenizer.load(write(files, tmp_path))
