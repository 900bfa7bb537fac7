"""Headers of safetensors files: read as the reference package reads them, and believed in nothing."""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save_file

from runtime.errors import FirstlightError
from runtime.weights.checkpoint import (
    ITEM_BYTES,
    MAX_HEADER_BYTES,
    CheckpointError,
    TensorInfo,
    read_checkpoint,
)
from tests.runtime.weights.safetensors_files import entry, raw_file, write_index

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.uint8, torch.int64]


def _content(tensor: TensorInfo) -> bytes:
    return tensor.file.read_bytes()[tensor.start : tensor.stop]


def _refused(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(directory)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_lie_where_the_reference_package_finds_them(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.arange(12).reshape(3, 4).to(dtype),
        "vector": torch.arange(5).to(dtype),
        "scalar": torch.tensor(7).to(dtype),
        "empty": torch.zeros((0, 4), dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = read_checkpoint(tmp_path)
    assert found.keys() == tensors.keys()
    with safe_open(tmp_path / "model.safetensors", "pt") as reference:
        for name, tensor in found.items():
            part = reference.get_slice(name)
            assert (tensor.dtype, list(tensor.shape)) == (part.get_dtype(), part.get_shape())
            expected = reference.get_tensor(name).flatten().view(torch.uint8)
            assert _content(tensor) == bytes(expected.tolist())


def test_shards_are_those_that_the_index_names(tmp_path: Path) -> None:
    for n in range(3):
        save_file({f"t{n}": torch.tensor([float(n)])}, tmp_path / f"model-{n}.safetensors")
    write_index(tmp_path, {"t0": "model-0.safetensors", "t1": "model-1.safetensors"})
    found = read_checkpoint(tmp_path)
    assert {name: struct.unpack("<f", _content(t)) for name, t in found.items()} == {
        "t0": (0.0,),
        "t1": (1.0,),
    }


# ---- files that are damaged or hostile ---------------------------------------------------------

GOOD = raw_file({"a": entry([2], 0, 8), "b": entry([1], 8, 12)}, bytes(12))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes: too short"),
        (b"\x01\x02\x03", "3 bytes: too short"),
        (raw_file(b"{}", length=1 << 40), "claims 1099511627776 bytes"),
        (raw_file(b"{}", length=(1 << 64) - 1), "claims 18446744073709551615 bytes"),
        (raw_file(b"{}", length=MAX_HEADER_BYTES + 1), "claims 100000001 bytes"),
        (raw_file(b"{}", length=3), "claims 3 bytes of a file of 10"),
        (raw_file(b""), "not JSON"),
        (raw_file(b'{"a": '), "not JSON"),
        (raw_file(b"\xff\xfe{}"), "not JSON"),
        (raw_file(b"[" * 100_000), "not JSON: it is nested too deeply"),
        (raw_file(b'{"a": ' + b"9" * 5000 + b"}"), "not JSON"),
        (raw_file([1, 2]), "not a JSON object"),
        (raw_file({"a": 1}), "'a' has a malformed entry"),
        (raw_file({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "'a' has a malformed entry"),
        (raw_file({"a": {**entry([1], 0, 4), "data_offsets": [4]}}, bytes(4)), "'a' has a malformed entry"),
        (raw_file({"a": entry([1], 0, 4, "F33")}, bytes(4)), "'a' has the unknown dtype 'F33'"),
        (raw_file({"a": {**entry([1], 0, 4), "dtype": ["F32"]}}, bytes(4)), "unknown dtype ['F32']"),
        (raw_file({"a": entry([-1], 0, 4)}, bytes(4)), "'a' has no proper shape"),
        (raw_file({"a": {**entry([1], 0, 4), "shape": "1"}}, bytes(4)), "'a' has no proper shape"),
        (raw_file({"a": {**entry([1], 0, 4), "shape": [True]}}, bytes(4)), "'a' has no proper shape"),
        (raw_file({"a": entry([1] * 100_000, 0, 4)}, bytes(4)), "'a' has no proper shape"),
        (raw_file({"a": entry([10**4000] * 9, 0, 4)}, bytes(4)), "'a' has no proper shape"),
        (raw_file({"a": entry([2], 0, 8)}, bytes(7)), "'a' lies outside the file"),
        (raw_file({"a": entry([1], -4, 0)}, bytes(4)), "'a' lies outside the file"),
        (raw_file({"a": entry([1], 4, 0)}, bytes(8)), "'a' lies outside the file"),
        (raw_file({"a": {**entry([1], 0, 4), "data_offsets": [0.0, 4.0]}}, bytes(4)), "'a' lies outside"),
        (raw_file({"a": entry([3], 0, 8)}, bytes(8)), "'a' of shape [3] does not fit its 8 bytes"),
        (raw_file({"a": entry([2], 0, 4)}, bytes(8)), "'a' of shape [2] does not fit its 4 bytes"),
        (raw_file({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "'b' overlaps"),
        (raw_file({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)), "'b' overlaps"),
        (raw_file({"n" * 10**6: 1}), "malformed"),
        (raw_file({"\ud800": 1}), "malformed"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name_and_what_is_wrong(
    tmp_path: Path, content: bytes, says: str
) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    message = _refused(tmp_path)
    assert (says in message, str(tmp_path / "model.safetensors") in message) == (True, True), message
    assert len(message.encode()) < 1000


@pytest.mark.parametrize("size", range(len(GOOD)))
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(GOOD[:size])
    _refused(tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "holds no safetensors file" in _refused(tmp_path)


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    assert "cannot be read: Is a directory" in _refused(tmp_path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        (b"", "is not a safetensors index"),
        (b"[]", "is not a safetensors index"),
        (b'{"weight_map": ["a"]}', "is not a safetensors index"),
        (b'{"weight_map": {"a": ["x"]}}', "is not a safetensors index"),
        (b'{"weight_map": {"a": 1, "b": "x"}}', "is not a safetensors index"),
        (b"[" * 100_000, "is not a safetensors index"),
        (b'{"weight_map": {"a": 7}}', "7 is not a plain file name"),
        (b'{"weight_map": {"a": "../x.safetensors"}}', "'../x.safetensors' is not a plain file name"),
        (b'{"weight_map": {"a": "/x.safetensors"}}', "'/x.safetensors' is not a plain file name"),
        (b'{"weight_map": {"a": ".."}}', "'..'"),
        (b'{"weight_map": {"a": ""}}', "''"),
        (b'{"weight_map": {"a": "x\\u0000"}}', "'x\\x00'"),
        (b'{"weight_map": {"a": "\\ud800"}}', "'\\ud800'"),
        (b'{"weight_map": {"a": "' + b"x" * 5000 + b'"}}', "download it again"),
        (b'{"weight_map": {"a": "gone.safetensors"}}', "has no 'gone.safetensors', though"),
        (b'{"weight_map": {"a": "link.safetensors"}}', "link.safetensors cannot be read: No such file"),
    ],
)
def test_a_wrong_index_is_refused(tmp_path: Path, index: bytes, says: str) -> None:
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    message = _refused(tmp_path)
    assert says in message
    assert len(message.encode()) < 1000


def test_a_tensor_that_two_shards_hold(tmp_path: Path) -> None:
    for n in range(2):
        save_file({"same": torch.tensor([float(n)])}, tmp_path / f"model-{n}.safetensors")
    message = _refused(tmp_path)
    assert "'same' is in both" in message
    assert "model-0.safetensors" in message
    assert "model-1.safetensors" in message


# ---- anything at all ---------------------------------------------------------------------------

_JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 1 << 70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
_SHAPES = st.lists(st.integers(0, 4), max_size=3)
_ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "C64"]) | _JSON,
        "shape": _SHAPES | _JSON,
        "data_offsets": st.lists(st.integers(0, 24), min_size=2, max_size=2).map(sorted) | _JSON,
    },
)
_HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "__metadata__"]) | st.text(), _ENTRIES | _JSON, max_size=3
)


def _whole_file(tensors: list[tuple[str, list[int]]]) -> bytes:
    header, end = {}, 0
    for n, (dtype, shape) in enumerate(tensors):
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[f"t{n}"] = entry(shape, start, end, dtype)
    return raw_file(header, random.Random(end).randbytes(end))


_ANY_FILE = st.one_of(
    st.lists(st.tuples(st.sampled_from(sorted(ITEM_BYTES)), _SHAPES), max_size=4).map(_whole_file),
    st.binary(max_size=64),
    st.builds(raw_file, st.binary(max_size=64), st.binary(max_size=24)),
    st.builds(raw_file, _HEADERS | _JSON, st.binary(max_size=24)),
    st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)).map(
        lambda change: GOOD[: change[0]] + bytes([change[1]]) + GOOD[change[0] + 1 :]
    ),
)


