"""Many clients through HTTP: time to first token, time per token, goodput, errors.

    python scripts/bench/serving.py [--model FOLDER] [--device cuda] [--concurrency N ...] [--rate R ...]
                                    [--server NAME=COMMAND] [--json PATH]
    python scripts/bench/serving.py --quick           a small version of it, for two cores

The requests are those of the standard workload (256, prompts and answers of 100 to 1024 tokens, greedy).
With --concurrency so many clients send one after the other; with --rate the requests arrive as from
independent clients (Poisson), so many a second, and the time to the first token counts from when they
arrive. The clients run in several processes. Servers are measured one after the other, since two do not
fit on one device. The limit, for a given concurrency, is the same work given to the engine without HTTP.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from harness import BenchError, answers, checkpoint, client, limits_cpu, load, machine, servers
from harness.contender import Contender, started
from harness.load import Job
from harness.offline import OfflineEngine
from harness.report import Report, make_parser, progress, run
from harness.servers import Server
from harness.service_level import Experience, Objective, experience
from harness.summary import ratios, summarize
from harness.table import number, spread
from harness.workload import QUICK_STANDARD, STANDARD, Request, timed

QUICK_CONCURRENCY, CONCURRENCY = 8, 256
WARM_UP_REQUESTS = 16
REFERENCE_TOKENS = 32
GRAPHS_SECONDS = 15.0
MOST_PROCESSES = 8


@dataclass(frozen=True)
class Scenario:
    """How the requests come: from so many clients one after the other, or so many a second."""

    concurrency: int | None = None
    rate: float | None = None

    @property
    def name(self) -> str:
        if self.rate is not None:
            return f"{number(self.rate)} requests/s"
        return f"{self.concurrency} clients"

    def jobs(self, server: Server, requests: list[Request]) -> list[Job]:
        bodies = [
            client.completion_request(server.greedy(request.prompt, request.max_tokens))
            for request in requests
        ]
        if self.rate is None:
            return [Job(body) for body in bodies]
        times = load.poisson(len(bodies), self.rate)
        return [Job(body, due) for body, due in zip(bodies, times, strict=True)]


def measure(
    contender: Contender, scenario: Scenario, requests: list[Request], objective: Objective
) -> Experience:
    """One load on one server, and a reference answer in the midst of it."""
    reference = contender.references.explain
    known = Request(reference.prompt_token_ids, REFERENCE_TOKENS)
    middle = len(requests) // 2
    jobs = scenario.jobs(contender.server, [*requests[:middle], known, *requests[middle:]])
    processes = max(1, min(MOST_PROCESSES, limits_cpu.cores() // 2))
    outcomes = load.run(contender.process.port, jobs, scenario.concurrency or 0, processes)
    told = outcomes.pop(middle).answer
    if told.error is None:
        reference.check_text(
            f"{contender.name}, under load,", told.text, REFERENCE_TOKENS, contender.server.lossy
        )
    contender.process.check_alive()
    return experience(outcomes, [request.max_tokens for request in requests], objective)


def warm_up(contender: Contender, requests: list[Request], device: str) -> None:
    """A few requests at once, the reference answer, and time to capture CUDA graphs in."""
    contender.ask_reference(contender.references.count, REFERENCE_TOKENS)
    jobs = Scenario(WARM_UP_REQUESTS).jobs(contender.server, requests[:WARM_UP_REQUESTS])
    load.run(contender.process.port, jobs, WARM_UP_REQUESTS, 1)
    deadline = time.monotonic() + GRAPHS_SECONDS
    while device == "cuda" and time.monotonic() < deadline and "graphs" not in marks(contender):
        time.sleep(0.1)


def marks(contender: Contender) -> dict[str, float]:
    """The start marks in /status. A server that has no such thing is not waited for: `graphs` is there."""
    status, body = client.get(contender.process.port, "/status")
    found: dict[str, float] = json.loads(body)["marks"] if status == 200 else {"graphs": 0.0}
    return found


def offline_speed(
    folder: Path, device: str, scenarios: list[Scenario], requests: list[Request]
) -> dict[str, float]:
    """Output tokens a second of the engine without HTTP, for each concurrency."""
    speeds: dict[str, float] = {}
    fixed = [scenario for scenario in scenarios if scenario.concurrency is not None]
    if not fixed:
        return speeds
    with OfflineEngine(folder, {"device": device}) as engine:
        engine.generate(requests[:WARM_UP_REQUESTS])
        if device == "cuda":
            engine.wait_for_graphs()
        for scenario in fixed:
            progress(f"without HTTP: {scenario.name}")
            seconds = timed(partial(engine.generate, concurrency=scenario.concurrency), requests)
            speeds[scenario.name] = sum(request.max_tokens for request in requests) / seconds
    return speeds


Found = dict[str, dict[str, list[Experience]]]
"""By scenario and server, one for each round."""


def tabulate(report: Report, found: Found, offline: dict[str, list[float]], objective: Objective) -> None:
    """A table for each scenario: speeds, percentiles of all rounds' medians, errors."""
    for scenario, rows in found.items():
        limit = offline.get(scenario)
        # The limit is that of this project's engine, the first one.
        table = [
            row(name, rounds, limit if place == 0 else None)
            for place, (name, rounds) in enumerate(rows.items())
        ]
        if limit:
            table.append(["limit: without HTTP", spread(summarize(limit)), *[""] * (len(HEADERS) - 2)])
        report.add_table(f"{scenario}; times in ms", HEADERS, table)
        report.data.setdefault("scenarios", {})[scenario] = {
            "servers": {name: [one.as_json() for one in rounds] for name, rounds in rows.items()},
            "output_tokens_per_second_without_http": limit,
        }
    report.add_note(
        f"good: first token within {number(objective.ttft)} s, {number(objective.tpot * 1e3)} ms per token; "
        "percentiles: medians over the rounds"
    )


