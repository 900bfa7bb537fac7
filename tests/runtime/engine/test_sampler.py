"""Sampling against transformers' logits processors, the formulas, and chance itself."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.catalogue import ModelSpec
from runtime.engine.core import Engine
from runtime.engine.penalties import adjust
from runtime.engine.sampler import sample, token_logprobs
from runtime.engine.sequence import Sequence
from runtime.engine.start import start
from runtime.protocol import EngineConfig, SamplingParams, Submit

VOCAB = 60
DRAWS = 4000
PROMPT = [3, 5, 5, 8]
GREEDY: dict[str, Any] = {"temperature": 0.0}


def asking(seed: int = 0, generated: Iterable[int] = (), **sampling: Any) -> Sequence:
    """A sequence that has generated these tokens and is about to get its next."""
    request = Submit(
        request_id=str(seed),
        prompt_token_ids=PROMPT,
        sampling=SamplingParams(**({"max_tokens": 500} | sampling)),
    )
    sequence = Sequence(request, order=0, seed=seed, max_model_len=1000)
    sequence.token_ids += generated
    return sequence


def some_logits(vocab_size: int = VOCAB, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(7)) * spread


def drawn(logits: torch.Tensor, draws: int = DRAWS, **sampling: Any) -> torch.Tensor:
    """How often each token comes, over as many seeds."""
    sequences = [asking(seed, **sampling) for seed in range(draws)]
    tokens = sample(logits.repeat(draws, 1), sequences)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)).double()


def assert_drawn_from(probabilities: torch.Tensor, counts: torch.Tensor) -> None:
    """Pearson's chi-square test; tokens that are expected less than five times count as one."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities.double() * counts.sum()
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = float(((observed - expected) ** 2 / expected.clamp(min=1)).sum())
    freedom = max(1, len(expected) - 1)
    # Wilson and Hilferty (1931): what chance exceeds once in thirty thousand times.
    assert statistic < freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3


