"""The running requests as the device knows them, and what it has been told of each so far."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from runtime.engine.scheduler import Scheduled

BlockUpdate = tuple[int, int, int]


class RequestTable:
    """One row for each slot; see `kernels/gpu/prepare.py` for what the tensors hold.

    `position_base` is there for decoders with more than one table of positions.

    The row after the last slot belongs to nobody: what padding writes goes there.
    """

    def __init__(self, num_slots: int, max_blocks: int, device: torch.device) -> None:
        self.last_token = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.seq_len = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self.block_tables = torch.zeros((num_slots + 1, max_blocks), dtype=torch.int32, device=device)
        self.position_base = torch.zeros(num_slots + 1, dtype=torch.int32, device=device)
        self._num_sent = [0] * num_slots

    def block_updates(self, scheduled: Rows[Scheduled]) -> list[BlockUpdate]:
        """The blocks that the device does not know of yet, as (slot, index in the table, block)."""
        updates: list[BlockUpdate] = []
        num_sent = self._num_sent
        for item in scheduled:
            slot, block_ids = item.sequence.slot, item.sequence.table.block_ids
            first = 0 if item.admitted else num_sent[slot]
            if first < len(block_ids):
                updates += [(slot, index, block_ids[index]) for index in range(first, len(block_ids))]
            num_sent[slot] = len(block_ids)
        return updates
