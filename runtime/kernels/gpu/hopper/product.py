"""Products of dozens of rows with a large gate and up projection, as decode steps of large batches need them.

Up to a few hundred rows the time is that of reading the weights and that of multiplying them, about the same,
so both must go on all the time on all multiprocessors, whatever the matrix's shape. `product.cu` does that;
with SiLU in it, gates and ups are never written to memory. A row's result does not depend on how many rows
there are.
"""

from __future__ import annotations

import functools
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from runtime.kernels.gpu import binaries
from runtime.kernels.gpu.binaries import Binary
from runtime.kernels.gpu.hopper.nvrtc import CannotCompile, compile_cuda
from runtime.kernels.gpu.hopper.tensor_map import TensorMap
from runtime.kernels.gpu.loaded import CannotLoad, Loaded

MAX_ROWS = 256
CAPABILITY = 90
_SOURCE = Path(__file__).with_name("product.cu")
_NAME, _ARCHITECTURE = "product", "sm_90a"
# As in `product.cu`.
_STEP, _HEIGHT, _SIDES, _CHUNK = 64, 128, 2, 32
_THREADS, _GROUPS = 384, 2
_ROW_BYTES = 2 * _STEP
_SHARED_BYTES = 227 << 10  # that a program may have
_MAX_STAGES = 8
# Two descriptions, three addresses, three numbers, as `struct` calls them.
_ARGUMENTS = ("128s", "128s", "Q", "Q", "Q", "i", "i", "i")
# With smaller matrices, what is won is lost in adding up what several programs have of a tile.
_MIN_WEIGHTS = 1 << 26
# What this process has compiled, by rows and type.
_compiled: dict[tuple[int, torch.dtype], Binary] = {}


def suits(weight: torch.Tensor) -> bool:
    """Whether there are kernels for products with this matrix, [out_features, in_features], contiguous."""
    return fits(weight) and _is_ready(weight.dtype)


def fits(weight: torch.Tensor) -> bool:
    """Whether there would be, were they compiled."""
    out_features, in_features = weight.shape
    return (
        weight.dtype in (torch.float16, torch.bfloat16)
        and weight.numel() >= _MIN_WEIGHTS
        and out_features % (_SIDES * _HEIGHT) == 0
        and in_features % _STEP == 0
        and torch.cuda.get_device_capability(weight.device) == divmod(CAPABILITY, 10)
    )


