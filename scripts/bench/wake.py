"""From asleep (C5) to the first streamed token, and what a sleeping server still holds.

    python scripts/bench/wake.py [--model FOLDER] [--device cuda] [--rounds N] [--level 1 2] [--json PATH]

A warm server is sent to sleep with POST /sleep; then a request comes, greedy, 128 tokens of prompt, 32 of
answer, which must be the reference's. The clock runs from just before it is sent to its first token. The
same request to the warm server, most of whose prompt is then in the cache, is measured in each round, after
a moment in which nobody asks for anything.

The limit, on a GPU, is the link: the time that the weights take from pinned host memory to the device,
measured beside the sleeping server in the same run. The device's memory is what nvidia-smi says is in use
while the server sleeps, less what was in use before it was started.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass

from harness import BenchError, answers, checkpoint, client, limits_cuda, machine, pss, servers
from harness.contender import Contender, started
from harness.process import tree
from harness.report import Report, make_parser, progress, run
from harness.summary import Summary, ratios, summarize
from harness.table import number, spread

ANSWER_TOKENS = 32
SLEEP_TIMEOUT_S = 120.0
# By then the engine is through with the answer before.
QUIET_S = 0.5
GRAPHS_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Round:
    """Seconds to fall asleep, to the first token from asleep, and from warm; bytes held while asleep."""

    falling_asleep: float
    woken: float
    warm: float
    device_bytes: float
    host_bytes: float


def device_bytes_used() -> float:
    """Of the memory of the GPU that is used, whoever uses it; 0 where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0.0
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    query = [program, "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={device}"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return float(done.stdout) * (1 << 20) if done.returncode == 0 else 0.0


def post(port: int, path: str) -> None:
    """An empty POST that must succeed."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SLEEP_TIMEOUT_S)
    try:
        connection.request("POST", path)
        response = connection.getresponse()
        body = response.read()
        if response.status != 200:
            raise BenchError(f"POST {path} was answered with {response.status}: {body[:300]!r}")
    finally:
        connection.close()


def wait_graphs(port: int) -> None:
    """Wait until all graphs are captured, for they take memory too; a CPU has none."""
    deadline = time.monotonic() + GRAPHS_TIMEOUT_S
    while time.monotonic() < deadline:
        status = json.loads(client.get(port, "/status")[1])
        if "graphs" in status["marks"] or status["device"] == "cpu":
            return
        time.sleep(0.2)


def first_token(contender: Contender, turn: str) -> float:
    """Seconds to the first token of the reference's answer, which is checked."""
    reference = contender.references.count
    answer = contender.ask_reference(reference, ANSWER_TOKENS)
    if answer.cached_tokens and turn == "woken":
        raise BenchError("the answer after waking used a cache that the sleep should have emptied")
    return answer.first - answer.sent


def one_round(contender: Contender, level: int, used_before: float) -> Round:
    """Warm, then asleep, then woken by the request."""
    port = contender.process.port
    time.sleep(QUIET_S)
    warm = first_token(contender, "warm")
    began = time.monotonic()
    post(port, f"/sleep?level={level}")
    asleep = time.monotonic()
    time.sleep(QUIET_S)
    device = max(0.0, device_bytes_used() - used_before)
    host = sum(pss.measure(pid, []).total for pid in tree(contender.process.pid))
    return Round(asleep - began, first_token(contender, "woken"), warm, device, host)


def measure(
    server: servers.Server, references: answers.References, levels: list[int], rounds: int, on_gpu: bool
) -> tuple[dict[int, list[Round]], dict[str, float]]:
    """The rounds of each level, the first of which is not counted, and the limits of the machine."""
    found: dict[int, list[Round]] = {level: [] for level in levels}
    limits: dict[str, float] = {}
    used_before = device_bytes_used()
    with started([server], references) as (contender,):
        first_token(contender, "first")
        wait_graphs(contender.process.port)
        for level in levels:
            for turn in range(rounds + 1):
                result = one_round(contender, level, used_before)
                progress(
                    f"level {level}, round {turn} of {rounds}: first token after {result.woken:.3f} s, "
                    f"{result.device_bytes / 1e9:.2f} GB held on the device"
                )
                if turn:
                    found[level].append(result)
                else:
                    limits[f"first sleep at level {level}"] = result.falling_asleep
        if on_gpu:
            progress("the link, beside the sleeping server")
            post(contender.process.port, f"/sleep?level={levels[0]}")
            limits["upload"] = limits_cuda.measure_apart()["upload"]
    return found, limits


def tabulate(
    report: Report, found: dict[int, list[Round]], limits: dict[str, float], weight_bytes: int
) -> None:
    """One row for each level, and the link."""
    rows = []
    for level, rounds in found.items():
        woken = summarize(turn.woken for turn in rounds)
        warm = summarize(turn.warm for turn in rounds)
        held = summarize(turn.device_bytes / 1e9 for turn in rounds)
        host = summarize(turn.host_bytes / 1e9 for turn in rounds)
        falling = summarize(turn.falling_asleep for turn in rounds)
        share: Summary | None = None
        if "upload" in limits:
            link = weight_bytes / limits["upload"]
            share = ratios([link] * len(rounds), [turn.woken for turn in rounds])
        rows.append(
            [
                f"level {level}", spread(falling), spread(woken), spread(warm),
                "" if share is None else spread(share), spread(held), spread(host),
            ]
        )  # fmt: skip
        report.data[f"level {level}"] = {
            "falling_asleep_s": falling.as_json(),
            "woken_first_token_s": woken.as_json(),
            "warm_first_token_s": warm.as_json(),
            "device_bytes_asleep": [turn.device_bytes for turn in rounds],
            "host_pss_bytes_asleep": [turn.host_bytes for turn in rounds],
            "link_share": None if share is None else share.as_json(),
        }
    report.add_table(
        "median (lowest to highest): seconds to fall asleep, to the first token from asleep and from warm; "
        "the weights' time on the link in parts of that; GB held while asleep",
        ["", "falling asleep", "first token", "when warm", "link / first token", "device GB", "host GB"],
        rows,
    )
    report.data |= {"weight_bytes": weight_bytes, "limits": limits}
    if "upload" in limits:
        link = weight_bytes / limits["upload"]
        report.add_note(
            f"limit: {number(weight_bytes / 1e9)} GB at {number(limits['upload'] / 1e9)} GB/s take "
            f"{number(link)} s"
        )
    for name, seconds in limits.items():
        if name.startswith("first sleep"):
            report.add_note(f"{name}: {number(seconds)} s")


def main() -> None:
    parser = make_parser(__doc__)
    servers.add_server_flags(parser)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each level (default: 5)")
    parser.add_argument("--level", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="default: 1 2")
    options = parser.parse_args()
    folder = servers.model_folder(options.model)
    references = answers.find(folder)
    report = Report("from asleep to the first streamed token", options)
    (server, *others) = servers.chosen(options, folder)
    if others:
        raise BenchError("other servers have no common way to be sent to sleep: measure them apart")
    report.add_servers([server])
    on_gpu = machine.device(options.device) == "cuda"
    found, limits = measure(server, references, options.level, options.rounds, on_gpu)
    tabulate(report, found, limits, checkpoint.weight_bytes(folder))
    report.finish()


if __name__ == "__main__":
    run(main)
