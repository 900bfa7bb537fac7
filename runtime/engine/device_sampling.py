"""Sampling a step's sequences on the device: their parameters go there once, their tokens stay there."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from functools import reduce
from operator import or_

import numpy as np
import numpy.typing as npt
import torch

from runtime.engine.request_table import RequestTable
from runtime.engine.sequence import Sequence
from runtime.kernels.gpu.sampling.parameters import RECORD_WORDS, SamplingTables, Stages, pack
from runtime.kernels.gpu.sampling.sampler import Batch, Sampler

_NO_STAGES = Stages()


class DeviceSampler:
    """The sampling parameters of the running sequences, and the kernels that follow them."""

    def __init__(self, table: RequestTable, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._table = table
        self._tables = SamplingTables.allocate(num_slots, vocab_size, device)
        self._sampler = Sampler(self._tables, num_slots, vocab_size)
        self._stages = [_NO_STAGES] * num_slots

    def records(self, entering: Rows[Sequence]) -> npt.NDArray[np.int32]:
        """What the device must know of sequences that sample for the first time in their slots."""
        packed = b"".join(pack(s.sampling, s.seed, s.num_prompt) for s in entering)
        return np.frombuffer(packed, np.int32)

    def enter(self, entering: Rows[Sequence], slots: torch.Tensor, records: torch.Tensor) -> None:
        """Take in those sequences; slots [N] and records as from `records`, both on the device."""
        if not entering:
            return
        self._tables.records[slots] = records.view(-1, RECORD_WORDS)
        for sequence in entering:
            stages = Stages.of(sequence.sampling)
            self._stages[sequence.slot] = stages
            if stages.adjust:
                # Rare, and large enough to wait for: tables of biases, stops and counts.
                prompt, generated = (
                    sequence.token_ids[: sequence.num_prompt],
                    sequence.token_ids[sequence.num_prompt :],
                )
                self._tables.enter(sequence.slot, sequence.sampling, sequence.seed, prompt, generated)

    def sample(
        self, logits: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor, sequences: Rows[Sequence]
    ) -> torch.Tensor:
        """One token a row, [R] int32; logits [R, vocab_size], and of each row its slot and length."""
        stages = reduce(or_, {self._stages[sequence.slot] for sequence in sequences}, _NO_STAGES)
        tokens = torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)
        if logits.shape[0]:
            batch = Batch(logits, rows, lengths)
            self._sampler.sample(batch, stages, tokens, self._table.last_token, self._table.seq_len)
        return tokens
