"""Local folders: used in place, once they look like a model. GGUF files: converted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from runtime.errors import FirstlightError
from runtime.weights.sources import SourceError, fetch, locate, parse_reference
from tests.runtime.gguf_files import write_gguf
from tests.runtime.sources.models import model_files, spec


def _write(directory: Path, files: dict[str, bytes]) -> Path:
    directory.mkdir()
    for name, content in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_used_in_place(tmp_path: Path, shards: int) -> None:
    directory = _write(tmp_path / "model", model_files(1000, shards=shards))
    assert locate(spec(str(directory)), tmp_path / "cache") == directory
    assert fetch(spec(str(directory)), tmp_path / "cache") == directory
    assert not (tmp_path / "cache").exists()


def test_an_adapter_is_a_folder_too(tmp_path: Path) -> None:
    directory = _write(tmp_path / "a", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    assert fetch(spec(str(directory)), tmp_path) == directory


@pytest.mark.parametrize(
    ("files", "kind", "says"),
    [
        (None, "not_found", "There is no"),
        ({}, "invalid", "empty"),
        ({"model.safetensors": b"x"}, "invalid", "no config.json"),
        ({"config.json": b"{}"}, "invalid", "no weights"),
        ({"config.json": b"{}", "m.gguf": b"x"}, "invalid", "GGUF"),
        (
            {"config.json": b"{}", "model.safetensors.index.json": b'{"weight_map": {"a": "m.safetensors"}}'},
            "invalid",
            "m.safetensors",
        ),
    ],
)
def test_what_is_no_model_is_said_to_be_none(
    tmp_path: Path, files: dict[str, bytes] | None, kind: str, says: str
) -> None:
    directory = tmp_path / "model"
    if files is not None:
        _write(directory, files)
    assert locate(spec(str(directory)), tmp_path) is None
    with pytest.raises(SourceError) as caught:
        fetch(spec(str(directory)), tmp_path)
    assert caught.value.kind == kind
    assert says in str(caught.value)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(SourceError, match="is a file"):
        fetch(spec(str(tmp_path / "model.safetensors")), tmp_path)


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=448,
        max_position_embeddings=64,
        rope_theta=10000.0,
        tie_word_embeddings=True,
    )
    state = AutoModelForCausalLM.from_config(config).state_dict()
    del state["lm_head.weight"]
    (tmp_path / "gguf").mkdir()
    path = tmp_path / "gguf" / "tiny.gguf"
    write_gguf(path, config, {name: tensor.numpy() for name, tensor in state.items()})
    return path


class TestGGUF:
    def test_a_file_is_converted_once(self, gguf_file: Path, tmp_path: Path) -> None:
        model, cache = spec(str(gguf_file)), tmp_path / "cache"
        assert locate(model, cache) is None
        phases = []
        directory = fetch(model, cache, lambda progress: phases.append(progress.phase))
        assert set(phases) == {"convert"}
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in directory.iterdir()}
        assert gguf_file.exists()
        made = (directory / "model.safetensors").stat().st_mtime_ns
        assert locate(model, cache) == fetch(model, cache) == directory
        assert (directory / "model.safetensors").stat().st_mtime_ns == made

    def test_a_file_that_changed_is_converted_anew(self, gguf_file: Path, tmp_path: Path) -> None:
        model = spec(str(gguf_file))
        before = fetch(model, tmp_path / "cache")
        os.utime(gguf_file, (1, 1))
        assert locate(model, tmp_path / "cache") is None
        assert fetch(model, tmp_path / "cache") != before

    def test_a_folder_with_one_means_it(self, gguf_file: Path, tmp_path: Path) -> None:
        by_file = fetch(spec(str(gguf_file)), tmp_path / "cache")
        assert locate(spec(str(gguf_file.parent)), tmp_path / "cache") == by_file

    def test_of_several_one_must_be_named(self, gguf_file: Path, tmp_path: Path) -> None:
        shutil.copy(gguf_file, gguf_file.with_name("other.gguf"))
        model = spec(str(gguf_file.parent))
        assert locate(model, tmp_path / "cache") is None
        with pytest.raises(SourceError, match=r"several GGUF files \(other\.gguf, tiny\.gguf\)"):
            fetch(model, tmp_path / "cache")

    def test_what_is_no_gguf_file_is_said_to_be_none(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"nonsense" * 10)
        with pytest.raises(FirstlightError, match=r"m\.gguf"):
            fetch(spec(str(tmp_path / "m.gguf")), tmp_path / "cache")

    def test_its_name_alone_means_it(self, gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert parse_reference("tiny.gguf").kind == "hub"
        monkeypatch.chdir(gguf_file.parent)
        assert parse_reference("tiny.gguf").location == str(gguf_file)
