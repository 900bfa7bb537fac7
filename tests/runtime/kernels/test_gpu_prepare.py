"""What a decode step reads from the state of the requests, in Python's own words."""

from __future__ import annotations

import pytest
import torch

from runtime.kernels.gpu.prepare import (
    apply_updates,
    apply_updates_torch,
    prepare_decode,
    prepare_decode_torch,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK_SIZE = 16


def int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("prepare", [prepare_decode, prepare_decode_torch])
@pytest.mark.parametrize("batch", [1, 5, 130])
def test_prepare(prepare, batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    num_slots, max_blocks = 160, 6
    last_token = torch.randint(0, 1000, (num_slots,), generator=generator).tolist()
    seq_len = torch.randint(0, max_blocks * BLOCK_SIZE, (num_slots,), generator=generator).tolist()
    seq_len[0], seq_len[1] = 0, max_blocks * BLOCK_SIZE - 1
    tables = torch.randperm(num_slots * max_blocks, generator=generator).view(num_slots, max_blocks).tolist()
    rows = [1, -1, 0, 7, *torch.randperm(num_slots, generator=generator).tolist()][:batch]
    outputs = [torch.full((batch,), 99, dtype=torch.int32, device=DEVICE) for _ in range(4)]

    table = torch.tensor(tables, dtype=torch.int32, device=DEVICE)
    prepare(int32(rows), int32(last_token), int32(seq_len), table, BLOCK_SIZE, *outputs)

    expected = [
        (
            last_token[row],
            seq_len[row],
            tables[row][seq_len[row] // BLOCK_SIZE] * BLOCK_SIZE + seq_len[row] % BLOCK_SIZE,
            seq_len[row] + 1,
        )
        if row >= 0
        else (0, 0, -1, 0)
        for row in rows
    ]
    assert list(zip(*(output.tolist() for output in outputs), strict=True)) == expected


@pytest.mark.parametrize("apply", [apply_updates, apply_updates_torch])
@pytest.mark.parametrize("count", [0, 1, 131, 140])
def test_updates(apply, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    cells = torch.randperm(50 * 8, generator=generator)[:140]
    updates = torch.stack((cells // 8, cells % 8, torch.arange(1000, 1140)), dim=1).int()
    expected = [[-1] * 8 for _ in range(50)]
    for row, column, block in updates[:count].tolist():
        expected[row][column] = block
    tables = torch.full((50, 8), -1, dtype=torch.int32, device=DEVICE)

    apply(updates.to(DEVICE), int32([count]), tables)

    assert tables.tolist() == expected
