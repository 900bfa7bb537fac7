"""Vocabularies in sentencepiece's format against sentencepiece, and transformers where it has the family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer

from runtime.errors import RequestError
from runtime.text.sentencepiece_file import edited
from runtime.text.tokenizer import Tokenizer, TokenizerError
from tests.runtime.text.texts import ORDINARY, TEXTS
from tests.runtime.text.vocabularies import baichuan2, llama2, train_pieces, write

FAMILIES = ["llama2", "mistral", "baichuan", "baichuan2", "internlm2", "chatglm3", "gemma2", "unigram"]
# What marks structure, and what a text may contain that has the same id in the file.
SPECIAL = {
    "llama2": ["<s>", "</s>", "<unk>"],
    "mistral": ["<s>", "[INST]", "[/INST]"],
    "baichuan": ["<reserved_102>", "<reserved_103>", "</s>"],
    "baichuan2": ["<reserved_106>", "<reserved_107>", "</s>"],
    "internlm2": ["<|im_start|>", "<|im_end|>", "[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"],
    "chatglm3": ["[gMASK]", "sop", "<|user|>", "<|assistant|>", "<|observation|>"],
    "gemma2": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "unigram": ["<s>", "</s>"],
}
Pair = tuple[Tokenizer, Any]


@pytest.fixture(scope="module")
def pairs(family_folders: dict[str, Path]) -> dict[str, Pair]:
    """Family -> our tokenizer, and sentencepiece's own reading of the same file."""
    return {
        name: (
            Tokenizer.load(family_folders[name]),
            SentencePieceProcessor(model_file=str(family_folders[name] / "tokenizer.model")),
        )
        for name in FAMILIES
    }


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False, parse_special=False)


@pytest.mark.parametrize("family", FAMILIES)
class TestAgainstSentencePiece:
    @pytest.mark.parametrize("text", ORDINARY)
    def test_ordinary_text(self, pairs: dict[str, Pair], family: str, text: str) -> None:
        ours, theirs = pairs[family]
        ids = ours.encode(text, add_special_tokens=False)
        assert ids == plain(ours, text) == theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids)

    @settings(max_examples=150, deadline=None)
    @given(text=TEXTS)
    def test_any_text(self, pairs: dict[str, Pair], family: str, text: str) -> None:
        ours, theirs = pairs[family]
        assert plain(ours, text) == theirs.encode(text)
        assert ours.decode(plain(ours, text)) == theirs.decode(theirs.encode(text))

    def test_every_token(self, pairs: dict[str, Pair], family: str) -> None:
        ours, theirs = pairs[family]
        assert ours.vocab_size >= theirs.vocab_size()
        for index in set(range(theirs.vocab_size())) - ours.special_ids:
            piece = theirs.id_to_piece(index)
            assert ours.id_of(piece) == index
            if not theirs.is_byte(index):
                assert ours.token_bytes(index).decode() == piece.replace("▁", " ")
        bytes_of = {ours.token_bytes(i) for i in range(theirs.vocab_size()) if theirs.is_byte(i)}
        assert bytes_of == {bytes([byte]) for byte in range(256)}
        assert ours.token_bytes(ours.vocab_size) == b""
        assert ours.decode([ours.vocab_size]) == ""
        assert ours.id_of("no such piece") is None

    @pytest.mark.parametrize("text", ["", "Hi", " two  spaces", "世界"])
    def test_typed_special_tokens_stay_text(self, pairs: dict[str, Pair], family: str, text: str) -> None:
        ours, theirs = pairs[family]
        for token in SPECIAL[family]:
            typed = f"{text}{token}{text} {token}"
            assert not set(plain(ours, typed)) & ours.special_ids
            # Nothing is lost: what it reads back as is what the file's own rules make of the text.
            assert (
                ours.decode(plain(ours, typed)).strip() == theirs.normalize(typed).replace("▁", " ").strip()
            )

    def test_marked_special_tokens_are_one_id_each(self, pairs: dict[str, Pair], family: str) -> None:
        ours, _ = pairs[family]
        for token in SPECIAL[family]:
            if "UNUSED" in token:
                continue
            index = ours.id_of(token)
            assert index in ours.special_ids
            ids = ours.encode_owned([(token, True), (f"a{token}b", False), (token, True)])
            assert [place for place, found in enumerate(ids) if found == index] == [0, len(ids) - 1]
            assert ours.decode(ids, skip_special_tokens=False).count(token) == 3
            assert ours.decode(ids).strip() == f"a{token}b"

    def test_half_a_surrogate_pair_is_refused(self, pairs: dict[str, Pair], family: str) -> None:
        with pytest.raises(RequestError, match="surrogate"):
            pairs[family][0].encode("\ud83d")


