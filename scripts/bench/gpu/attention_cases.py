"""Paged batches for timing attention: 32 heads over 8 key heads of 128, bf16, blocks strewn at random."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from gpu.timing import L2_FLUSHING_BYTES
from runtime.kernels.gpu.attention_decode import DecodeConfig, decode_workspace, paged_decode, splits_for
from runtime.kernels.gpu.attention_prefill import (
    PrefillConfig,
    paged_prefill,
    prefill_config,
    prefill_splits,
    prefill_work_items,
    prefill_workspace,
)
from runtime.kernels.gpu.attention_tile import Workspace

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
TOKEN_BYTES = 2 * NUM_KV_HEADS * HEAD_DIM * 2
"""Keys and values of one token in one layer."""
SCALE = HEAD_DIM**-0.5
_POOL_BYTES = 10 << 30


def ragged(batch: int) -> list[int]:
    """Lengths as in the standard workload: a prompt of 100 to 1024 tokens and part of an answer."""
    draw = random.Random(0)
    return [draw.randint(100, 1024) + draw.randint(0, draw.randint(100, 1024)) for _ in range(batch)]


class Pool:
    """The cache that all cases use, seen in blocks of one size or another."""

    def __init__(self) -> None:
        elements = _POOL_BYTES // 4
        self._keys, self._values = (
            torch.empty(elements, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2)
        )
        self.num_sms = torch.cuda.get_device_properties(0).multi_processor_count

    def views(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (-1, NUM_KV_HEADS, block_size, HEAD_DIM)
        return self._keys.view(shape), self._values.view(shape)

    def tables(self, count: int, seq_lens: list[int], block_size: int) -> list[torch.Tensor]:
        """Block tables of `count` layers, all blocks different while there are enough."""
        num_blocks = len(self._keys) // (NUM_KV_HEADS * HEAD_DIM * block_size)
        width = -(-max(seq_lens) // block_size)
        order = torch.randperm(num_blocks).int()
        needed = [-(-length // block_size) for length in seq_lens]
        tables, at = [], 0
        for _ in range(count):
            table = torch.zeros(len(seq_lens), width, dtype=torch.int32)
            for row, blocks in enumerate(needed):
                if at + blocks > num_blocks:
                    at = 0
                table[row, :blocks] = order[at : at + blocks]
                at += blocks
            tables.append(table.cuda())
        return tables


def _queries(tokens: int) -> torch.Tensor:
    qkv = torch.randn(tokens, NUM_HEADS + 2 * NUM_KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    return qkv[:, :NUM_HEADS]


@dataclass
class DecodeCase:
    """Layers that follow one another, each with its own blocks, as in a decode step."""

    name: str
    seq_lens: list[int]
    pool: Pool
    block_size: int

    def __post_init__(self) -> None:
        self.bytes = sum(self.seq_lens) * TOKEN_BYTES
        self.layers = max(1, min(256, L2_FLUSHING_BYTES // self.bytes))
        self._tables = self.pool.tables(self.layers, self.seq_lens, self.block_size)
        self._q = _queries(len(self.seq_lens))
        self._out = torch.empty_like(self._q, memory_format=torch.contiguous_format)
        self._rows = torch.arange(len(self.seq_lens), dtype=torch.int32, device="cuda")
        self._lens = torch.tensor(self.seq_lens, dtype=torch.int32, device="cuda")
        self._rooms: dict[int, Workspace] = {}

    def default_splits(self) -> int:
        """As for a graph in which no sequence may grow beyond 8192 tokens."""
        return splits_for(len(self.seq_lens), NUM_KV_HEADS, 8192)

    def step(self, num_splits: int, config: DecodeConfig | None = None) -> None:
        keys, values = self.pool.views(self.block_size)
        for table in self._tables:
            paged_decode(
                self._q, keys, values, table, self._rows, self._lens, self._out,
                scale=SCALE, num_splits=num_splits, workspace=self._workspace(num_splits), config=config,
            )  # fmt: skip

    def _workspace(self, num_splits: int) -> Workspace:
        if num_splits not in self._rooms:
            self._rooms[num_splits] = decode_workspace(
                len(self.seq_lens), NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, num_splits, "cuda"
            )
        return self._rooms[num_splits]


@dataclass
class PrefillCase:
    """`count` sequences with `new` tokens each after `history` cached ones."""

    name: str
    count: int
    new: int
    history: int
    pool: Pool
    block_size: int

    def __post_init__(self) -> None:
        visible = self.new * self.history + self.new * (self.new + 1) // 2
        self.operations = 4 * HEAD_DIM * NUM_HEADS * self.count * visible
        self._lens = [self.new + self.history] * self.count
        self._table = self.pool.tables(1, self._lens, self.block_size)[0]
        self._q = _queries(self.count * self.new)
        self._out = torch.empty_like(self._q, memory_format=torch.contiguous_format)
        self._starts = torch.arange(self.count + 1, dtype=torch.int32, device="cuda") * self.new
        self._device_lens = torch.tensor(self._lens, dtype=torch.int32, device="cuda")
        # Twice what the kernel's own tiles need: a sweep tries taller ones.
        self._room = prefill_workspace(NUM_KV_HEADS, HEAD_DIM, 2, 2 * self.pool.num_sms, "cuda")
        self._items: dict[int, torch.Tensor] = {}

    def step(self, config: PrefillConfig | None = None) -> None:
        tile = (config or prefill_config(HEAD_DIM, 2)).block_m // (NUM_HEADS // NUM_KV_HEADS)
        if tile not in self._items:
            items = prefill_work_items([self.new] * self.count, self._lens, tile)
            self._items[tile] = torch.from_numpy(items).cuda()
        items = self._items[tile]
        splits = prefill_splits(len(items), NUM_KV_HEADS, max(self._lens), self.pool.num_sms)
        keys, values = self.pool.views(self.block_size)
        paged_prefill(
            self._q, keys, values, self._table, self._starts, self._device_lens, items, self._out,
            scale=SCALE, num_splits=splits, workspace=self._room, config=config,
        )  # fmt: skip
