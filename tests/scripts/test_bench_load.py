"""Many clients at once: who asks when, and what is made of the answers."""

from __future__ import annotations

import statistics

import pytest
from harness import BenchError, client, load
from harness.load import Job, Outcome
from harness.service_level import Objective, experience
from harness.sse import Answer

from tests.scripts.stub_server import stub

OBJECTIVE = Objective(ttft=1.0, tpot=0.1)


def body(number: int, tokens: int = 2) -> bytes:
    """A request that can be told from others by the length of its prompt."""
    return client.completion_request({"prompt": [1] * number, "max_tokens": tokens})


def test_outcomes_come_in_the_order_of_jobs_and_no_more_than_so_many_at_once() -> None:
    with stub(["a", "b"], delay=0.05) as server:
        outcomes = load.run(server.port, [Job(body(n)) for n in range(1, 9)], concurrency=3, processes=2)
    assert [outcome.answer.prompt_tokens for outcome in outcomes] == list(range(1, 9))
    assert {(outcome.answer.text, outcome.answer.error) for outcome in outcomes} == {("ab", None)}
    assert 1 < server.most_at_once <= 3
    assert len(server.asked) == 8


def test_jobs_with_a_time_wait_for_it_and_for_nobody_else() -> None:
    times = [0.1, 0.0, 0.05]
    with stub(["a", "b"], delay=0.5) as server:
        jobs = [Job(body(n + 1), due) for n, due in enumerate(times)]
        outcomes = load.run(server.port, jobs, concurrency=0, processes=2)
    asked = [outcome.asked for outcome in outcomes]
    assert [moment - asked[1] for moment in asked] == pytest.approx(times)
    assert all(outcome.answer.sent >= outcome.asked for outcome in outcomes)
    assert server.most_at_once == 3


def test_a_server_that_is_not_there_is_an_error_of_each_request() -> None:
    with stub([]) as server:
        port = server.port
    outcomes = load.run(port, [Job(body(1))] * 3, concurrency=2, processes=1)
    assert all(outcome.answer.error for outcome in outcomes)


def test_arrivals_are_independent_of_each_other() -> None:
    times = load.poisson(20_000, rate=5.0)
    gaps = [later - earlier for earlier, later in zip([0.0, *times], times, strict=False)]
    assert min(gaps) >= 0
    # An exponential distribution has a standard deviation as large as its mean.
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.03)
    assert load.poisson(10, 5.0) == times[:10]


def answered(asked: float, *times: float, tokens: int = 3) -> Outcome:
    return Outcome(asked, Answer(status=200, times=list(times), completion_tokens=tokens, complete=True))


class TestExperience:
    def test_by_hand(self) -> None:
        outcomes = [
            answered(10.0, 10.5, 10.6, 10.7),  # good
            answered(10.0, 11.5, 11.6, 11.7),  # its first token came late
            answered(12.0, 12.1, 12.2, 14.0),  # it stood still
            Outcome(10.0, Answer(error="status 503")),
        ]
        found = experience(outcomes, [3, 3, 3, 3], OBJECTIVE)
        assert (found.requests, found.errors, found.output_tokens) == (4, ["status 503"], 9)
        assert found.seconds == pytest.approx(4.0)
        assert found.tokens_per_second == pytest.approx(9 / 4)
        assert found.goodput == pytest.approx(1 / 4)
        assert found.ttft["p50"] == pytest.approx(0.5)
        assert found.tpot["p50"] == pytest.approx(0.1)
        assert found.longest_gap["p99"] == pytest.approx(1.8, rel=0.03)

    def test_answers_of_another_length_are_wrong(self) -> None:
        with pytest.raises(BenchError, match="3 tokens"):
            experience([answered(0.0, 1.0, tokens=2)], [3], OBJECTIVE)

    def test_nothing_but_errors_is_no_result(self) -> None:
        with pytest.raises(BenchError, match="refused"):
            experience([Outcome(0.0, Answer(error="refused"))], [3], OBJECTIVE)