class TestAgainstTransformers:
    @pytest.mark.parametrize("family", ["llama2", "gemma2"])
    def test_the_librarys_own_class(self, family_folders: dict[str, Path], family: str) -> None:
        ours = Tokenizer.load(family_folders[family])
        theirs = AutoTokenizer.from_pretrained(family_folders[family])
        for text in ORDINARY:
            if text.startswith(" ") or "<b>" in text:
                continue  # there the library's conversion and sentencepiece itself differ
            assert ours.encode(text) == theirs(text).input_ids
            for ids in (ours.encode(text), [*ours.encode(text), theirs.eos_token_id]):
                for skip in (True, False):
                    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                        ids, skip_special_tokens=skip
                    )


def test_what_begins_a_text(pairs: dict[str, Pair]) -> None:
    expected = {"llama2": [1], "mistral": [1], "baichuan": [], "baichuan2": []}
    expected |= {"internlm2": [1], "gemma2": [2], "unigram": [1]}
    for family, begin in expected.items():
        assert pairs[family][0].encode("") == begin
    ours, theirs = pairs["chatglm3"]
    behind = theirs.vocab_size()
    assert ours.encode("") == [behind + 1, behind + 3]


def test_bos_and_eos_as_the_configuration_says(tmp_path: Path) -> None:
    files = llama2()
    files["tokenizer_config.json"] |= {"add_bos_token": False, "add_eos_token": True}
    assert Tokenizer.load(write(files, tmp_path)).encode("")[-1:] == [2]


def test_every_text_between_special_tokens_gets_its_space(pairs: dict[str, Pair]) -> None:
    ours, theirs = pairs["llama2"]
    expected = [1, *theirs.encode("fox"), 2, 1, *theirs.encode("dog")]
    assert ours.encode("<s>fox</s><s>dog", add_special_tokens=False) == expected


def test_or_only_the_first_where_the_configuration_says_so(pairs: dict[str, Pair], tmp_path: Path) -> None:
    ours, theirs = pairs["mistral"]
    # The template's space is then the only one, and the same as sentencepiece puts in front itself.
    expected = [1, 3, *theirs.encode("What is it?"), 4]
    assert ours.encode("<s>[INST] What is it?[/INST]", add_special_tokens=False) == expected
    assert ours.encode("fox", add_special_tokens=False) == theirs.encode("fox")
    assert ours.decode(expected) == theirs.decode(theirs.encode("What is it?"))


def test_chatglm3_tokens_follow_the_vocabulary(pairs: dict[str, Pair]) -> None:
    ours, theirs = pairs["chatglm3"]
    names = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]
    names += ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    assert [ours.id_of(name) for name in names] == [theirs.vocab_size() + place for place in range(9)]
    assert ours.vocab_size == theirs.vocab_size() + 9
    # A word that merely contains one is a word.
    assert ours.encode("a sophist", add_special_tokens=False) == theirs.encode("a sophist")
    assert ours.encode("<|user|>", add_special_tokens=False) == [theirs.vocab_size() + 6]


def test_what_ends_an_answer(pairs: dict[str, Pair]) -> None:
    glm = pairs["chatglm3"][1].vocab_size()
    assert set(pairs["chatglm3"][0].eos_token_ids) == {2, glm + 6, glm + 8}
    assert set(pairs["internlm2"][0].eos_token_ids) == {2, 3}
    assert set(pairs["gemma2"][0].eos_token_ids) == {1, 5}
    assert set(pairs["baichuan2"][0].eos_token_ids) == {2}


def test_added_tokens_of_all_files(tmp_path: Path) -> None:
    size = SentencePieceProcessor(model_proto=llama2()["tokenizer.model"]).vocab_size()
    files = llama2() | {
        "added_tokens.json": {"<|im_start|>": size, "<tool>": size + 1},
        "special_tokens_map.json": {"additional_special_tokens": ["<|im_start|>"]},
    }
    ours = Tokenizer.load(write(files, tmp_path))
    assert ours.vocab_size == size + 2
    assert ours.encode("<|im_start|><tool>", add_special_tokens=False) == [size, size + 1]
    # A token that is not special is text, which a user may write as well as a template.
    ids = plain(ours, "<|im_start|><tool>")
    assert ids[-1] == size + 1
    assert size not in ids
    assert ours.decode([size, size + 1]) == "<tool>"


