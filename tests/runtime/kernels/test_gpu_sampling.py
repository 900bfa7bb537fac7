"""Sampling on the device against transformers' logits processors, the formulas, and chance itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.engine.sampler import uniform
from runtime.kernels.gpu.sampling.draw import load_seed, uniform_bits
from runtime.kernels.gpu.sampling.parameters import SamplingTables
from runtime.kernels.gpu.sampling.sampler import kept_torch, sample_torch
from runtime.protocol import SamplingParams
from tests.runtime.kernels.sampling_requests import DEVICE, HIGHEST, PROMPT, Requests, asking, seed_for

# numpy, in the interpreter, is surprised by 64-bit integers that wrap around.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")
VOCAB, CHUNK = 300, 128
LENGTH = 40
CUTS: list[dict[str, Any]] = [
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 7},
    {"temperature": 0.7, "top_k": 299},
    {"temperature": 1.0, "top_p": 0.3},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.2, "top_p": 0.999},
    {"temperature": 30.0, "top_p": 0.6},
    {"temperature": 1.5, "top_k": 12, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02},
    {"temperature": 1.0, "top_p": 0.0},
    {"temperature": 1.0},
]


def kept_by_transformers(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Which tokens of one row transformers would draw from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if 0 < sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    elif sampling.top_p == 0:
        warpers.append(TopKLogitsWarper(1))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(None, logits[None].clone())[0] > -torch.inf


@triton.jit
def _uniform_kernel(records_ptr, positions_ptr, out_ptr):
    index = tl.program_id(0)
    tl.store(
        out_ptr + index,
        uniform_bits(load_seed(records_ptr, index), tl.load(positions_ptr + index)).to(tl.int64),
    )


def test_uniform_numbers_are_the_cpus() -> None:
    seeds = [0, 1, 2**31, 2**32 + 5, 2**63 - 1, 2**64 - 1, 123456789012345678]
    positions = [0, 1, 7, 2**20, 2**31 - 2, 3, 131071]
    tables = SamplingTables.allocate(len(seeds), 1, DEVICE)
    for slot, seed in enumerate(seeds):
        tables.enter(slot, asking(), seed, PROMPT)
    out = torch.empty(len(seeds), dtype=torch.int64, device=DEVICE)

    _uniform_kernel[(len(seeds),)](
        tables.records, torch.tensor(positions, dtype=torch.int32, device=DEVICE), out
    )

    expected = [uniform(seed, position) for seed, position in zip(seeds, positions, strict=True)]
    assert [(bits % 2**64 >> 11) / 2**53 for bits in out.tolist()] == expected


def test_seed_for_undoes_the_hash() -> None:
    """The tests below stand on this."""
    for bits in (0, HIGHEST, 0x0123456789ABCDEF):
        assert uniform(seed_for(bits, LENGTH), LENGTH) == (bits >> 11) / 2**53


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_greedy_takes_the_lowest_of_the_best(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB).to(dtype)
    logits[1, [200, 130, 299]] = 9.0
    logits[2, :] = -torch.inf
    logits[2, 250] = -5.0
    logits[3, [5, 290]] = torch.inf
    requests = Requests([asking()] * 4, range(4), VOCAB, CHUNK)

    tokens = requests.tokens(logits, LENGTH)

    assert tokens == [int(logits[0].argmax()), 130, 250, 5]


class TestCuts:
    """The logits fall with the token's id, so the highest number draws the last token that is kept."""

    @pytest.fixture
    def logits(self) -> torch.Tensor:
        torch.manual_seed(1)
        return (torch.randn(VOCAB) * 2).sort(descending=True).values

    def test_twin_keeps_what_transformers_keeps(self, logits: torch.Tensor) -> None:
        for cut in CUTS:
            sampling = asking(**cut)
            assert torch.equal(kept_torch(logits, sampling) > 0, kept_by_transformers(logits, sampling)), cut

    @pytest.mark.parametrize("candidates", [2048, 2], ids=["room for all", "room for two"])
    def test_kernels_keep_what_transformers_keeps(self, logits: torch.Tensor, candidates: int) -> None:
        asked = [asking(**cut) for cut in CUTS]
        seeds = [seed_for(HIGHEST, LENGTH)] * len(CUTS)
        requests = Requests(asked, seeds, VOCAB, CHUNK, candidates=candidates)

        last = requests.tokens(logits.expand(len(CUTS), -1), LENGTH)

        assert last == [int(kept_by_transformers(logits, sampling).sum()) - 1 for sampling in asked]

    def test_ties_with_the_last_one_are_kept(self) -> None:
        logits = torch.tensor([4.0] * 2 + [3.0] * 3 + [2.0] * 4 + [-torch.inf] * 3)
        asked = [asking(temperature=1.0, **cut) for cut in ({"top_k": 3}, {"top_k": 6}, {"top_p": 0.7})]
        requests = Requests(asked, [seed_for(HIGHEST, LENGTH)] * 3, len(logits), CHUNK)

        assert requests.tokens(logits.expand(3, -1), LENGTH) == [4, 8, 4]

    def test_distances_of_any_size_are_told_apart(self) -> None:
        """Whole binades apart, or one unit in the last place."""
        steps = torch.tensor([1.0, 1.0 - 2**-24, 0.5, -1e-30, -3.0, -1e4, -1e30])
        asked = [asking(temperature=1.0, top_k=k) for k in range(1, 7)] + [asking(temperature=5e30, top_k=6)]
        requests = Requests(asked, [seed_for(HIGHEST, LENGTH)] * 7, len(steps), CHUNK)

        last = requests.tokens(steps.expand(7, -1), LENGTH)

        # What is 10^4 away has no probability left, kept or not, unless all is as good as equal.
        assert last == [0, 1, 2, 3, 4, 4, 5]


