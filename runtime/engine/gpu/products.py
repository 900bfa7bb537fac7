"""The library of matrix products on a GPU, made ready while torch is being imported.

It takes a tenth of a second to start, and the first product of each kind loads a kernel, in the midst of
traffic where nobody has asked for it before. Here products of the model's shapes are computed, for numbers
of rows that differ in which kernel is chosen, with whatever lies in the weights' memory. The calls are those
that torch makes, and all of the waiting is done in the driver.

Source: the cuBLAS documentation, "cublasGemmEx".
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterator
from ctypes import byref, c_float, c_int, c_void_p
from pathlib import Path
from typing import NamedTuple

from runtime.weights.cuda_driver import CudaError, Driver
from runtime.weights.plan import Plan

# The canary's first. There are more kinds of products than there may be time for.
_ROWS = (64, 128, 32, 96, 16, 48, 256, 192, 24, 40, 512, 160, 224, 112, 1024)
_ROWS_OF_LOGITS = (16, 64, 256)
_TYPES = {"F16": 2, "BF16": 14}  # CUDA_R_16F, CUDA_R_16BF
_FLOAT32 = 0  # CUDA_R_32F
_TRANSPOSED, _AS_IS = 1, 0  # CUBLAS_OP_T, CUBLAS_OP_N
_SUMS_IN_FLOAT32 = 68  # CUBLAS_COMPUTE_32F
_DEFAULT_ALGORITHM = 99  # CUBLAS_GEMM_DEFAULT_TENSOR_OP


class _Product(NamedTuple):
    """x [rows, inputs] W^T, W [outputs, inputs] of one type, the result of another."""

    rows: int
    outputs: int
    inputs: int
    type: int
    result: int

    @property
    def bytes_of_x(self) -> int:
        return 2 * self.rows * self.inputs

    @property
    def bytes_of_result(self) -> int:
        return (4 if self.result == _FLOAT32 else 2) * self.rows * self.outputs


class Products(threading.Thread):
    """Computes them as soon as `library_loaded` returns; `plan` says what lies in the arena at `address`.

    What fails here is not missed: it is done, or fails with better words, where it is needed.
    """

    def __init__(
        self, driver: Driver, plan: Plan, address: int, library_loaded: Callable[[], object]
    ) -> None:
        super().__init__(name="products", daemon=True)
        self._driver = driver
        self._products = list(_products(plan, address))
        self._library_loaded = library_loaded
        self._ended = False

    def end(self) -> None:
        """Compute no more: when this returns, the weights' memory may go."""
        self._ended = True
        self.join()

    def run(self) -> None:
        """The thread's work."""
        self._library_loaded()
        mapped = Path("/proc/self/maps").read_text(encoding="utf-8")
        found = re.search(r"/\S*/libcublas\.so\.\d+", mapped)
        if found is None or not self._products:
            return
        self._driver.enter()
        room_for_x = max(product.bytes_of_x for product, _ in self._products)
        room = room_for_x + max(product.bytes_of_result for product, _ in self._products)
        try:
            scratch = self._driver.allocate(room)
        except CudaError:
            return
        library, handle = ctypes.CDLL(found[0]), c_void_p()
        if not library.cublasCreate_v2(byref(handle)):
            for product, weight in self._products:
                if not self._ended:
                    _multiply(library, handle, product, weight, scratch, scratch + room_for_x)
            library.cublasDestroy_v2(handle)
        self._driver.free(scratch)


def _products(plan: Plan, address: int) -> Iterator[tuple[_Product, int]]:
    """Each product once, and where a weight for it lies; the most wanted first."""
    matrices = {
        parameter.name: (parameter.offset, parameter.pieces)
        for parameter in plan.parameters
        if parameter.stacked and len(parameter.pieces[0].shape) == 2
    }
    head = "head" if "head" in matrices else "embedding"
    found: dict[_Product, int] = {}
    for wanted in (_ROWS[:4], _ROWS_OF_LOGITS, _ROWS[4:]):
        for rows in wanted:
            for name, (offset, pieces) in matrices.items():
                kind = _TYPES.get(pieces[0].tensor.dtype)
                of_logits = wanted is _ROWS_OF_LOGITS
                if kind is not None and (name == head if of_logits else name.startswith("layers.")):
                    outputs, inputs = sum(piece.shape[0] for piece in pieces), pieces[0].shape[1]
                    result = _FLOAT32 if of_logits else kind
                    found.setdefault(_Product(rows, outputs, inputs, kind, result), address + offset)
    yield from found.items()


def _multiply(
    library: ctypes.CDLL, handle: c_void_p, product: _Product, weight: int, x: int, result: int
) -> None:
    """As the library counts by columns, what it computes is the transpose of the result."""
    rows, outputs, inputs, kind, result_kind = product
    library.cublasGemmEx(
        handle, _TRANSPOSED, _AS_IS, outputs, rows, inputs,
        byref(c_float(1.0)), c_void_p(weight), kind, inputs, c_void_p(x), kind, inputs,
        byref(c_float(0.0)), c_void_p(result), result_kind, outputs,
        _SUMS_IN_FLOAT32, c_int(_DEFAULT_ALGORITHM),
    )  # fmt: skip
