"""Carries out steps on the CPU, one after the other."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch

from runtime.engine.cpu.decode import DecodeTapes
from runtime.engine.sampler import sample, token_logprobs
from runtime.engine.scheduler import Scheduled
from runtime.engine.sequence import Sequence
from runtime.engine.step import StepResult, TokenMasks
from runtime.kernels.attention import query_tile
from runtime.kernels.batch import PackedBatch
from runtime.model.decoder import CausalLM
from runtime.model.layers import LayerCache
from runtime.protocol import TokenLogprobs


@dataclass(slots=True)
class _Step:
    """A step whose logits were there when it was launched; they are used up by sampling."""

    sequences: list[Sequence]
    logits: torch.Tensor
    step: StepResult

    @torch.inference_mode()
    def sample(self, masks: TokenMasks | None = None) -> None:
        """Draw its tokens; see `Launched.sample`."""
        if self.sequences:
            _sample(self.logits, self.sequences, masks, self.step)

    def result(self) -> StepResult:
        return self.step


class HostRunner:
    """The model, its paged cache, and the packing of a step's tokens into one batch; a `Runner`."""

    steps_ahead = 0
    usual_prompt = 1

    def __init__(self, decoder: CausalLM, num_blocks: int, block_size: int, dtype: torch.dtype) -> None:
        config = decoder.config
        self.decoder = decoder
        self.vocab_size = config.vocab_size
        self.block_size = block_size
        keys = (num_blocks, config.num_kv_heads, config.head_dim, block_size)
        values = (num_blocks, config.num_kv_heads, block_size, config.head_dim)
        # Memory that is never written is never touched, so an idle pool costs nothing.
        self.cache = [
            LayerCache(torch.empty(keys, dtype=dtype), torch.empty(values, dtype=dtype))
            for _ in range(config.num_layers)
        ]
        self._tapes = DecodeTapes(decoder, self.cache, num_blocks, block_size)
        self.tile = query_tile(config.num_heads, config.num_kv_heads, config.head_dim, block_size) or 1

    @torch.inference_mode()
    def launch(self, scheduled: Rows[Scheduled]) -> _Step:
        """Compute what is scheduled; see `Runner.launch`."""
        logits = self._tapes.logits(scheduled)
        if logits is None:
            logits = self.decoder.forward(self._pack(scheduled), self.cache)
        result = StepResult()
        rows: list[int] = []
        at = 0
        for item in scheduled:
            if item.scores_prompt:
                result.prompt_logprobs.append(_prompt_logprobs(item, logits[at : at + item.num_new]))
                at += item.num_new
            elif item.samples:
                at += 1
            if item.samples:
                rows.append(at - 1)
        if len(rows) != logits.shape[0]:
            logits = logits[torch.tensor(rows, dtype=torch.long)]
        return _Step([item.sequence for item in scheduled if item.samples], logits, result)

    def use_idle_time(self) -> bool:
        """Nothing is left for later on a CPU; see `Runner.use_idle_time`."""
        return False

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
            start, stop = item.start, item.start + item.num_new
            block_ids = sequence.table.block_ids
            tables[row, : len(block_ids)] = block_ids
            span = np.arange(start, stop)
            token_ids[begin:end] = sequence.token_ids[start:stop]
            positions[begin:end] = span + sequence.position_base
            slots[begin:end] = tables[row, span // self.block_size].astype(np.int64) * self.block_size + (
                span % self.block_size
            )
            if item.scores_prompt:
                logits_rows.extend(range(begin, end))
            elif item.samples:
                logits_rows.append(end - 1)
            work_items.extend((row, first) for first in range(0, item.num_new, self.tile))
        return PackedBatch(
            token_ids=torch.from_numpy(token_ids),
            positions=torch.from_numpy(positions),
            slots=torch.from_numpy(slots),
            query_start=torch.from_numpy(ends.astype(np.int32)),
            seq_lens=torch.tensor([item.start + item.num_new for item in scheduled], dtype=torch.int32),
            block_tables=torch.from_numpy(tables),
            work_items=torch.tensor(work_items, dtype=torch.int32),
            logits_rows=torch.tensor(logits_rows, dtype=torch.int64),
        )


def _prompt_logprobs(item: Scheduled, logits: torch.Tensor) -> list[TokenLogprobs]:
    """Entries for the prompt tokens after each of the chunk's own; logits [num_new, vocab_size]."""
    sequence = item.sequence
    targets = sequence.token_ids[item.start + 1 : min(item.start + item.num_new + 1, sequence.num_prompt)]
    return token_logprobs(logits[: len(targets)], targets, sequence.sampling.prompt_logprobs or 0)


def _sample(
    logits: torch.Tensor, sequences: Rows[Sequence], masks: TokenMasks | None, result: StepResult
) -> None:
    """Draw each sequence's next token; logits [R, vocab_size], row by row theirs, are used up."""
    wanted = [row for row, sequence in enumerate(sequences) if sequence.sampling.logprobs is not None]
    untouched = logits[torch.tensor(wanted, dtype=torch.long)]
    result.tokens = sample(logits, sequences, masks)
    result.logprobs = [None] * len(result.tokens)
    for index, row in enumerate(wanted):
        num_top = sequences[row].sampling.logprobs or 0
        (entry,) = token_logprobs(untouched[index : index + 1], [result.tokens[row]], num_top)
        result.logprobs[row] = entry
