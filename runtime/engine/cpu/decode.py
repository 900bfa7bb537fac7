"""Decode steps of a few sequences on the CPU, played back from tapes."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import numpy as np
import torch

from runtime.engine.scheduler import Scheduled
from runtime.kernels.batch import PackedBatch
from runtime.kernels.tape import Tape, record
from runtime.model.decoder import CausalLM
from runtime.model.layers import LayerCache

# With more rows than this the kernels take so long that it does not matter who calls them.
MAX_ROWS = 8


class DecodeTapes:
    """One tape for each number of sequences, and the inputs that they all read."""

    def __init__(self, decoder: CausalLM, cache: Rows[LayerCache], num_blocks: int, block_size: int) -> None:
        self._decoder = decoder
        self._cache = cache
        self._block_size = block_size
        self._recordable = decoder.capturable
        self._tapes: dict[int, tuple[Tape, PackedBatch]] = {}
        self._token_ids = np.zeros(MAX_ROWS, np.int64)
        self._positions = np.zeros(MAX_ROWS, np.int64)
        self._slots = np.zeros(MAX_ROWS, np.int64)
        self._seq_lens = np.zeros(MAX_ROWS, np.int32)
        # No sequence has more blocks than there are; memory is only taken for those that it has.
        self._tables = np.zeros((MAX_ROWS, num_blocks), np.int32)

    def logits(self, scheduled: Rows[Scheduled]) -> torch.Tensor | None:
        """[R, vocab_size], good until the next step, if that is one new token of each of a few sequences.

        None if the step is of another kind, or the model does what no tape can hold.
        """
        rows = len(scheduled)
        if not self._recordable or rows > MAX_ROWS:
            return None
        if any(item.num_new != 1 or not item.samples or item.scores_prompt for item in scheduled):
            return None
        self._fill(scheduled)
        if rows not in self._tapes:
            batch = self._batch(rows)
            tape = record(lambda: self._decoder.forward(batch, self._cache))
            if tape is None:
                self._recordable = False
                return None
            self._tapes[rows] = tape, batch
        return self._tapes[rows][0].play()

    def _fill(self, scheduled: Rows[Scheduled]) -> None:
        for row, item in enumerate(scheduled):
            sequence, at = item.sequence, item.start
            block_ids = sequence.table.block_ids
            self._token_ids[row] = sequence.token_ids[at]
            self._positions[row] = at + sequence.position_base
            self._slots[row] = block_ids[at // self._block_size] * self._block_size + at % self._block_size
            self._seq_lens[row] = at + 1
            self._tables[row, : len(block_ids)] = block_ids

    def _batch(self, rows: int) -> PackedBatch:
        each = torch.arange(rows, dtype=torch.int32)
        return PackedBatch(
            token_ids=torch.from_numpy(self._token_ids[:rows]),
            positions=torch.from_numpy(self._positions[:rows]),
            slots=torch.from_numpy(self._slots[:rows]),
            query_start=torch.arange(rows + 1, dtype=torch.int32),
            seq_lens=torch.from_numpy(self._seq_lens[:rows]),
            block_tables=torch.from_numpy(self._tables[:rows]),
            work_items=torch.stack((each, torch.zeros_like(each)), dim=1),
            logits_rows=None,
        )
