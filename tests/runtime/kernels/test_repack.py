"""The kernels' layout of a quantised checkpoint's weights means what the checkpoint's own does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runtime.kernels.dequantize import dequantize_all
from runtime.kernels.packed import dequantize_torch
from runtime.kernels.repack import repack
from runtime.model.families import read_model
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.loader import MappedWeights
from runtime.weights.plan import make_plan
from tests.runtime.model.checkpoints import of_transformers
from tests.runtime.model.references.packing import quantise
from tests.runtime.model.test_quantization import FORMATS, SIZES

# Groups of 40 begin within fields; a part with an order of its own cannot be computed with the others.
NOT_SUITED = ("GPTQ Int4, groups that are not whole", "GPTQ in the order of activations")


@pytest.mark.parametrize("name", FORMATS)
def test_weights_mean_the_same(name: str, tmp_path: Path) -> None:
    of_transformers("Qwen2", tmp_path, **SIZES)
    quantise(tmp_path, FORMATS[name])
    model = read_model(tmp_path)
    quantization = model.config.quantization
    assert quantization is not None
    held = MappedWeights(make_plan(model, read_checkpoint(tmp_path))).tensors()
    expected = dequantize_all(held, quantization, torch.float32)
    for base in ("layers.1.qkv", "layers.0.o", "layers.2.gate_up", "layers.1.down"):
        matrix = repack(held, base, quantization)
        alone = len(held[f"{base}.qweight"]) == 1
        if name == NOT_SUITED[0] or (name == NOT_SUITED[1] and not alone):
            assert matrix is None
            continue
        assert matrix is not None
        weight = dequantize_torch(matrix, torch.float32)
        if matrix.order is not None:
            assert name == NOT_SUITED[1]
            weight = weight[:, torch.argsort(matrix.order)]
        (meant,) = expected[base]
        assert torch.equal(weight, meant)
        assert (matrix.zeros is not None) == ("zero points" in name or name == "AWQ")
        for each in (matrix.scales, matrix.zeros):
            assert each is None or (each if matrix.bits == 4 else each.t()).is_contiguous()
