"""Pickled checkpoints, as torch writes them, become safetensors; what is more than tensors is refused."""

from __future__ import annotations

import collections
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from runtime.weights.pickled import PickledError, convert_pickled, safetensors_name

SHARED = torch.arange(12.0)
TENSORS = {
    "float32": torch.randn(3, 4),
    "bfloat16": torch.randn(5, 2).to(torch.bfloat16),
    "float16": torch.randn(7).half(),
    "int64": torch.arange(6),
    "int32": torch.arange(6, dtype=torch.int32).view(2, 3),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(4, 6).t(),
    "every other": torch.randn(10)[::2],
    "tied": SHARED.view(3, 4),
    "tied too": SHARED[4:8],
}


def converted(path: Path) -> dict[str, torch.Tensor]:
    target = path.with_suffix(".safetensors")
    convert_pickled(path, target)
    return load_file(target)


def saved(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save(content, path)
    return path


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def test_every_tensor_keeps_its_values(tmp_path: Path) -> None:
    assert same(converted(saved(tmp_path, TENSORS)), TENSORS)


def test_a_modules_state_with_its_metadata(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    assert same(converted(saved(tmp_path, module.state_dict())), dict(module.state_dict()))


def test_parameters_count_as_tensors(tmp_path: Path) -> None:
    content = {"weight": torch.nn.Parameter(torch.randn(2, 2))}
    assert same(converted(saved(tmp_path, content)), {"weight": content["weight"].data})


def test_progress_ends_with_all_bytes(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    path = saved(tmp_path, {"a": torch.zeros(10), "b": torch.zeros(5)})
    convert_pickled(path, tmp_path / "out", lambda done, total: told.append((done, total)))
    assert told == [(40, 60), (60, 60)]


def test_names() -> None:
    assert safetensors_name("pytorch_model.bin") == "model.safetensors"
    shard = "pytorch_model-00001-of-00003.bin"
    assert safetensors_name(shard) == "model-00001-of-00003.safetensors"


class _Runs:
    """Runs a command when it is unpickled by Python's own means."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self._command,)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    path = saved(tmp_path, {"a": torch.zeros(2), "b": _Runs(f"touch '{mark}'")})
    with pytest.raises(PickledError, match=r"it asks for (posix|nt)\.system"):
        converted(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # so the file was a hostile one


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (torch.zeros(2), "it holds a _Tensor and no tensors by name"),
        ({"model": {"a": torch.zeros(2)}}, "'model' in it is a dict and no tensor"),
        ({"a": torch.zeros(2), "epoch": 3}, "'epoch' in it is a int and no tensor"),
        ({3: torch.zeros(2)}, "3 in it is a _Tensor"),
        ({"a": torch.zeros(1).expand(1000, 1000)}, "'a' is larger than its storage"),
        (torch.nn.Linear(2, 2), "asks for torch.nn.modules.linear.Linear"),
        ({"a": collections.Counter("a")}, "asks for collections.Counter"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_anything_but_tensors_is_refused(tmp_path: Path, content: object, says: str) -> None:
    with pytest.raises(PickledError) as caught:
        converted(saved(tmp_path, content))
    assert says in str(caught.value)
    assert "pytorch_model.bin" in str(caught.value)


def test_the_format_before_archives_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(PickledError, match=r"since version 1\.6"):
        converted(path)


def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.full((1000,), 1.5)})
    content = path.read_bytes()
    at = content.index(b"\0\0\xc0\x3f" * 100)
    path.write_bytes(content[: at + 1] + b"\1" + content[at + 2 :])
    with pytest.raises(PickledError, match="it is damaged"):
        converted(path)


@pytest.fixture(scope="module")
def archive() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(5.0), "b": torch.zeros(2, 2)}, buffer)
    return buffer.getvalue()


@given(at=st.integers(0, 1 << 20), value=st.integers(0, 255), cut=st.integers(0, 40) | st.none())
def test_a_damaged_file_is_refused_or_means_what_it_did(
    archive: bytes, tmp_path_factory: pytest.TempPathFactory, at: int, value: int, cut: int | None
) -> None:
    at %= len(archive)
    damaged = archive[:at] + bytes([value]) + archive[at + 1 :]
    path = tmp_path_factory.mktemp("damaged") / "pytorch_model.bin"
    path.write_bytes(damaged if cut is None else damaged[: len(damaged) - cut])
    try:
        found = converted(path)
    except PickledError:
        return
    assert sum(tensor.numel() for tensor in found.values()) <= 9


@given(program=st.binary(max_size=60))
def test_any_program_is_refused_in_words(tmp_path_factory: pytest.TempPathFactory, program: bytes) -> None:
    path = tmp_path_factory.mktemp("program") / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
    with pytest.raises(PickledError):
        converted(path)


def test_an_endless_shape_costs_nothing(tmp_path: Path) -> None:
    path = saved(tmp_path, {"a": torch.zeros(2)})
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    (name,) = (name for name in members if name.endswith("data.pkl"))
    members[name] = members[name].replace(b"K\x02\x85", pickle.LONG1 + b"\x08" + b"\xff" * 7 + b"\x7f\x85")
    with zipfile.ZipFile(path, "w") as file:
        for member, content in members.items():
            file.writestr(member, content)
    with pytest.raises(PickledError, match="beyond its storage"):
        converted(path)