def test_tokens_are_the_twins() -> None:
    torch.manual_seed(2)
    asked = [asking(**cut) for cut in CUTS]
    seeds = [1000 + index for index in range(len(CUTS))]
    logits = torch.randn(len(CUTS), VOCAB) * 2

    tokens = Requests(asked, seeds, VOCAB, CHUNK).tokens(logits, LENGTH)

    bits = [int(uniform(seed, LENGTH) * 2**53) << 11 for seed in seeds]
    assert tokens == [sample_torch(*row) for row in zip(logits, asked, bits, strict=True)]


def test_a_rows_token_depends_on_nothing_else() -> None:
    torch.manual_seed(3)
    asked = [
        asking(temperature=1.0),
        asking(),
        asking(temperature=0.9, top_p=0.9),
        asking(frequency_penalty=1.0),
    ]
    logits = torch.randn(4, VOCAB)
    together = Requests(asked, [5, 6, 7, 8], VOCAB, CHUNK)
    whole = together.tokens(logits, LENGTH)

    order = [2, -1, 0, 3]
    shuffled = Requests(asked, [5, 6, 7, 8], VOCAB, CHUNK).tokens(logits[order], LENGTH, order)
    alone = [
        Requests([sampling], [seed], VOCAB, CHUNK).tokens(row[None], LENGTH)[0]
        for sampling, seed, row in zip(asked, [5, 6, 7, 8], logits, strict=True)
    ]

    assert shuffled == [whole[2], -1, whole[0], whole[3]]
    assert alone == whole


def test_draws_follow_the_distribution() -> None:
    """Pearson's chi-square over 9 outcomes stays below 26.1 for 999 in 1000 fair samplers."""
    draws = 300
    logits = torch.linspace(0.0, 2.0, 9).repeat(draws, 1)
    requests = Requests([asking(temperature=0.8)] * draws, range(draws), 9, 16)

    counts = torch.bincount(torch.tensor(requests.tokens(logits, LENGTH)), minlength=9)

    expected = (logits[0] / 0.8).softmax(-1) * draws
    assert float(((counts - expected) ** 2 / expected).sum()) < 26.1


