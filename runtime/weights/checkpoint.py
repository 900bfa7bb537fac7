"""A folder of safetensors files -> which tensors exist and where their bytes lie.

The format (https://huggingface.co/docs/safetensors): an 8-byte little-endian header length, a JSON
header {name: {dtype, shape, data_offsets}}, then the data. Only headers are read here, and none of
what they say is believed before it is checked: files come from strangers.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import FirstlightError
from runtime.weights.gate import OPEN, Gate

# The reference implementation refuses longer headers too.
MAX_HEADER_BYTES = 100_000_000
# More than any model has, and few enough that a product of sizes is computed at once.
_MAX_DIMS = 16
_MAX_SIZE = 1 << 63
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}


class CheckpointError(FirstlightError):
    """Weights that are missing, malformed or not what the config says. Names file and tensor."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a file: `start` and `stop` are byte offsets from the beginning of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def item_bytes(self) -> int:
        """Bytes per element."""
        return ITEM_BYTES[self.dtype]


def read_checkpoint(directory: Path, gate: Gate = OPEN) -> dict[str, TensorInfo]:
    """All tensors of the model in `directory`, by name. Raises `CheckpointError`."""
    tensors: dict[str, TensorInfo] = {}
    for file in _files(directory, gate.names(directory)):
        for tensor in _read_header(file, gate):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"Tensor {_quoted(tensor.name)} is in both {tensors[tensor.name].file} and {file}."
                )
            tensors[tensor.name] = tensor
    return tensors


def _files(directory: Path, present: set[str]) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.name not in present:
        single = directory / "model.safetensors"
        shards = sorted(directory / name for name in present if name.endswith(".safetensors"))
        files = [single] if single.name in present else shards
        if not files:
            raise CheckpointError(
                f"{directory} holds no safetensors file; weights are read from that format."
            )
        return files
    try:
        names = sorted(set(_parse_json(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a safetensors index: {error!r}.") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {_quoted(name)} is not a plain file name.")
        if name not in present:
            raise CheckpointError(
                f"{directory} has no {_quoted(name)}, though {index.name} lists it; download it again."
            )
    return [directory / name for name in names]


def _read_header(file: Path, gate: Gate) -> list[TensorInfo]:
    try:
        with os.fdopen(gate.open(file), "rb", buffering=0) as stream:
            size = os.fstat(stream.fileno()).st_size
            gate.wait(file, 0, min(8, size))
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise CheckpointError(
                    f"{file} has {size} bytes: too short for a safetensors file; download it again."
                )
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise CheckpointError(
                    f"{file}: the header claims {length} bytes of a file of {size}; the file is damaged. "
                    "Delete its folder if that lies in the cache, or bring the file anew."
                )
            gate.wait(file, 8, 8 + length)
            raw = os.pread(stream.fileno(), length, 8)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    try:
        header = _parse_json(raw)
    except ValueError as error:
        raise CheckpointError(f"{file}: the header is not JSON: {error}.") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object.")
    header.pop("__metadata__", None)
    tensors = [_tensor(file, 8 + length, size, name, entry) for name, entry in header.items()]
    end = 8 + length
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.stop)):
        if tensor.start < end:
            raise CheckpointError(f"{file}: tensor {_quoted(tensor.name)} overlaps the tensor before it.")
        end = tensor.stop
    return tensors


def _parse_json(raw: bytes) -> Any:
    """What the JSON says. Raises ValueError for whatever is wrong with it."""
    try:
        return json.loads(raw)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _tensor(file: Path, base: int, size: int, name: str, entry: Any) -> TensorInfo:
    where = f"{file}: tensor {_quoted(name)}"
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{where} has a malformed entry: {error!r}.") from error
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise CheckpointError(f"{where} has the unknown dtype {_quoted(dtype)}.")
    if len(shape) > _MAX_DIMS or not all(type(n) is int and 0 <= n < _MAX_SIZE for n in shape):
        raise CheckpointError(f"{where} has no proper shape.")
    if not (type(start) is type(stop) is int and 0 <= start <= stop <= size - base):
        raise CheckpointError(
            f"{where} lies outside the file ({size} bytes): it was cut short, or is damaged."
        )
    if stop - start != math.prod(shape) * ITEM_BYTES[dtype]:
        raise CheckpointError(f"{where} of shape {list(shape)} does not fit its {stop - start} bytes.")
    return TensorInfo(name, dtype, shape, file, base + start, base + stop)


def _quoted(value: object) -> str:
    """As it would be written in Python; a damaged file may hold names of any length."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:58]} … {text[-58:]}"
