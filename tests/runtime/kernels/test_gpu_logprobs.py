"""Log probabilities and ranks against torch's own."""

from __future__ import annotations

import pytest
import torch

from runtime.kernels.gpu.sampling.logprobs import token_logprobs, token_logprobs_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")


@pytest.mark.parametrize("compute", [lambda *args: token_logprobs(*args, chunk=64), token_logprobs_torch])
@pytest.mark.parametrize("num_top", [0, 3])
def test_against_log_softmax(compute, num_top: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 200, device=DEVICE) * 5
    logits[1, 3:] = -torch.inf
    tokens = torch.tensor([int(logits[0].argmax()), 2, 199, 0], dtype=torch.int32, device=DEVICE)
    reference = logits.double().log_softmax(-1)

    found = compute(logits, tokens, num_top)

    chosen = reference[range(4), tokens.long()]
    torch.testing.assert_close(found.chosen.double(), chosen, atol=1e-5, rtol=1e-5)
    assert found.ranks.tolist() == [
        sorted(row.tolist(), reverse=True).index(own) + 1
        for row, own in zip(reference, chosen.tolist(), strict=True)
    ]
    top, top_ids = reference.topk(num_top)
    torch.testing.assert_close(found.top.double(), top, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.top_ids, top_ids)
