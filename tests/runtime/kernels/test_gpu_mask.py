"""What masks rule out is never drawn, and everything else as if nothing else had ever been there."""

from __future__ import annotations

import pytest
import torch

from runtime.kernels.gpu.sampling.adjust import adjust_torch
from runtime.kernels.token_mask import apply_mask
from tests.runtime.kernels.sampling_requests import (
    PROMPT,
    SOME_GRAMMAR,
    Requests,
    asking,
    random_masks,
)

# numpy, in the interpreter, is surprised by 64-bit integers that wrap around.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
VOCAB, CHUNK = 300, 128
LENGTH = 40


def test_bits_are_read_from_the_lowest_on() -> None:
    logits = torch.zeros(70)
    apply_mask(logits, torch.tensor([0b101, -(1 << 31), 1 << 5], dtype=torch.int32))
    assert (logits == 0).nonzero().flatten().tolist() == [0, 2, 63, 69]


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_kernel_masks_what_its_twin_masks(share: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, VOCAB)
    requests = Requests([asking(grammar=SOME_GRAMMAR)] * 6, range(6), VOCAB, CHUNK)
    masks = random_masks([4, 0, 5], VOCAB, share)

    adjusted = requests.sampler.adjust(requests.batch(logits, LENGTH))
    requests.sampler.mask(masks)

    for row, bits in zip(masks.rows.tolist(), masks.bits, strict=True):
        apply_mask(logits[row], bits.cpu())
    assert torch.equal(adjusted.cpu(), logits)


def test_rows_are_drawn_from_what_is_left_of_them() -> None:
    """Greedy, drawn, cut and penalised, beside rows without a grammar, which keep their tokens."""
    torch.manual_seed(1)
    wishes = [
        {},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.5, "min_p": 0.01},
        {"temperature": 1.0, "repetition_penalty": 1.5, "logit_bias": {7: 9.0}},
    ]
    free = [asking(**wish) for wish in wishes]
    bound = [asking(**wish, grammar=SOME_GRAMMAR) for wish in wishes]
    logits = torch.randn(5, VOCAB).repeat(2, 1)
    requests = Requests([*free, *bound], [*range(5), *range(5)], VOCAB, CHUNK)
    masks = random_masks(range(5, 10), VOCAB, 0.1)

    tokens = requests.tokens(logits, LENGTH, masks=masks)

    counts = torch.zeros(VOCAB, dtype=torch.int64)
    counts[PROMPT] = -(1 << 31)
    expected = logits.clone()
    for row, bits in enumerate(masks.bits, 5):
        expected[row] = adjust_torch(logits[row], counts, bound[row - 5], banned=False)
        apply_mask(expected[row], bits.cpu())
        assert expected[row, tokens[row]] > -torch.inf
    assert tokens[:5] == Requests(free, range(5), VOCAB, CHUNK).tokens(logits[:5], LENGTH)
    # What is ruled out was never there: the same tokens from logits that begin as the masked ones end.
    plain = [asking(**wish) for wish in wishes[:4]]
    assert tokens[5:9] == Requests(plain, range(4), VOCAB, CHUNK).tokens(expected[5:9], LENGTH)
    assert tokens[5] == int(expected[5].argmax())


def test_a_request_that_waits_for_no_mask_is_left_as_it_is() -> None:
    """Its row of a step that it has no part in any more: any token will do, but it must be one."""
    logits = torch.randn(2, VOCAB)
    requests = Requests([asking(grammar=SOME_GRAMMAR)] * 2, range(2), VOCAB, CHUNK)
    tokens = requests.tokens(logits, LENGTH, masks=random_masks([0], VOCAB, 0.2))
    assert tokens[1] == int(logits[1].argmax())
