"""Safetensors files byte by byte, so that tests can make them wrong in any way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header (JSON, or bytes as they are); `length` is what it claims of the header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list[int], start: int, stop: int, dtype: str = "F32") -> dict[str, Any]:
    """What a header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def write_index(directory: Path, weight_map: Any) -> None:
    """The index that tells which tensor is in which file."""
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)
