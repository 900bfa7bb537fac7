"""The offline workloads, what they count as wrong, and the limits that they are held against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from harness import BenchError, roofline
from harness.answers import Reference, References
from harness.offline_rounds import Task, measure
from harness.roofline import Limits, Shape
from harness.workload import CASES, Decode, Prefill, Request, Workload, selected, standard

VOCAB = 128256
# One H100 and Llama-3-8B's shapes in bf16, and what was found of them elsewhere.
H100 = Limits(read=2.89e12, product=805e12)
LLAMA_3_8B = Shape(
    step_bytes=16_060_522_496 - VOCAB * 4096 * 2,
    step_parameters=6_979_321_856 + VOCAB * 4096,
    layer_parameters=6_979_321_856,
    kv_bytes=131_072,
    attention_width=4096,
    num_layers=32,
    vocab_size=VOCAB,
)


def test_the_standard_workload_is_the_one_that_others_were_measured_with() -> None:
    requests = standard(VOCAB)
    assert (len(requests), sum(request.max_tokens for request in requests)) == (256, 142_555)
    assert {len(request.prompt) >= 100 and len(request.prompt) <= 1024 for request in requests} == {True}
    assert requests == standard(VOCAB)


def test_ids_stay_within_a_small_vocabulary() -> None:
    assert max(max(request.prompt) for request in standard(50, count=8)) < 50


class Engine:
    """Answers every request with the same token, and remembers what it was asked."""

    def __init__(self, missing: int = 0) -> None:
        self.asked: list[list[Request]] = []
        self.missing = missing

    def __call__(self, requests: Sequence[Request]) -> list[list[int]]:
        self.asked.append(list(requests))
        return [[7] * (request.max_tokens - self.missing) for request in requests]


@pytest.mark.parametrize("case", [Workload("w", 3, 2, 5), Decode("d", 2, 4, 3), Prefill("p", 2, 9)])
def test_an_answer_too_short_is_refused(case: Workload | Decode | Prefill) -> None:
    assert case.seconds(Engine(), "round 1", VOCAB) < 1
    with pytest.raises(BenchError, match="asked for"):
        case.seconds(Engine(missing=1), "round 1", VOCAB)


def test_no_prompt_comes_twice() -> None:
    engine = Engine()
    for seed in ("round 1", "round 2"):
        Decode("single", 2, 16, 3).seconds(engine, seed, VOCAB)
        Prefill("prefill", 2, 16).seconds(engine, seed, VOCAB)
    prompts = [tuple(request.prompt) for asked in engine.asked for request in asked]
    assert len(set(prompts)) == len(prompts) == 12


def test_time_per_token_leaves_the_prompt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def engine(requests: Sequence[Request]) -> list[list[int]]:
        clock[0] += 5.0 + 0.5 * (requests[0].max_tokens - 1)  # 5 s for the prompts, then 0.5 s a token
        return [[7] * request.max_tokens for request in requests]

    assert Decode("d", 4, 16, 10).seconds(engine, "x", VOCAB) == pytest.approx(0.5)


def references(token: int) -> References:
    answer = [token] * 32
    both = [Reference(name, [1, 2], answer, ["x"] * 32, [1.0] * 32) for name in ("explain", "count")]
    return References("", "by hand", *both)


def test_rounds_are_counted_without_the_warm_up() -> None:
    calls: list[str] = []
    names = ["single", "prefill-1x512"]
    task = Task(quick=True, only=names, rounds=3, vocab_size=VOCAB, tensor_parallel_size=1)
    task = Task.from_json(task.as_json())
    found = measure("x", Engine(), references(7), task, lambda: calls.append("settled"))
    assert {name: len(values) for name, values in found.items()} == {"single": 3, "prefill-1x512": 3}
    assert calls == ["settled"]


def test_a_wrong_reference_answer_voids_everything() -> None:
    task = Task(quick=True, only=["single"], rounds=1, vocab_size=VOCAB, tensor_parallel_size=1)
    with pytest.raises(BenchError, match="wrongly"):
        measure("x", Engine(), references(8), task, lambda: None)


def test_cases_are_chosen_by_name() -> None:
    assert [case.name for case in selected(CASES, ["batch-64", "standard"])] == ["batch-64", "standard"]
    assert selected(CASES, []) == list(CASES)
    with pytest.raises(BenchError, match=r"nothing.*prefill-1x8000"):
        selected(CASES, ["nothing"])


class TestRoofline:
    """Against figures that were worked out by hand for this model on this GPU."""

    def test_one_stream(self) -> None:
        single = next(case for case in CASES if case.name == "single")
        assert roofline.seconds(single, LLAMA_3_8B, H100) == pytest.approx(5.2e-3, rel=0.02)

    def test_prefill(self) -> None:
        long = next(case for case in CASES if case.name == "prefill-1x8000")
        assert 8000 / roofline.seconds(long, LLAMA_3_8B, H100) == pytest.approx(50_000, rel=0.1)

    def test_the_standard_workload(self) -> None:
        requests = standard(VOCAB)
        steps = max(request.max_tokens for request in requests)
        # Each token but an answer's first reads what stands before it.
        reads = [
            (r.max_tokens - 1) * len(r.prompt) + r.max_tokens * (r.max_tokens - 1) // 2 for r in requests
        ]
        read = steps * LLAMA_3_8B.step_bytes + sum(reads) * LLAMA_3_8B.kv_bytes
        assert roofline.seconds(CASES[0], LLAMA_3_8B, H100) == pytest.approx(read / H100.read)

    def test_a_large_batch_is_bound_by_products(self) -> None:
        step = H100.seconds(LLAMA_3_8B.decode([1] * 4096))
        assert step == pytest.approx(2 * LLAMA_3_8B.step_parameters * 4096 / H100.product)

    def test_the_shape_of_a_checkpoint(self, tiny_model: Path) -> None:
        shape = Shape.of(tiny_model)
        # Two layers, two key heads of 8, float32; the embedding is the head as well.
        assert shape.kv_bytes == 2 * 2 * 2 * 8 * 4
        assert shape.step_bytes == (tiny_model / "model.safetensors").stat().st_size
        assert shape.step_parameters - shape.layer_parameters == 264 * 32