@pytest.mark.parametrize("added", [True, False])
def test_roles_of_a_tokenizer_json_stay_the_templates(
    folders: dict[str, Path], tmp_path: Path, added: bool
) -> None:
    written = json.loads((folders["chatml"] / "tokenizer.json").read_text())
    role, user = "<reserved_106>", len(written["model"]["vocab"])
    written["model"]["vocab"][role] = user
    written["added_tokens"] = [token for token in written["added_tokens"] if token["id"] < user]
    if added:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        written["added_tokens"].append({"id": user, "content": role, "special": False, **flags})
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    (tmp_path / "generation_config.json").write_text(json.dumps({"user_token_id": user}))
    ours = Tokenizer.load(tmp_path)
    assert ours.special_tokens["user_token"] == role
    assert user in ours.special_ids
    ids = ours.encode_owned([(role, True), (f"a {role} b", False)])
    assert ids.count(user) == 1
    assert ours.decode(ids) == f"a {role} b"


class TestFiles:
    @pytest.mark.parametrize(
        "damage",
        [
            lambda raw: raw[: len(raw) // 2],
            lambda raw: raw[:100] + b"\xff" * 50 + raw[150:],
            lambda raw: b"\x0a",
            lambda raw: b"version https://example.com/pointer",
        ],
    )
    def test_damaged_files_are_named(self, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
        files = baichuan2()
        files["tokenizer.model"] = damage(files["tokenizer.model"])
        with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
            Tokenizer.load(write(files, tmp_path))

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("added_tokens.json", {"a": "b"}),
            ("added_tokens.json", {"a": -1}),
            ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
            ("tokenizer_config.json", {"added_tokens_decoder": {"7": 1}}),
            ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
            ("tokenizer_config.json", {"chat_template": [{"name": 1, "template": "x"}]}),
            ("tokenizer_config.json", {"chat_template": ["x"]}),
        ],
    )
    def test_damaged_settings_are_named(self, tmp_path: Path, file: str, content: dict[str, Any]) -> None:
        with pytest.raises(TokenizerError, match=file):
            Tokenizer.load(write(llama2() | {file: content}, tmp_path))

    def test_what_is_no_id_ends_nothing(self, tmp_path: Path) -> None:
        odd = {"generation_config.json": {"eos_token_id": [True, "3", None, -1, 5]}}
        assert Tokenizer.load(write(llama2() | odd, tmp_path)).eos_token_ids == (5, 2)

    @pytest.mark.parametrize("names", [["<tool>"], {"tool_token": "<tool>"}, [{"content": "<tool>"}]])
    def test_special_tokens_in_all_spellings(self, tmp_path: Path, names: Any) -> None:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            files = llama2() | {"added_tokens.json": {"<tool>": 700}, "special_tokens_map.json": {key: names}}
            assert 700 in Tokenizer.load(write(files, tmp_path)).special_ids

    def test_self_tests_in_the_file_do_not_hinder_the_edit(self) -> None:
        model = train_pieces(user_defined_symbols=["<role>"], self_test_sample_size=5)
        closed = SentencePieceProcessor(model_proto=edited(model, control={3}))
        assert closed.is_control(3)
        assert 3 not in closed.encode("a <role>")
        assert 3 in SentencePieceProcessor(model_proto=model).encode("a <role>")

    @settings(max_examples=50, deadline=None)
    @given(text=TEXTS)
    def test_an_edit_leaves_all_else_as_it_is(self, pairs: dict[str, Pair], text: str) -> None:
        theirs = pairs["llama2"][1]
        model = edited(llama_model(theirs), control={300}, dummy_prefix=False)
        bare = SentencePieceProcessor(model_proto=model)
        opened = SentencePieceProcessor(model_proto=edited(llama_model(theirs)))
        assert opened.encode(text) == theirs.encode(text)
        assert bare.decode(bare.encode(text)) == text.replace("▁", " ")


def llama_model(processor: Any) -> bytes:
    return processor.serialized_model_proto()  # type: ignore[no-any-return]