class TestAdjustments:
    GENERATED = [4, 4, 4, 2, 250]

    @pytest.fixture
    def logits(self) -> torch.Tensor:
        torch.manual_seed(4)
        return torch.randn(VOCAB) * 3

    def adjusted(self, logits: torch.Tensor, length: int = LENGTH, **asked: Any) -> torch.Tensor:
        requests = Requests([asking(**asked)], [0], VOCAB, CHUNK, self.GENERATED)
        assert requests.stages.adjust
        return requests.sampler.adjust(requests.batch(logits[None], length))[0].cpu()

    def test_repetition_counts_prompt_and_output(self, logits: torch.Tensor) -> None:
        processor = RepetitionPenaltyLogitsProcessor(1.3)
        expected = processor(torch.tensor([PROMPT + self.GENERATED]), logits[None].clone())[0]

        torch.testing.assert_close(self.adjusted(logits, repetition_penalty=1.3), expected)

    def test_presence_and_frequency_count_the_output(self, logits: torch.Tensor) -> None:
        counts = torch.bincount(torch.tensor(self.GENERATED), minlength=VOCAB)
        expected = logits - counts * 0.5 - (counts > 0) * 0.25

        adjusted = self.adjusted(logits, presence_penalty=0.25, frequency_penalty=0.5)

        torch.testing.assert_close(adjusted, expected)

    def test_bias(self, logits: torch.Tensor) -> None:
        expected = logits.clone()
        expected[[0, 127, 128, 299]] += torch.tensor([5.0, -100.0, 1.5, 100.0])

        adjusted = self.adjusted(logits, logit_bias={299: 100.0, 0: 5.0, 128: 1.5, 127: -100.0})

        assert torch.equal(adjusted, expected)

    @pytest.mark.parametrize(("length", "banned"), [(len(PROMPT) + 5, True), (len(PROMPT) + 6, False)])
    def test_stop_tokens_wait_for_the_minimum(self, logits: torch.Tensor, length: int, banned: bool) -> None:
        expected = logits.clone()
        if banned:
            expected[[7, 290]] = -torch.inf
        else:
            expected[7] += 3.0

        bias = {} if banned else {7: 3.0}
        adjusted = self.adjusted(logits, length, min_tokens=6, stop_token_ids=(7, 290), logit_bias=bias)

        assert torch.equal(adjusted, expected)

    def test_all_at_once_and_the_logits_stay(self, logits: torch.Tensor) -> None:
        before = logits.clone()
        expected = RepetitionPenaltyLogitsProcessor(0.7)(
            torch.tensor([PROMPT + self.GENERATED]), logits[None].clone()
        )[0]
        counts = torch.bincount(torch.tensor(self.GENERATED), minlength=VOCAB)
        expected -= counts * 0.5 + (counts > 0) * -1.0
        expected[[4, 9]] += 2.0
        expected[9] = -torch.inf

        adjusted = self.adjusted(
            logits, 5, repetition_penalty=0.7, presence_penalty=-1.0, frequency_penalty=0.5,
            logit_bias={4: 2.0, 9: 2.0}, min_tokens=9, stop_token_ids=(9,),
        )  # fmt: skip

        torch.testing.assert_close(adjusted, expected)
        assert torch.equal(logits, before)

    def test_tokens_are_chosen_after_adjusting_and_counted(self) -> None:
        """A penalty for what was said makes a greedy request walk through its likeliest tokens."""
        logits = torch.zeros(1, VOCAB)
        logits[0, [200, 100, 50]] = torch.tensor([3.0, 2.5, 2.2])
        requests = Requests([asking(frequency_penalty=1.0)], [0], VOCAB, CHUNK)

        tokens = [requests.tokens(logits, LENGTH + step)[0] for step in range(6)]

        assert tokens == [200, 100, 50, 200, 100, 50]


def test_the_requests_state_moves_on() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[range(3), [9, 8, 7]] = 1.0
    requests = Requests([asking(), asking()], [0, 0], VOCAB, CHUNK)

    tokens = requests.tokens(logits, 17, [1, -1, 0])

    assert tokens == [9, -1, 7]
    first, second = requests.slots
    last_token, seq_len = [-7] * requests.num_slots, [-7] * requests.num_slots
    last_token[second], last_token[first] = 9, 7
    seq_len[second] = seq_len[first] = 17
    assert requests.last_token.tolist() == last_token
    assert requests.seq_len.tolist() == seq_len
