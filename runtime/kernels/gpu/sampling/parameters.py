"""What the sampling kernels know of each request: one record a slot, and tables beside it."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from runtime.kernels.gpu.language import tl
from runtime.protocol import MAX_BIASES, MAX_STOPS, SamplingParams

RECORD_WORDS = 16

# A record: RECORD_WORDS little-endian 32-bit words, of which these are the places.
TEMPERATURE = tl.constexpr(0)
TOP_P = tl.constexpr(1)
MIN_P = tl.constexpr(2)
TOP_K = tl.constexpr(3)
SEED = tl.constexpr(4)  # two words, the low one first
REPETITION = tl.constexpr(6)
PRESENCE = tl.constexpr(7)
FREQUENCY = tl.constexpr(8)
FLAGS = tl.constexpr(9)
NUM_BIASES = tl.constexpr(10)
NUM_STOPS = tl.constexpr(11)
MIN_LENGTH = tl.constexpr(12)
WORDS = tl.constexpr(RECORD_WORDS)
_FORMAT = struct.Struct("<fffiQfffiiii12x")

# What `FLAGS` says: the logits are adjusted at all; penalties apply, so that tokens are counted.
ADJUSTED = tl.constexpr(1)
COUNTED = tl.constexpr(2)

# A cell of `counts` is how often the token was generated, plus this, the sign bit, if the prompt has it.
IN_PROMPT = -(1 << 31)
_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Stages:
    """What some row of a batch asks for beyond the likeliest token; the kernels run that far only."""

    draw: bool = False
    top_k: bool = False
    top_p: bool = False
    adjust: bool = False

    @classmethod
    def of(cls, sampling: SamplingParams) -> Stages:
        """What one request asks for."""
        draw = sampling.temperature > 0
        return cls(draw, draw and sampling.top_k > 0, draw and sampling.top_p < 1.0, _flags(sampling) != 0)

    def __or__(self, other: Stages) -> Stages:
        return Stages(
            self.draw or other.draw,
            self.top_k or other.top_k,
            self.top_p or other.top_p,
            self.adjust or other.adjust,
        )


def needs_tables(sampling: SamplingParams) -> bool:
    """Whether more than a record is kept of the request: biases, stop tokens or counts."""
    banned = sampling.min_tokens > 0 and sampling.stop_token_ids
    return bool(_counted(sampling) or banned or sampling.logit_bias)


def _counted(sampling: SamplingParams) -> bool:
    penalties = sampling.presence_penalty or sampling.frequency_penalty
    return bool(sampling.repetition_penalty != 1.0 or penalties)


def _flags(sampling: SamplingParams) -> int:
    adjusted = needs_tables(sampling) or sampling.masked
    return (COUNTED.value if _counted(sampling) else 0) | (ADJUSTED.value if adjusted else 0)


def pack(sampling: SamplingParams, seed: int, num_prompt: int) -> bytes:
    """One request's record, 4 * RECORD_WORDS bytes; `num_prompt` is the length of its prompt.

    Raises:
        ValueError: more biases or stop tokens than a slot has room for.
    """
    num_stops = len(sampling.stop_token_ids) if sampling.min_tokens > 0 else 0
    if len(sampling.logit_bias) > MAX_BIASES:
        raise ValueError(f"logit_bias names {len(sampling.logit_bias)} tokens; {MAX_BIASES} is the most")
    if num_stops > MAX_STOPS:
        raise ValueError(f"min_tokens holds back {num_stops} stop tokens; {MAX_STOPS} is the most")
    return _FORMAT.pack(
        sampling.temperature,
        sampling.top_p,
        sampling.min_p,
        sampling.top_k,
        seed & _MASK64,
        sampling.repetition_penalty,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        _flags(sampling),
        len(sampling.logit_bias),
        num_stops,
        num_prompt + sampling.min_tokens,
    )


@dataclass(frozen=True, slots=True)
class SamplingTables:
    """The sampling parameters of all slots, on the device.

    records      [num_slots, RECORD_WORDS] int32, see `pack`
    bias_ids     [num_slots, MAX_BIASES] int32, the first NUM_BIASES of a row count
    bias_values  [num_slots, MAX_BIASES] float32, what is added to their logits
    stop_ids     [num_slots, MAX_STOPS] int32: the first NUM_STOPS of a row must not come before the request
                 is MIN_LENGTH tokens long
    counts       [num_slots, vocab_size] int32, kept for requests with penalties only: see `IN_PROMPT`
    """

    records: torch.Tensor
    bias_ids: torch.Tensor
    bias_values: torch.Tensor
    stop_ids: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def allocate(cls, num_slots: int, vocab_size: int, device: torch.device | str) -> SamplingTables:
        """Tables for `num_slots` requests, each greedy."""
        return cls(
            torch.zeros((num_slots, RECORD_WORDS), dtype=torch.int32, device=device),
            torch.zeros((num_slots, MAX_BIASES), dtype=torch.int32, device=device),
            torch.zeros((num_slots, MAX_BIASES), device=device),
            torch.zeros((num_slots, MAX_STOPS), dtype=torch.int32, device=device),
            torch.zeros((num_slots, vocab_size), dtype=torch.int32, device=device),
        )

    def enter(
        self,
        slot: int,
        sampling: SamplingParams,
        seed: int,
        prompt: Iterable[int],
        generated: Iterable[int] = (),
    ) -> None:
        """Make `slot` that of a request with these tokens, some generated before it was preempted."""
        prompt_ids = torch.tensor(list(prompt), dtype=torch.int64)
        record = pack(sampling, seed, len(prompt_ids))
        self.records[slot].copy_(_int32(struct.unpack(f"<{RECORD_WORDS}i", record)))
        if sampling.logit_bias:
            size = len(sampling.logit_bias)
            self.bias_ids[slot, :size].copy_(_int32(sampling.logit_bias))
            self.bias_values[slot, :size].copy_(torch.tensor(list(sampling.logit_bias.values())))
        if sampling.min_tokens > 0 and sampling.stop_token_ids:
            self.stop_ids[slot, : len(sampling.stop_token_ids)].copy_(_int32(sampling.stop_token_ids))
        if _flags(sampling) & COUNTED.value:
            self._count(slot, prompt_ids, torch.tensor(list(generated), dtype=torch.int64))

    def _count(self, slot: int, prompt_ids: torch.Tensor, generated_ids: torch.Tensor) -> None:
        counts = self.counts[slot]
        counts.zero_()
        ids = generated_ids.to(counts.device)
        counts.index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        ids = prompt_ids.unique().to(counts.device)
        counts[ids] += IN_PROMPT


def _int32(values: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.int32)