def _read(directory: Path, content: bytes) -> dict[str, TensorInfo] | None:
    (directory / "model.safetensors").write_bytes(content)
    message = ""
    try:
        return read_checkpoint(directory)
    except FirstlightError as error:
        message = str(error)
    # Whatever a file holds, what is said of it can be written out.
    assert message.encode()
    return None


@settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(_ANY_FILE)
def test_whatever_a_file_holds_only_our_own_error_is_raised(tmp_path: Path, content: bytes) -> None:
    ours = _read(tmp_path, content)
    for tensor in (ours or {}).values():
        assert 8 <= tensor.start <= tensor.stop <= len(content)
    try:
        reference = dict(deserialize(content))
    except SafetensorError:
        return
    # What the reference package takes is taken, but for dtypes that no weights have.
    if ours is None:
        assert any(tensor["dtype"] in ("F4", "C64") for tensor in reference.values())
        return
    assert {name: [*t.shape] for name, t in ours.items()} == {n: t["shape"] for n, t in reference.items()}
    assert {name: _content(t) for name, t in ours.items()} == {
        name: bytes(tensor["data"]) for name, tensor in reference.items()
    }


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=64) | _JSON.map(lambda j: json.dumps({"weight_map": j}).encode()))
def test_whatever_an_index_holds_only_our_own_error_is_raised(tmp_path: Path, index: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(index)
    assert not _read(tmp_path, GOOD)
