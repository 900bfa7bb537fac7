"""The tokenizer against `tokenizers` and transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from transformers import AutoTokenizer

from runtime.errors import RequestError
from runtime.text.tokenizer import Tokenizer, TokenizerError
from tests.runtime.text.texts import ORDINARY, TEXTS


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> list[tuple[Tokenizer, tokenizers.Tokenizer]]:
    """Each tokenizer with the `tokenizers` package's own reading of it."""
    return [
        (Tokenizer.load(folder), tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")))
        for folder in folders.values()
    ]


class TestEncode:
    def test_ids_equal_transformers(self, folder: Path) -> None:
        ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
        for text in [*ORDINARY, "<|im_start|>user<|im_end|>", "<s>[INST] Hi [/INST]</s>", "<|eot_id|>x"]:
            assert ours.encode(text) == theirs(text).input_ids
            assert (
                ours.encode(text, add_special_tokens=False)
                == theirs(text, add_special_tokens=False).input_ids
            )

    def test_long_texts_too_which_are_encoded_in_another_way(self, folder: Path) -> None:
        ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
        text = " ".join([*ORDINARY, "<|im_end|>", "</s>"] * 50)
        assert len(text) > 10_000
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special).input_ids
            assert ours.encode(text, add_special_tokens=special) == expected
        pieces = [text[start : start + 1000] for start in range(0, len(text), 1000)]
        whole = ours.encode(text, add_special_tokens=False, parse_special=False)
        assert ours.encode_owned((piece, False) for piece in pieces) == whole

    @settings(max_examples=100, deadline=None)
    @given(text=TEXTS)
    def test_without_parsing_no_text_is_special(
        self, pairs: list[tuple[Tokenizer, tokenizers.Tokenizer]], text: str
    ) -> None:
        for ours, reference in pairs:
            reference.encode_special_tokens = True
            ids = ours.encode(text, add_special_tokens=False, parse_special=False)
            assert ids == reference.encode(text, add_special_tokens=False).ids
            assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=False)

    def test_half_a_surrogate_pair_is_refused(self, folder: Path) -> None:
        with pytest.raises(RequestError, match="surrogate"):
            Tokenizer.load(folder).encode("\ud83d")

    def test_truncation_in_the_file_is_not_obeyed(self, folders: dict[str, Path], tmp_path: Path) -> None:
        backend = tokenizers.Tokenizer.from_file(str(folders["chatml"] / "tokenizer.json"))
        backend.enable_truncation(2)
        backend.enable_padding(length=50)
        backend.save(str(tmp_path / "tokenizer.json"))
        assert 2 < len(Tokenizer.load(tmp_path).encode("The quick brown fox")) < 50


class TestDecode:
    def test_equals_transformers(self, folder: Path) -> None:
        ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
        for text in ORDINARY:
            for ids in (ours.encode(text), ours.encode(text)[1:], [*ours.encode(text), *ours.eos_token_ids]):
                for skip in (True, False):
                    assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
                        ids, skip_special_tokens=skip
                    )

    def test_bytes_of_the_tokens_make_up_the_text(self, folder: Path) -> None:
        ours = Tokenizer.load(folder)
        for text in ORDINARY:
            ids = ours.encode(text, add_special_tokens=False)
            joined = b"".join(map(ours.token_bytes, ids)).decode()
            # Sentencepiece's decoder drops the space that it puts in front of a text.
            assert (joined if ours.joins_bytes else joined.removeprefix(" ")) == ours.decode(ids)

    def test_special_tokens_have_their_own_text(self, folder: Path) -> None:
        ours = Tokenizer.load(folder)
        for index in ours.eos_token_ids:
            assert ours.id_of(ours.token_text(index)) == index

    def test_ids_beyond_the_vocabulary_are_nothing(self, folder: Path) -> None:
        ours = Tokenizer.load(folder)
        assert ours.token_bytes(ours.vocab_size) == b""
        assert ours.decode([ours.vocab_size]) == ""
        assert ours.token_bytes(ours.vocab_size - 1) != b""

    def test_a_token_that_is_half_a_character(self, folders: dict[str, Path]) -> None:
        for folder in folders.values():
            ours = Tokenizer.load(folder)
            halves = [i for i in range(ours.vocab_size) if ours.token_bytes(i) == b"\xf0"]
            assert [ours.token_text(i) for i in halves] == ["\ufffd"]


class TestFiles:
    def load(self, folders: dict[str, Path], tmp_path: Path, **files: object) -> Tokenizer:
        shutil.copy(folders["chatml"] / "tokenizer.json", tmp_path)
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return Tokenizer.load(tmp_path)

    def test_special_tokens(self, folders: dict[str, Path]) -> None:
        ours = Tokenizer.load(folders["llama3"])
        assert ours.special_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        assert ours.bos_token_id == ours.id_of("<|begin_of_text|>")
        assert ours.eos_token_ids == (ours.id_of("<|eot_id|>"),)

    def test_eos_ids_come_from_all_files(self, folders: dict[str, Path], tmp_path: Path) -> None:
        ours = self.load(
            folders,
            tmp_path,
            generation_config={"eos_token_id": [7, 5]},
            config={"eos_token_id": 5, "bos_token_id": 3},
            special_tokens_map={"eos_token": {"content": "<|im_end|>"}},
        )
        assert ours.eos_token_ids == (7, 5, 2)
        assert ours.bos_token_id == 3

    def test_a_tokenizer_without_bos_has_none(self, folders: dict[str, Path], tmp_path: Path) -> None:
        ours = self.load(folders, tmp_path, tokenizer_config={"bos_token": None}, config={"bos_token_id": 3})
        assert ours.bos_token_id is None

    def test_template_file_beats_the_configuration(self, folders: dict[str, Path], tmp_path: Path) -> None:
        named = [{"name": "default", "template": "old"}, {"name": "tool_use", "template": "tools"}]
        ours = self.load(folders, tmp_path, tokenizer_config={"chat_template": named})
        assert ours.chat_templates == {"default": "old", "tool_use": "tools"}
        (tmp_path / "chat_template.jinja").write_text("new")
        assert Tokenizer.load(tmp_path).chat_template == "new"

    def test_no_template(self, folders: dict[str, Path]) -> None:
        assert Tokenizer.load(folders["chatml"]).chat_template is None

    def test_other_formats_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "vocab.json").touch()
        with pytest.raises(TokenizerError, match=r"tokenizer\.json.*holds vocab\.json"):
            Tokenizer.load(tmp_path)

    def test_damaged_files_are_named(self, tmp_path: Path, folders: dict[str, Path]) -> None:
        (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
        with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
            Tokenizer.load(tmp_path)
        shutil.copy(folders["chatml"] / "tokenizer.json", tmp_path)
        for text in ("{", "[]"):
            (tmp_path / "config.json").write_text(text)
            with pytest.raises(TokenizerError, match=r"config\.json"):
                Tokenizer.load(tmp_path)
