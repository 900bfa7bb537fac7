"""Local folders: used in place, once they look like a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from runtime.weights.sources import SourceError, fetch, locate
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
