"""Masks of real vocabularies: the kernel against its twin, and in mid-sampling."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from runtime.kernels.token_mask import apply_mask
from tests.runtime.kernels.sampling_requests import SOME_GRAMMAR, Requests, asking, random_masks

pytestmark = pytest.mark.gpu
LENGTH, CHUNK = 1000, 4096


@pytest.mark.parametrize("vocab_size", [32000, 128256, 151643, 256000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_masks_what_its_twin_masks(vocab_size: int, dtype: torch.dtype) -> None:
    logits = torch.randn(64, vocab_size, device="cuda").to(dtype)
    requests = Requests([asking(grammar=SOME_GRAMMAR)] * 64, range(64), vocab_size, CHUNK)
    masks = random_masks(range(63, 0, -2), vocab_size, 0.3)

    adjusted = requests.sampler.adjust(requests.batch(logits, LENGTH))
    requests.sampler.mask(masks)

    expected = logits.float().cpu()
    for row, bits in zip(masks.rows.tolist(), masks.bits.cpu(), strict=True):
        apply_mask(expected[row], bits)
    assert torch.equal(adjusted.cpu(), expected)


@pytest.mark.parametrize("share", [1e-5, 1e-3, 0.5])
def test_only_what_is_left_is_drawn(share: float) -> None:
    vocab_size = 128256
    asked = [
        asking(grammar=SOME_GRAMMAR),
        asking(grammar=SOME_GRAMMAR, temperature=2.0),
        asking(grammar=SOME_GRAMMAR, temperature=1.0, top_p=0.9, top_k=50),
        asking(grammar=SOME_GRAMMAR, temperature=1.0, repetition_penalty=1.3),
    ] * 16
    logits = torch.randn(64, vocab_size, device="cuda") * 3
    masks = random_masks(range(64), vocab_size, share)

    tokens = Requests(asked, range(64), vocab_size, CHUNK).tokens(logits, LENGTH, masks=masks)

    for token, bits in zip(tokens, masks.bits.cpu(), strict=True):
        left = torch.zeros(vocab_size)
        apply_mask(left, bits)
        assert left[token] == 0 or bool((left < 0).all())
