"""Compiled attention over the paged cache: right for every shape, and the same bits in every company."""

from __future__ import annotations

import math

import pytest
import torch

from runtime.kernels.attention import AttentionForm, attention, attention_torch, query_tile
from runtime.kernels.batch import PackedBatch
from tests.runtime.kernels.compiled import needs_kernels

pytestmark = needs_kernels

# (new tokens, tokens in all) of each sequence, at and around the ends of blocks of 16 and tiles of 8.
SEQUENCES = [(1, 1), (1, 16), (1, 17), (1, 100), (7, 7), (8, 32), (9, 33), (16, 16), (17, 48), (33, 95)]


class Case:
    """Sequences whose blocks lie scattered over a cache; cells that hold no token are NaN."""

    def __init__(
        self,
        sequences: list[tuple[int, int]],
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.form = AttentionForm(num_heads, head_dim**-0.5)
        self.tile = query_tile(num_heads, num_kv_heads, head_dim, block_size)
        self.sequences = sequences
        self.block_size = block_size
        needed = [math.ceil(length / block_size) for _, length in sequences]
        order = torch.randperm(sum(needed) + 2, generator=generator).tolist()
        self.blocks = [[order.pop() for _ in range(count)] for count in needed]
        num_blocks = sum(needed) + 2
        self.keys = torch.randn(num_blocks, num_kv_heads, head_dim, block_size, generator=generator) * 2
        self.values = torch.randn(num_blocks, num_kv_heads, block_size, head_dim, generator=generator)
        for blocks, (_, length) in zip(self.blocks, sequences, strict=True):
            unused = (length - 1) % block_size + 1
            self.keys[blocks[-1], :, :, unused:] = torch.nan
            self.values[blocks[-1], :, unused:] = torch.nan
        width = (num_heads + 2 * num_kv_heads) * head_dim
        self.qkv = torch.randn(sum(count for count, _ in sequences), width, generator=generator)

    def run(self, attend, chosen: list[int], only_last: bool = False) -> list[torch.Tensor]:
        """The rows of each chosen sequence, or its last one alone, in a batch of them in that order."""
        counts = [1 if only_last else self.sequences[index][0] for index in chosen]
        starts = [sum(self.sequences[before][0] for before in range(index)) for index in chosen]
        ends = [start + self.sequences[index][0] for start, index in zip(starts, chosen, strict=True)]
        rows = [self.qkv[end - count : end] for end, count in zip(ends, counts, strict=True)]
        tables = torch.zeros(len(chosen), max(len(self.blocks[index]) for index in chosen), dtype=torch.int32)
        for row, index in enumerate(chosen):
            tables[row, : len(self.blocks[index])] = torch.tensor(self.blocks[index])
        empty = torch.empty(0)
        batch = PackedBatch(
            token_ids=empty,
            positions=empty,
            slots=empty,
            query_start=torch.tensor([0, *counts]).cumsum(0).int(),
            seq_lens=torch.tensor([self.sequences[index][1] for index in chosen], dtype=torch.int32),
            block_tables=tables,
            work_items=torch.tensor(
                [(row, at) for row, count in enumerate(counts) for at in range(0, count, self.tile or 1)],
                dtype=torch.int32,
            ),
            logits_rows=None,
        )
        out = attend(torch.cat(rows), self.keys, self.values, batch, self.form)
        return list(out.split(counts))


@pytest.mark.parametrize("head_dim", [7, 8, 16, 20, 24, 32, 48, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 8])
def test_against_the_twin(head_dim: int, group: int) -> None:
    case = Case(SEQUENCES, 2 * group, 2, head_dim, 16)
    everyone = list(range(len(SEQUENCES)))
    ours, twins = case.run(attention, everyone), case.run(attention_torch, everyone)
    for mine, twin in zip(ours, twins, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("block_size", [8, 16, 32, 128])
@pytest.mark.parametrize("heads", [(10, 2), (16, 1), (71, 1), (6, 3)])
def test_other_blocks_and_groups(block_size: int, heads: tuple[int, int]) -> None:
    case = Case(SEQUENCES, *heads, 64, block_size)
    everyone = list(range(len(SEQUENCES)))
    ours, twins = case.run(attention, everyone), case.run(attention_torch, everyone)
    for mine, twin in zip(ours, twins, strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-4, atol=2e-5)


def test_the_shapes_of_real_models_are_compiled() -> None:
    for num_heads, num_kv_heads, head_dim in (
        (9, 3, 64),
        (32, 8, 128),
        (28, 4, 128),
        (32, 32, 96),
        (8, 1, 256),
    ):
        assert query_tile(num_heads, num_kv_heads, head_dim, 16) > 0


@pytest.mark.parametrize("heads", [(9, 3), (8, 8), (8, 1)])
def test_the_same_bits_alone_in_a_batch_and_token_by_token(heads: tuple[int, int]) -> None:
    case = Case(SEQUENCES, *heads, 64, 16)
    everyone = list(range(len(SEQUENCES)))
    together = case.run(attention, everyone)
    backwards = case.run(attention, everyone[::-1])[::-1]
    last = case.run(attention, everyone, only_last=True)
    for index in everyone:
        assert torch.equal(together[index], case.run(attention, [index])[0])
        assert torch.equal(together[index], backwards[index])
        assert torch.equal(together[index][-1:], last[index])


def test_scores_that_dwarf_each_other() -> None:
    """Softmax neither overflows nor forgets: the greatest score of a row may come first or last."""
    case = Case([(1, 40), (3, 40)], 4, 2, 32, 16)
    finite = case.keys.nan_to_num()
    case.keys = finite * torch.linspace(1, 60, finite.shape[0])[:, None, None, None]
    case.values = case.values.nan_to_num()
    for mine, twin in zip(case.run(attention, [0, 1]), case.run(attention_torch, [0, 1]), strict=True):
        torch.testing.assert_close(mine, twin, rtol=1e-4, atol=1e-4)