HEADERS = (
    "",
    "output tok/s",
    "of limit",
    *(f"TTFT {name}" for name in ("p50", "p95", "p99")),
    *(f"TPOT {name}" for name in ("p50", "p95", "p99")),
    "longest gap p99",
    "good req/s",
    "errors",
)


def row(name: str, rounds: list[Experience], limit: list[float] | None) -> list[str]:
    speeds = [one.tokens_per_second for one in rounds]

    def middle(values: list[float]) -> str:
        return number(summarize(values).median)

    return [
        name,
        spread(summarize(speeds)),
        f"{ratios(speeds, limit).median:.0%}" if limit else "",
        *(middle([one.ttft[p] * 1e3 for one in rounds]) for p in rounds[0].ttft),
        *(middle([one.tpot[p] * 1e3 for one in rounds]) for p in rounds[0].tpot),
        middle([one.longest_gap["p99"] * 1e3 for one in rounds]),
        middle([one.goodput for one in rounds]),
        str(sum(len(one.errors) for one in rounds)),
    ]


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    servers.add_server_flags(parser)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[], metavar="N")
    parser.add_argument("--rate", type=float, nargs="+", default=[], metavar="R", help="requests a second")
    parser.add_argument("--quick", action="store_true", help="few short requests, for a CPU")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--good-ttft", type=float, default=2.0, metavar="S", help="default: 2 s")
    parser.add_argument("--good-tpot", type=float, default=0.05, metavar="S", help="default: 0.05 s")
    return parser.parse_args()


def scenarios_of(options: argparse.Namespace) -> list[Scenario]:
    """What the flags ask for; without any, everything at once."""
    asked = [Scenario(concurrency=n) for n in options.concurrency] + [Scenario(rate=r) for r in options.rate]
    if any(n < 1 for n in options.concurrency) or any(r <= 0 for r in options.rate):
        raise BenchError("--concurrency and --rate must be positive")
    return asked or [Scenario(concurrency=QUICK_CONCURRENCY if options.quick else CONCURRENCY)]


def main() -> None:
    options = parse()
    scenarios = scenarios_of(options)
    objective = Objective(options.good_ttft, options.good_tpot)
    folder = servers.model_folder(options.model)
    references = answers.find(folder)
    device = machine.device(options.device)
    workload = QUICK_STANDARD if options.quick else STANDARD
    requests = workload.requests(checkpoint.config_of(folder)["vocab_size"])
    report = Report("many clients through HTTP", options)
    chosen = servers.chosen(options, folder)
    report.add_servers(chosen)
    found: Found = {scenario.name: {server.name: [] for server in chosen} for scenario in scenarios}
    offline: dict[str, list[float]] = {}
    for turn in range(options.rounds):
        progress(f"round {turn + 1} of {options.rounds}")
        for name, speed in offline_speed(folder, device, scenarios, requests).items():
            offline.setdefault(name, []).append(speed)
        for server in chosen:
            with started([server], references) as (contender,):
                warm_up(contender, requests, device)
                for scenario in scenarios:
                    progress(f"{server.name}: {scenario.name}")
                    found[scenario.name][server.name].append(
                        measure(contender, scenario, requests, objective)
                    )
                contender.ask_reference(references.explain, REFERENCE_TOKENS)
    tabulate(report, found, offline, objective)
    report.finish()


if __name__ == "__main__":
    run(main)
