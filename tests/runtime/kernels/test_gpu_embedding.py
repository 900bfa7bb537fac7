"""Embedding rows, whole and cut over ranks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from runtime.kernels.gpu.embedding import embedding, embedding_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IDS = [0, 39, 7, 7, 20]


@pytest.mark.parametrize("gather", [embedding, embedding_torch])
def test_rows_times_scale(gather) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 1040, device=DEVICE)
    ids = torch.tensor(IDS, dtype=torch.int32, device=DEVICE)

    plain = gather(ids, weight, torch.empty(len(IDS), 1040, device=DEVICE))
    scaled = gather(ids, weight, torch.empty(len(IDS), 1040, device=DEVICE), scale=3.5)

    assert torch.equal(plain, F.embedding(ids, weight))
    torch.testing.assert_close(scaled, F.embedding(ids, weight) * 3.5)


@pytest.mark.parametrize("gather", [embedding, embedding_torch])
def test_the_ranks_parts_add_up(gather) -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 24, device=DEVICE)
    ids = torch.tensor(IDS, dtype=torch.int32, device=DEVICE)

    parts = [
        gather(ids, weight[first : first + 10].contiguous(), torch.empty(len(IDS), 24, device=DEVICE), first)
        for first in range(0, 40, 10)
    ]

    assert torch.equal(sum(parts), F.embedding(ids, weight))
    assert not parts[0][1].any()
