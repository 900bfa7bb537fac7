"""Sampling a step's sequences on the device: their parameters go there once, their tokens stay there."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from functools import reduce
from operator import or_

import numpy as np
import numpy.typing as npt
import torch

from runtime.engine.gpu.request_table import RequestTable
from runtime.engine.gpu.staging import to_device
from runtime.engine.grammar.token_rules import mask_words
from runtime.engine.sequence import Sequence
from runtime.engine.step import TokenMasks
from runtime.kernels.gpu.sampling.mask import RowMasks
from runtime.kernels.gpu.sampling.parameters import (
    RECORD_WORDS,
    SamplingTables,
    Stages,
    needs_tables,
    pack,
)
from runtime.kernels.gpu.sampling.sampler import Batch, Sampler

_NO_STAGES = Stages()


class DeviceSampler:
    """The sampling parameters of the running sequences, and the kernels that follow them."""

    def __init__(self, table: RequestTable, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self._table = table
        self._tables = SamplingTables.allocate(num_slots, vocab_size, device)
        self._sampler = Sampler(self._tables, num_slots, vocab_size)
        self._stages = [_NO_STAGES] * num_slots
        # Made now, while nothing is under way: the copies do not wait for what memory held before.
        shape = (num_slots, mask_words(vocab_size))
        self._mask_bits = torch.empty(shape, dtype=torch.int32, device=device)
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

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
            self._stages[sequence.slot] = Stages.of(sequence.sampling)
            if needs_tables(sequence.sampling):
                # Rare, and large enough to wait for: tables of biases, stops and counts.
                prompt, generated = (
                    sequence.token_ids[: sequence.num_prompt],
                    sequence.token_ids[sequence.num_prompt :],
                )
                self._tables.enter(sequence.slot, sequence.sampling, sequence.seed, prompt, generated)

    def stages(self, sequences: Rows[Sequence]) -> Stages:
        """What sampling for these sequences takes, as long as they are in their slots."""
        return reduce(or_, {self._stages[sequence.slot] for sequence in sequences}, _NO_STAGES)

    def sample(self, batch: Batch, stages: Stages, masks: RowMasks | None) -> torch.Tensor:
        """One token a row, [R] int32."""
        num_rows = batch.logits.shape[0]
        tokens = torch.empty(num_rows, dtype=torch.int32, device=batch.logits.device)
        if num_rows:
            self._sampler.sample(batch, stages, tokens, self._table.last_token, self._table.seq_len, masks)
        return tokens

    def row_masks(self, sequences: Rows[Sequence], masks: TokenMasks) -> RowMasks:
        """Begin to copy masks to the device, beside whatever it computes; sampling waits for them.

        They are written over those of the step before, which must be through.
        """
        bits = self._mask_bits[: len(masks.sequences)]
        with torch.cuda.stream(self._copies):
            bits.copy_(masks.bits, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._copies)
        row_of = {id(sequence): row for row, sequence in enumerate(sequences)}
        return RowMasks(to_device([row_of[id(sequence)] for sequence in masks.sequences]), bits)