class WideProduct:
    """Products with one weight, [out_features, in_features], which `suits`: all gates, then all ups."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """out = silu(gate) * up, the halves of x W^T.

        x    [m, in_features] of the weight's type, contiguous, 1 <= m <= MAX_ROWS
        out  [m, out_features / 2] of that type, contiguous

        Sums are float32, rounded once at the end. Returns out. One at a time: all share some memory.
        """
        rows, in_features = x.shape
        padded = -(-max(rows, 2 * _CHUNK) // _CHUNK) * _CHUNK
        _kernel(padded, x.dtype)(
            (_num_programs(), 1, 1),
            (
                self._description,
                _map_of_x(rows, in_features, padded, x.dtype).at(x.data_ptr()),
                out,
                *_memory(),
                rows,
                self._weight.shape[0] // (_SIDES * _HEIGHT),
                in_features // _STEP,
            ),
        )
        return out

    @functools.cached_property
    def _description(self) -> bytes:
        """Of the weight as [group of outputs, gate or up, output of the group, input]."""
        out_features, in_features = self._weight.shape
        half, row = out_features // 2, 2 * in_features
        sizes, strides = (in_features, 8, 2, half // 8), (row, half * row, 8 * row)
        tensor_map = TensorMap(self._weight.dtype, sizes, strides, (_STEP, 8, 2, _HEIGHT // 16))
        return tensor_map.at(self._weight.data_ptr())


def compile_all(dtype: torch.dtype) -> int:
    """Compile what products of a type may need and keep it; returns how many kernels that are.

    Raises `CannotCompile`.
    """
    variants = _variants(dtype)
    with ThreadPoolExecutor() as threads:
        _compiled.update(zip(variants, threads.map(lambda each: _compile(*each), variants), strict=True))
    for variant in variants:
        binaries.keep(None, CAPABILITY, _NAME, repr(variant), _compiled[variant])
    return len(variants)


def num_compiled() -> int:
    """How many kernels have been compiled in this process."""
    return len(_compiled)


class _LoadedProduct(Loaded):
    def _laid_out(self, formats: str) -> tuple[struct.Struct, int]:
        layout, end = "<", 0
        # Descriptions must lie at multiples of 64 bytes: the first one does not come first.
        for (offset, size), kind in zip(self._parameters(), _ARGUMENTS, strict=True):
            layout += f"{offset - end}x{kind}"
            end = offset + size
        return struct.Struct(layout), end


@functools.cache
def _is_ready(dtype: torch.dtype) -> bool:
    """Whether the kernels for a type can be had: all of them are compiled where one is missing, as a batch
    that grows should not have to wait."""
    first, *_, last = _variants(dtype)
    try:
        if last not in _compiled and binaries.find(CAPABILITY, _NAME, repr(last)) is None:
            compile_all(dtype)
        _kernel(*first)
    except (CannotCompile, CannotLoad):
        return False
    return True


@functools.cache
def _kernel(rows: int, dtype: torch.dtype) -> Loaded:
    """The kernel for so many rows."""
    variant = rows, dtype
    found = _compiled.get(variant) or binaries.find(CAPABILITY, _NAME, repr(variant))
    return _LoadedProduct(found or _compile(*variant))


def _variants(dtype: torch.dtype) -> list[tuple[int, torch.dtype]]:
    """All that there are, as `_kernel` takes them."""
    return [(rows, dtype) for rows in range(2 * _CHUNK, MAX_ROWS + 1, _CHUNK)]


def _compile(rows: int, dtype: torch.dtype) -> Binary:
    stage = (_HEIGHT + rows) * _ROW_BYTES
    # Two groups put a chunk of their outputs in order.
    scratch = _GROUPS * _CHUNK * (_HEIGHT // 4) * 2
    alignment, barriers = 1024, 2 * 8 * _MAX_STAGES
    stages = min(_MAX_STAGES, (_SHARED_BYTES - alignment - barriers - scratch) // stage)
    definitions = {
        "ROWS": rows,
        "HALF": int(dtype == torch.float16),
        "STAGES": stages,
    }
    source = _SOURCE.read_text(encoding="utf-8").replace("MULTIPLY", _multiply(rows, dtype))
    code = compile_cuda(source, _ARCHITECTURE, definitions)
    shared = alignment + stages * stage + scratch + barriers
    return Binary(_NAME, _THREADS, shared, tuple(range(len(_ARGUMENTS))), "", False, code)


def _multiply(rows: int, dtype: torch.dtype) -> str:
    """The instruction that multiplies 64 rows of W with so many of x: it names each register."""
    count = rows // 2
    kind = "f16" if dtype == torch.float16 else "bf16"
    sums = ", ".join(f"%{number}" for number in range(count))
    outputs = ", ".join(f'"+f"(sums[{number}])' for number in range(count))
    return (
        rf'asm volatile("{{\n.reg .pred adds;\nsetp.ne.b32 adds, %{count + 2}, 0;\n'
        rf"wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.{kind}.{kind} "
        rf'{{{sums}}}, %{count}, %{count + 1}, adds, 1, 1, 0, 0;\n}}" '
        rf': {outputs} : "l"(a), "l"(b), "r"(add));'
    )


@functools.cache
def _num_programs() -> int:
    """One on each multiprocessor, in whole clusters."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return properties.multi_processor_count // _SIDES * _SIDES


@functools.cache
def _memory() -> tuple[torch.Tensor, torch.Tensor]:
    """Where programs leave sums for each other, and the marks that they have, all zero between launches."""
    programs = _num_programs()
    return (
        torch.empty(programs * _HEIGHT * MAX_ROWS, dtype=torch.float32, device="cuda"),
        torch.zeros(programs * _GROUPS, dtype=torch.int32, device="cuda"),
    )


@functools.cache
def _map_of_x(rows: int, in_features: int, padded: int, dtype: torch.dtype) -> TensorMap:
    return TensorMap(dtype, (in_features, rows), (2 * in_features,), (_STEP, padded // _SIDES))
