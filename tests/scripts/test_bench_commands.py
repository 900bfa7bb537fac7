"""The benchmarks as they are run: their help, their refusals, and a whole report of the real server."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import Scenario, scenarios_of
from throughput import engine_settings

from tests.scripts.conftest import BENCH

REPORTS = ("cold_start", "cpu", "memory", "serving", "structured", "throughput", "wake")
OTHERS = ("all_reduce", "http_cost", "make_model", "reference", "stalls", "upload")


def bench(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / f"{name}.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("name", [*REPORTS, *OTHERS])
def test_help_shows_how_to_run_it(name: str) -> None:
    done = bench(name, "--help")
    assert done.returncode == 0
    assert f"python scripts/bench/{name}.py" in done.stdout
    assert ("--json PATH" in done.stdout) == (name not in ("make_model", "reference"))


@pytest.mark.parametrize("name", REPORTS)
def test_without_reference_answers_there_is_no_report(name: str, tiny_model: Path, tmp_path: Path) -> None:
    done = bench(name, "--model", str(tiny_model), "--json", str(tmp_path / "x.json"))
    assert done.returncode == 1
    assert "no report: there are no reference answers" in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "x.json").exists()


def report_of(name: str, path: Path, *arguments: str) -> dict[str, Any]:
    done = bench(name, "--json", str(path), *arguments)
    assert done.returncode == 0, done.stderr
    assert "firstlight" in done.stdout
    report: dict[str, Any] = json.loads(path.read_text())
    assert {"claim", "date", "machine", "options"} <= set(report)
    return report


def test_a_report_of_the_engine(small_model: Path, tmp_path: Path) -> None:
    arguments = (
        "--model",
        str(small_model),
        "--device",
        "cpu",
        "--quick",
        "--rounds",
        "2",
        "--only",
        "single",
    )
    report = report_of("throughput", tmp_path / "report.json", *arguments)
    single = report["cases"]["single"]
    assert single["speed"]["firstlight"]["n"] == 2
    speed = single["speed"]["firstlight"]["median"]
    assert single["share_of_limit"]["firstlight"] == pytest.approx(single["limit"] / speed)


def test_a_report_of_the_server(small_model: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(small_model), "--device", "cpu", "--quick", "--rounds", "1", "--rate", "20")
    report = report_of("serving", tmp_path / "report.json", *arguments)
    (scenario,) = report["scenarios"].values()
    (found,) = scenario["servers"]["firstlight"]
    assert (found["requests"], found["errors"]) == (16, [])
    assert 0 < found["ttft"]["p50"] <= found["ttft"]["p99"]


def test_a_report_of_structured_outputs(small_model: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(small_model), "--device", "cpu", "--quick", "--rounds", "1", "--tokens", "8")
    report = report_of("structured", tmp_path / "report.json", *arguments)
    for kind in ("free", "held", "free beside held", "held beside free"):
        assert report[kind][0]["errors"] == []
        assert report[kind][0]["tokens_per_second"] > 0


def test_a_report_of_starts(small_model: Path, tmp_path: Path) -> None:
    arguments = ("--model", str(small_model), "--device", "cpu", "--runs", "1", "--state", "C4", "C3")
    report = report_of("cold_start", tmp_path / "report.json", *arguments)
    for state in ("C3", "C4"):
        (start,) = report[state]["starts"]["firstlight"]
        assert 0 < start["listening"] < start["first_token"] <= start["last_token"]
        assert {"listen", "plan", "torch", "ready"} <= start["marks"].keys()


class TestFlags:
    def test_engine_settings_are_json_where_they_can_be(self) -> None:
        pairs = ["max_num_seqs=8", "enable_prefix_caching=false", "dtype=bfloat16"]
        expected = {"max_num_seqs": 8, "enable_prefix_caching": False, "dtype": "bfloat16"}
        assert engine_settings(pairs) == expected

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({}, [Scenario(concurrency=256)]),
            ({"quick": True}, [Scenario(concurrency=8)]),
            ({"concurrency": [1, 4], "rate": [0.5]}, [Scenario(1), Scenario(4), Scenario(rate=0.5)]),
        ],
    )
    def test_scenarios(self, given: dict[str, Any], expected: list[Scenario]) -> None:
        defaults: dict[str, Any] = {"quick": False, "concurrency": [], "rate": []}
        assert scenarios_of(type("Options", (), defaults | given)()) == expected  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("name", "arguments", "message"),
        [
            ("serving", ("--rate", "0"), "must be positive"),
            ("throughput", ("--engine", "max_num_seqs"), "write NAME=VALUE"),
            ("cpu", ("--server", "vllm serve"), "write NAME=COMMAND"),
            ("memory", ("--peer-python", sys.executable), "No module named 'xllamacpp'"),
        ],
    )
    def test_mistakes(self, name: str, arguments: tuple[str, ...], message: str, small_model: Path) -> None:
        done = bench(name, "--model", str(small_model), *arguments)
        assert done.returncode == 1
        assert message in done.stderr
        assert "Traceback" not in done.stderr