def warped(logits: torch.Tensor, **sampling: Any) -> torch.Tensor:
    """The probabilities that transformers would draw from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.get("temperature", 1.0))])
    if sampling.get("top_k"):
        warpers.append(TopKLogitsWarper(sampling["top_k"]))
    if sampling.get("top_p", 1.0) < 1:
        warpers.append(TopPLogitsWarper(sampling["top_p"]))
    if sampling.get("min_p"):
        warpers.append(MinPLogitsWarper(sampling["min_p"]))
    return warpers(None, logits[None].clone())[0].softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 10 * VOCAB},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
        {"temperature": 1.4, "top_k": 30, "top_p": 0.95, "min_p": 0.02},
    ],
    ids=str,
)
def test_tokens_come_as_often_as_transformers_says(sampling: dict[str, Any]) -> None:
    logits = some_logits()
    assert_drawn_from(warped(logits, **sampling), drawn(logits, **sampling))


@pytest.mark.parametrize("spread", [0.2, 1.5])
@pytest.mark.parametrize(
    "sampling",
    [{"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 2000}, {"top_p": 0.1}, {"top_k": 500, "top_p": 0.2}],
    ids=str,
)
def test_sets_of_thousands_of_tokens(sampling: dict[str, Any], spread: float) -> None:
    logits = some_logits(3000, spread)
    probabilities = warped(logits, **sampling)
    counts = drawn(logits, 1000, **sampling)
    assert counts[probabilities == 0].sum() == 0
    # Where all are alike, tens of tokens share a bucket, or none would be expected often enough.
    size = 20 if spread < 1 else 1
    order = probabilities.argsort(descending=True)
    buckets = probabilities[order].double().view(-1, size).sum(1), counts[order].view(-1, size).sum(1)
    assert_drawn_from(*buckets)


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = some_logits()
    logits[[9, 30, 31]] = 50.0
    assert sample(logits[None].clone(), [asking(**GREEDY)]) == [9]


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-30, 1e-45])
@pytest.mark.parametrize("narrowed", [{}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_hardly_any_temperature_is_greedy(temperature: float, narrowed: dict[str, Any]) -> None:
    logits = some_logits() * 10
    counts = drawn(logits, 50, temperature=temperature, **narrowed)
    assert counts[logits.argmax()] == 50


def test_a_token_that_is_ruled_out_never_comes() -> None:
    logits = some_logits()
    logits[::2] = -torch.inf
    for sampling in ({}, {"top_p": 0.99}, {"top_k": 50}, {"min_p": 1e-9}):
        assert drawn(logits, 500, **sampling)[::2].sum() == 0


def test_one_step_for_requests_of_every_kind() -> None:
    """What each request gets is what it would get alone."""
    kinds: list[dict[str, Any]] = [
        {},
        GREEDY,
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.5, "temperature": 2.0},
        {"min_p": 0.2},
        {"repetition_penalty": 1.8, "temperature": 0.3},
        {"presence_penalty": 1.5},
        {"logit_bias": {4: 9.0}},
        {"top_k": 3, "frequency_penalty": -1.0, "logit_bias": {1: -100.0}},
    ]
    logits = torch.randn(80, VOCAB, generator=torch.Generator().manual_seed(1)) * 3

    def sequences() -> list[Sequence]:
        return [asking(row, [7, 7, row % VOCAB], **kinds[row % len(kinds)]) for row in range(80)]

    together = sample(logits.clone(), sequences())
    alone = [sample(logits[row : row + 1].clone(), [one])[0] for row, one in enumerate(sequences())]
    backwards = sample(logits.flip(0), sequences()[::-1])[::-1]
    assert together == alone == backwards


def test_each_token_of_a_request_is_a_draw_of_its_own() -> None:
    logits = torch.zeros(1, VOCAB)
    tokens = [sample(logits.clone(), [asking(5, range(done))])[0] for done in range(DRAWS // 4)]
    assert_drawn_from(torch.full((VOCAB,), 1 / VOCAB), torch.bincount(torch.tensor(tokens), minlength=VOCAB))


class TestPenalties:
    def test_repetition_is_transformers(self) -> None:
        logits = some_logits()
        for penalty in (0.7, 1.3):
            sequence = asking(generated=[11, 12, 12], repetition_penalty=penalty)
            ours = logits.clone()
            adjust(ours, sequence)
            seen = torch.tensor([sequence.token_ids])
            theirs = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits[None].clone())[0]
            torch.testing.assert_close(ours, theirs)

    def test_presence_and_frequency_are_openais(self) -> None:
        """logits[j] - count[j] * frequency - (count[j] > 0) * presence, over the output alone."""
        logits = some_logits()
        generated = [3, 20, 20, 20, 40]
        adjust(
            ours := logits.clone(), asking(generated=generated, presence_penalty=0.7, frequency_penalty=-0.4)
        )
        expected = logits.clone()
        for token, count in ((3, 1), (20, 3), (40, 1)):
            expected[token] += 0.4 * count - 0.7
        torch.testing.assert_close(ours, expected)

    def test_they_follow_the_answer_as_it_grows(self) -> None:
        settings = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3}
        growing = asking(**settings)
        for token in (20, 3, 20, 41):
            growing.token_ids.append(token)
            adjust(ours := some_logits(), growing)
            adjust(anew := some_logits(), asking(generated=growing.token_ids[len(PROMPT) :], **settings))
            assert torch.equal(ours, anew)

    def test_a_bias_is_added_after_all_penalties(self) -> None:
        settings = {"repetition_penalty": 1.5, "frequency_penalty": 1.0}
        adjust(without := some_logits(), asking(generated=[3], **settings))
        adjust(biased := some_logits(), asking(generated=[3], logit_bias={3: 2.5, 50: -100.0}, **settings))
        without[3] += 2.5
        without[50] -= 100
        torch.testing.assert_close(biased, without)

    def test_biases_force_and_forbid(self) -> None:
        likeliest = int(some_logits().argmax())
        assert drawn(some_logits(), 300, logit_bias={33: 100.0})[33] == 300
        assert drawn(some_logits(), 300, logit_bias={likeliest: -100.0})[likeliest] == 0

    def test_stop_tokens_wait_for_the_minimum(self) -> None:
        settings: dict[str, Any] = {"min_tokens": 3, "stop_token_ids": (9, 10), "logit_bias": {9: 100.0}}
        for done in range(3):
            assert drawn(some_logits(), 100, generated=[1] * done, **settings)[[9, 10]].sum() == 0
        assert drawn(some_logits(), 100, generated=[1] * 3, **settings)[9] == 100


def test_log_probabilities_and_ranks() -> None:
    logits = torch.stack([some_logits(), some_logits() * 0.1])
    first, second = token_logprobs(logits, [17, 4], 3)
    for entry, row, token in ((first, logits[0], 17), (second, logits[1], 4)):
        exact = row.double().log_softmax(-1)
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(exact[token]), abs=1e-5)
        assert entry.rank == int((row > row[token]).sum()) + 1
        best = row.sort(descending=True).indices[:3].tolist()
        assert [token for token, _ in entry.top] == best
        assert [logprob for _, logprob in entry.top] == pytest.approx(exact[best].tolist(), abs=1e-5)


# ---- through the engine ----------------------------------------------------------------------------


def answers(engine: Engine, requests: dict[str, SamplingParams]) -> dict[str, list[int]]:
    """The tokens of each request, all submitted at once."""
    for place, (name, sampling) in enumerate(requests.items()):
        prompt = [ord(name[0]), 30, 40 + len(name) % 7] + [50] * (
            place % 3 if name.startswith("other") else 0
        )
        engine.submit(Submit(request_id=name, prompt_token_ids=prompt, sampling=sampling))
    found: dict[str, list[int]] = {name: [] for name in requests}
    while engine.has_work:
        for delta in engine.step().deltas:
            assert delta.error is None
            found[delta.request_id] += delta.token_ids
    return found


@pytest.fixture
def new_engine(tiny_model: Path, tmp_path: Path) -> Any:
    def make(seed: int = 0) -> Engine:
        model = ModelSpec(id="tiny", source=str(tiny_model))
        config = EngineConfig(model=model, cache_dir=str(tmp_path), device="cpu", seed=seed, max_num_seqs=8)
        return start(config, lambda event: None)[0]

    return make


def test_a_seeded_request_answers_alike_in_any_company(new_engine: Any) -> None:
    mine = {"mine": SamplingParams(max_tokens=20, temperature=1.0, seed=42)}
    others = {
        f"other{index}": SamplingParams(max_tokens=5 + index, top_p=0.9, temperature=index / 4)
        for index in range(10)
    }
    engine = new_engine()
    alone = answers(engine, mine)["mine"]
    assert answers(engine, others | mine)["mine"] == alone
    assert answers(new_engine(seed=9), mine | others)["mine"] == alone
    other_seed = {"mine": SamplingParams(max_tokens=20, temperature=1.0, seed=43)}
    assert answers(engine, other_seed)["mine"] != alone


def test_requests_without_a_seed_differ_but_an_engines_seed_repeats_them(new_engine: Any) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=1.0)
    first, again, another = new_engine(), new_engine(), new_engine(seed=1)
    one = answers(first, {"same": sampling})["same"]
    assert answers(first, {"same": sampling})["same"] != one
    assert answers(again, {"same": sampling})["same"] == one
    assert answers(another, {"same": sampling})["same"] != one


def test_the_engine_heeds_a_minimum_and_ends_at_a_stop_token(new_engine: Any) -> None:
    engine = new_engine()
    everything = tuple(range(engine.vocab_size - 1))
    asked = {
        "short": SamplingParams(max_tokens=9, temperature=1.0, seed=1, stop_token_ids=everything),
        "long": SamplingParams(
            max_tokens=9, temperature=1.0, seed=1, stop_token_ids=everything, min_tokens=4
        ),
    }
    found = answers(engine, asked)
    # All but one token end an answer, so until the minimum only that one can come.
    assert found["long"][:4] == [engine.vocab_size - 1] * 4
    assert len(found["long"]) < 9
    assert len(found["short"]) < 4
