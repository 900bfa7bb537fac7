"""Requests at a sampler's door: what they ask for, whose rows they are, and the numbers they draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.kernels.gpu.sampling.mask import RowMasks
from runtime.kernels.gpu.sampling.parameters import SamplingTables, Stages
from runtime.kernels.gpu.sampling.sampler import Batch, Sampler
from runtime.protocol import Grammar, SamplingParams

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HIGHEST = (1 << 64) - 1
PROMPT = [1, 2, 3]
# What makes a request one whose logits are masked; the masks are the tests' own.
SOME_GRAMMAR = Grammar("", "response_format")


def asking(**changes: object) -> SamplingParams:
    """Parameters of a request, greedy unless it says otherwise."""
    return SamplingParams(max_tokens=9, **({"temperature": 0.0} | changes))  # type: ignore[arg-type]


def seed_for(bits: int, position: int) -> int:
    """The seed with which SplitMix64 gives these 64 bits at `position`: each of its steps undone."""
    mask = HIGHEST
    z = bits
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9), (30, None)):
        whole = z
        for _ in range(64 // shift):
            whole = z ^ (whole >> shift)
        z = whole if factor is None else whole * pow(factor, -1, 1 << 64) & mask
    return (z - (position + 1) * 0x9E3779B97F4A7C15) & mask


class Requests:
    """A sampler with requests in its slots, in an order that is not the rows'."""

    def __init__(
        self,
        asked: Sequence[SamplingParams],
        seeds: Sequence[int],
        vocab_size: int,
        chunk: int,
        generated: Sequence[int] = (),
        **settings: int,
    ) -> None:
        self.num_slots = len(asked) + 2
        self.tables = SamplingTables.allocate(self.num_slots, vocab_size, DEVICE)
        self.sampler = Sampler(self.tables, self.num_slots, vocab_size, chunk, **settings)
        self.slots = list(range(len(asked), 0, -1))
        self.stages = Stages()
        for slot, sampling, seed in zip(self.slots, asked, seeds, strict=True):
            self.tables.enter(slot, sampling, seed, PROMPT, generated)
            self.stages |= Stages.of(sampling)
        self.last_token = torch.full((self.num_slots,), -7, dtype=torch.int32, device=DEVICE)
        self.seq_len = torch.full((self.num_slots,), -7, dtype=torch.int32, device=DEVICE)

    def batch(self, logits: torch.Tensor, length: int, rows: Sequence[int] | None = None) -> Batch:
        """Rows of logits for all requests in order, or for those that `rows` names; -1 is padding."""
        slots = self.slots if rows is None else [self.slots[row] if row >= 0 else -1 for row in rows]
        lengths = torch.full((len(slots),), length, dtype=torch.int32, device=DEVICE)
        return Batch(logits.to(DEVICE), torch.tensor(slots, dtype=torch.int32, device=DEVICE), lengths)

    def tokens(
        self,
        logits: torch.Tensor,
        length: int,
        rows: Sequence[int] | None = None,
        masks: RowMasks | None = None,
    ) -> list[int]:
        """The token that each row gets; padding shows as -1."""
        tokens = torch.full((len(logits),), -1, dtype=torch.int32, device=DEVICE)
        batch = self.batch(logits, length, rows)
        self.sampler.sample(batch, self.stages, tokens, self.last_token, self.seq_len, masks)
        return tokens.tolist()


def random_masks(rows: Sequence[int], vocab_size: int, share: float, seed: int = 0) -> RowMasks:
    """Masks for these rows that leave about that share of the tokens, and one word more than they need."""
    generator = torch.Generator().manual_seed(seed)
    num_words = vocab_size // 32 + 2
    allowed = torch.rand(len(rows), num_words, 32, generator=generator) < share
    bits = (allowed.long() << torch.arange(32)).sum(-1).to(torch.int32)  # the highest bit is the sign
    return RowMasks(torch.tensor(rows, dtype=torch.int32, device=DEVICE), bits.to(DEVICE))
