"""What makes the library of products ready computes products, those that torch computes."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from runtime.engine.gpu import products
from runtime.weights.checkpoint import TensorInfo
from runtime.weights.cuda_driver import Driver
from runtime.weights.plan import plan_all
from runtime.weights.upload import DeviceWeights

pytestmark = pytest.mark.gpu
OUTPUTS, INPUTS, VOCAB = 384, 256, 1000


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_they_are_torchs(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")
    shapes = {"layers.0.o": (OUTPUTS, INPUTS), "embedding": (VOCAB, INPUTS)}
    plan = plan_all({
        name: TensorInfo(name, dtype, shape, Path(), 0, 2 * shape[0] * shape[1])
        for name, shape in shapes.items()
    })  # fmt: skip
    weights = DeviceWeights(plan, Driver())
    tensors = {name: parts[0] for name, parts in weights.tensors().items()}
    for tensor in tensors.values():
        tensor.normal_()
    seen: list[tuple[int, int, torch.dtype]] = []
    multiply = products._multiply

    def checked(
        library: ctypes.CDLL, handle: ctypes.c_void_p, product: products._Product, weight: int, *_: int
    ) -> None:
        of_logits = product.outputs == VOCAB
        matrix = tensors["embedding" if of_logits else "layers.0.o"]
        assert weight == matrix.data_ptr()
        out_dtype = torch.float32 if of_logits else matrix.dtype
        x = torch.randn(product.rows, INPUTS, device="cuda").to(matrix.dtype)
        y = torch.full((product.rows, product.outputs), torch.nan, dtype=out_dtype, device="cuda")
        multiply(library, handle, product, weight, x.data_ptr(), y.data_ptr())
        torch.cuda.synchronize()
        torch.testing.assert_close(y, torch.mm(x, matrix.t(), out_dtype=out_dtype))
        seen.append((product.rows, product.outputs, out_dtype))

    monkeypatch.setattr(products, "_multiply", checked)
    thread = products.Products(Driver(), plan, weights.address, lambda: None)
    thread.run()
    weights.close()
    assert len(seen) == len({*seen}) == len(products._ROWS) + len(products._ROWS_OF_LOGITS)
