"""Safetensors files of random weights, as fast as the disk or the page cache takes them.

The numbers come from one block of normal numbers, from another place of it for each tensor. Its length
is a prime, so that no two rows of a matrix are equal: equal rows of the head would be ties. A few rows of
the head are louder than the others, so that the best token leads by more than rounding to 16 bits can undo.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]

_BLOCK = 16_777_213  # the largest prime below 2^24
_WRITERS = 8
_HEADER_ALIGNMENT = 8
STANDARD_DEVIATION = 0.02
HEAD = "lm_head.weight"


def bfloat16_block(seed: int = 0) -> np.ndarray:
    """[_BLOCK] normal numbers of standard deviation 0.02, in bfloat16's bits, rounded to nearest."""
    numbers = np.random.default_rng(seed).standard_normal(_BLOCK, dtype=np.float32) * STANDARD_DEVIATION
    bits = numbers.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_checkpoint(folder: Path, shards: Sequence[Shapes]) -> int:
    """Write one file for each shard, all at once, and their index. Returns the bytes of all tensors.

    Matrices and biases are random, norms (vectors that are named `…norm.weight`) are ones.
    """
    block = bfloat16_block()
    names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    with ThreadPoolExecutor(_WRITERS) as pool:
        total = sum(pool.map(_write, [folder / name for name in names], shards, [block] * len(shards)))
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _write(path: Path, shapes: Shapes, block: np.ndarray) -> int:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % _HEADER_ALIGNMENT)
    with open(path, "wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for name, shape in shapes.items():
            if name.endswith("norm.weight"):
                _write_all(file.fileno(), np.full(shape, 0x3F80, np.uint16))  # 1.0 in bfloat16
                continue
            at = 0
            for part in _parts(name, int(np.prod(shape)), block):
                _write_all(file.fileno(), _louder(part, at, shape) if name == HEAD else part)
                at += len(part)
    return end


def _parts(name: str, count: int, block: np.ndarray) -> Iterator[np.ndarray]:
    """The block's numbers, again and again, from a place that depends on the tensor's name."""
    # Not Python's own hash, which differs from process to process.
    place = zlib.crc32(name.encode()) % len(block)
    while count > 0:
        part = block[place : place + count]
        yield part
        count -= len(part)
        place = 0


def _louder(part: np.ndarray, at: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of the head from its number `at` on, in bfloat16's bits: one row in eight times 2 or more, of
    these one in eight times 4 or more, and of these one in eight times 8. So many rows are the loudest that
    only the right hidden state finds the right one."""
    rows, columns = shape
    doublings = (np.random.default_rng(0).geometric(7 / 8, rows) - 1).clip(max=3).astype(np.uint16)
    first, last = at // columns, -(-(at + len(part)) // columns)
    exponents = np.repeat(doublings[first:last] << 7, columns)  # what bfloat16's exponents stand behind
    begin = at - first * columns
    return part + exponents[begin : begin + len(part)]


def _write_all(descriptor: int, numbers: np.ndarray) -> None:
    rest = memoryview(numbers).cast("B")  # type: ignore[arg-type]
    while len(rest) > 0:
        rest = rest[os.write(descriptor, rest) :]
