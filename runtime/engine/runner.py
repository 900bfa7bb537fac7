"""Carries out a step on the device: scheduled sequences in, rows of logits out."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch

from runtime.engine.scheduler import Scheduled
from runtime.kernels.attention import query_tile
from runtime.kernels.batch import PackedBatch
from runtime.model.config import ModelConfig
from runtime.model.decoder import Decoder
from runtime.model.layers import LayerCache


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """What one block of keys and values takes in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size * dtype.itemsize


class Runner:
    """The model, its paged cache, and the packing of a step's tokens into one batch."""

    def __init__(
        self, decoder: Decoder, num_blocks: int, block_size: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        config = decoder.config
        self.decoder = decoder
        self.block_size = block_size
        self.device = device
        keys = (num_blocks, config.num_kv_heads, config.head_dim, block_size)
        values = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        # Memory that is never written is never touched, so on a CPU an idle pool costs nothing.
        self.cache = [
            LayerCache(
                torch.empty(keys, dtype=dtype, device=device), torch.empty(values, dtype=dtype, device=device)
            )
            for _ in range(config.num_layers)
        ]
        self.tile = query_tile(config.num_heads, config.num_kv_heads, config.head_dim, block_size) or 1

    @torch.inference_mode()
    def execute(self, scheduled: Rows[Scheduled]) -> torch.Tensor:
        """Compute the scheduled tokens; returns logits [R, vocab_size] float32.

        R counts, in order, one row for each sequence that samples, and every new row of a sequence that
        still owes its prompt's log probabilities.
        """
        return self.decoder.forward(self._pack(scheduled), self.cache)

    def _pack(self, scheduled: Rows[Scheduled]) -> PackedBatch:
        counts = [item.num_new for item in scheduled]
        ends = np.cumsum([0, *counts])
        token_ids = np.empty(ends[-1], dtype=np.int64)
        positions = np.empty(ends[-1], dtype=np.int64)
        slots = np.empty(ends[-1], dtype=np.int64)
        tables = np.zeros(
            (len(counts), max(len(item.sequence.table.block_ids) for item in scheduled)), dtype=np.int32
        )
        logits_rows: list[int] = []
        work_items: list[tuple[int, int]] = []
        for row, item in enumerate(scheduled):
            sequence, begin, end = item.sequence, int(ends[row]), int(ends[row + 1])
            start, stop = sequence.num_computed, sequence.num_computed + item.num_new
            block_ids = sequence.table.block_ids
            tables[row, : len(block_ids)] = block_ids
            span = np.arange(start, stop)
            token_ids[begin:end] = sequence.token_ids[start:stop]
            positions[begin:end] = span
            slots[begin:end] = tables[row, span // self.block_size].astype(np.int64) * self.block_size + (
                span % self.block_size
            )
            if sequence.prompt_logprobs_left:
                logits_rows.extend(range(begin, end))
            elif item.samples:
                logits_rows.append(end - 1)
            work_items.extend((row, first) for first in range(0, item.num_new, self.tile))
        return PackedBatch(
            token_ids=self._tensor(token_ids),
            positions=self._tensor(positions),
            slots=self._tensor(slots),
            query_start=self._tensor(ends.astype(np.int32)),
            seq_lens=self._tensor(
                np.array([i.sequence.num_computed + i.num_new for i in scheduled], dtype=np.int32)
            ),
            block_tables=self._tensor(tables),
            work_items=self._tensor(np.array(work_items, dtype=np.int32)),
            logits_rows=self._tensor(np.array(logits_rows, dtype=np.int64)),
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
