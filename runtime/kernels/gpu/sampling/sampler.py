"""The stages of sampling in order, as far as a batch needs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.kernels.gpu.launch import cdiv, next_power_of_2
from runtime.kernels.gpu.sampling.adjust import adjust_kernel
from runtime.kernels.gpu.sampling.draw import draw_torch, masses_torch, pick_kernel, weigh_kernel
from runtime.kernels.gpu.sampling.mask import RowMasks, mask_kernel
from runtime.kernels.gpu.sampling.parameters import SamplingTables, Stages
from runtime.kernels.gpu.sampling.scan import best_torch, scan_kernel
from runtime.kernels.gpu.sampling.settle import collect_kernel, settle_kernel
from runtime.kernels.gpu.sampling.threshold import (
    BUCKETS,
    PASSES,
    narrow_kernel,
    probability_torch,
    threshold_torch,
)
from runtime.protocol import SamplingParams

_CHUNK = 4096
# How many tokens that may be the last one kept are looked at side by side.
_CANDIDATES = 2048
_WARPS = 8
# Weighing parts of an interval keeps many numbers at hand: more threads, fewer registers in each.
_NARROW_WARPS = 16


@dataclass(frozen=True, slots=True)
class Batch:
    """What is to be sampled: logits [R, vocab_size] and, [R] int32 each, whose they are.

    rows     the request's slot, or -1 for padding, whose token is left as it was
    lengths  how many tokens the request has: the position of the one to be drawn
    """

    logits: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor


class Sampler:
    """Draws tokens for up to `max_rows` rows at once, and owns the memory that this takes.

    Nothing is allocated and nothing read back while it runs, so that it can be captured in a CUDA graph.
    """

    def __init__(
        self,
        tables: SamplingTables,
        max_rows: int,
        vocab_size: int,
        chunk: int = _CHUNK,
        candidates: int = _CANDIDATES,
    ) -> None:
        device = tables.records.device
        self.tables = tables
        self.vocab_size = vocab_size
        self._max_rows = max_rows
        self.chunk = chunk
        self.num_chunks = -(-vocab_size // chunk)
        self._chunks = next_power_of_2(self.num_chunks)
        cells = (max_rows, self.num_chunks)
        # Rows that begin at multiples of 16 elements can be read in the widest loads.
        padded = cdiv(vocab_size, 16) * 16
        self._adjusted = torch.empty((max_rows, padded), device=device)
        self._best_logit = torch.empty(cells, device=device)
        self._best_token = torch.empty(cells, dtype=torch.int32, device=device)
        self._worst_logit = torch.empty(cells, device=device)
        self._threshold = torch.empty(max_rows, dtype=torch.int32, device=device)
        self._mass = torch.empty(cells, dtype=torch.int64, device=device)
        self._interval = torch.empty((2 * max_rows, 3), dtype=torch.int64, device=device)
        self._buckets = torch.empty(
            (2 * max_rows, self.num_chunks, BUCKETS.value), dtype=torch.int64, device=device
        )
        self._found = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._candidates = torch.empty((max_rows, candidates), dtype=torch.int32, device=device)

    def sample(
        self,
        batch: Batch,
        stages: Stages,
        tokens: torch.Tensor,
        last_token: torch.Tensor,
        seq_len: torch.Tensor,
        masks: RowMasks | None = None,
    ) -> None:
        """Choose each row's next token and write it to tokens [R] int32.

        `stages` are those that any row asks for; `masks` are for rows whose requests have a grammar. The
        requests' state moves on (see `prepare.py`):
        last_token[slot] becomes the token, seq_len[slot] the row's length, and the token is counted where
        penalties want that. The logits stay as they are.

        Raises:
            ValueError: more rows than the sampler has memory for.
        """
        if batch.rows.shape[0] > self._max_rows:
            raise ValueError(f"{batch.rows.shape[0]} rows to sample; this sampler takes {self._max_rows}")
        if stages.adjust:
            self.adjust(batch)
        if masks is not None:
            self.mask(masks)
        self._scan(batch, stages.adjust)
        if stages.draw:
            if stages.top_k:
                self._cut(batch, stages.adjust, by_count=True)
            if stages.top_p:
                self._weigh(batch, stages.adjust, use_min_p=False)
                self._cut(batch, stages.adjust, by_count=False)
            self._weigh(batch, stages.adjust, use_min_p=True)
        self._pick(batch, stages, tokens, last_token, seq_len)

    def _source(self, batch: Batch) -> tuple[torch.Tensor | int, ...]:
        """What every kernel takes to read logits, plain or adjusted."""
        logits, adjusted = batch.logits, self._adjusted
        return logits, logits.stride(0), adjusted, adjusted.stride(0), self.tables.records

    def _grid(self, batch: Batch) -> tuple[int, int]:
        return self.num_chunks, batch.rows.shape[0]

    def adjust(self, batch: Batch) -> torch.Tensor:
        """The logits as their requests want them adjusted, [R, vocab_size] float32.

        The rows of requests that ask for nothing of the kind are left as they were.
        """
        tables = self.tables
        adjust_kernel[self._grid(batch)](
            *self._source(batch),
            tables.bias_ids,
            tables.bias_values,
            tables.stop_ids,
            tables.counts,
            batch.rows,
            batch.lengths,
            self.vocab_size,
            CHUNK=self.chunk,
            num_warps=_WARPS,
        )
        return self._adjusted[: batch.rows.shape[0], : self.vocab_size]

    def mask(self, masks: RowMasks) -> None:
        """Rule out, in the adjusted logits, what the masks do."""
        mask_kernel[self.num_chunks, masks.rows.shape[0]](
            self._adjusted,
            self._adjusted.stride(0),
            masks.rows,
            masks.bits,
            masks.bits.stride(0),
            self.vocab_size,
            CHUNK=self.chunk,
            num_warps=_WARPS,
        )

    def _scan(self, batch: Batch, adjust: bool) -> None:
        scan_kernel[self._grid(batch)](
            *self._source(batch),
            batch.rows,
            self._best_logit,
            self._best_token,
            self._worst_logit,
            self._threshold,
            self.vocab_size,
            CHUNK=self.chunk,
            ADJUST=adjust,
            num_warps=_WARPS,
        )

    def _cut(self, batch: Batch, adjust: bool, by_count: bool) -> None:
        num_rows = batch.rows.shape[0]
        for done in range(PASSES):
            narrow_kernel[self._grid(batch)](
                *self._source(batch),
                batch.rows,
                self._best_logit,
                self._worst_logit,
                self._mass,
                self._threshold,
                self._interval,
                self._buckets,
                done,
                num_rows,
                self.vocab_size,
                CHUNK=self.chunk,
                CHUNKS=self._chunks,
                ADJUST=adjust,
                BY_COUNT=by_count,
                num_warps=_NARROW_WARPS,
            )
        search = self._interval, self._buckets, self._found, self._candidates, num_rows
        shape = {
            "PASSES": PASSES,
            "CAPACITY": self._candidates.shape[1],
            "CHUNK": self.chunk,
            "CHUNKS": self._chunks,
            "ADJUST": adjust,
            "BY_COUNT": by_count,
            "num_warps": _WARPS,
        }
        source = *self._source(batch), batch.rows, self._best_logit, self._mass
        collect_kernel[self._grid(batch)](*source, *search, self.vocab_size, **shape)
        settle_kernel[(num_rows,)](
            *source, self._threshold, *search, self.num_chunks, self.vocab_size, **shape
        )

    def _weigh(self, batch: Batch, adjust: bool, use_min_p: bool) -> None:
        weigh_kernel[self._grid(batch)](
            *self._source(batch),
            batch.rows,
            self._best_logit,
            self._threshold,
            self._mass,
            self.vocab_size,
            CHUNK=self.chunk,
            CHUNKS=self._chunks,
            ADJUST=adjust,
            USE_MIN_P=use_min_p,
            num_warps=_WARPS,
        )

    def _pick(
        self,
        batch: Batch,
        stages: Stages,
        tokens: torch.Tensor,
        last_token: torch.Tensor,
        seq_len: torch.Tensor,
    ) -> None:
        pick_kernel[(batch.rows.shape[0],)](
            *self._source(batch),
            self.tables.counts,
            batch.rows,
            batch.lengths,
            self._best_logit,
            self._best_token,
            self._threshold,
            self._mass,
            tokens,
            last_token,
            seq_len,
            self.num_chunks,
            self.vocab_size,
            CHUNK=self.chunk,
            CHUNKS=self._chunks,
            ADJUST=stages.adjust,
            DRAW=stages.draw,
            num_warps=_WARPS if stages.draw else 1,
        )


def sample_torch(logits: torch.Tensor, sampling: SamplingParams, uniform: int) -> int:
    """The plain twin, for one row [vocab_size], already adjusted: see `kept_torch`.

    `uniform` is 64 random bits.
    """
    if sampling.temperature <= 0:
        return best_torch(logits)
    return draw_torch(kept_torch(logits, sampling), uniform)


def kept_torch(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """The masses of the tokens that top-k, then top-p of what that leaves, and min-p leave."""
    logits = logits.float()
    distance = torch.where(logits == logits.max(), 0.0, logits.max() - logits)
    mass = masses_torch(distance, sampling.temperature)
    kept = torch.ones_like(mass, dtype=torch.bool)
    if 0 < sampling.top_k < len(mass):
        kept &= distance <= threshold_torch(distance, torch.ones_like(mass), sampling.top_k)
    if sampling.top_p < 1.0:
        share = float(torch.tensor(sampling.top_p)) * float((mass * kept).sum())
        target = max(1, -int(-share // 1))
        kept &= distance <= threshold_torch(distance, mass * kept, target)
    kept &= probability_torch(distance, sampling.temperature) >= sampling.min_p
    return mass * kept
