"""From nothing to the first streamed token, by a clock outside of the server.

    python scripts/bench/cold_start.py [--model FOLDER] [--device cuda] [--runs N] [--state C3 C2]
                                       [--peer-python PYTHON] [--server NAME=COMMAND] [--json PATH]

The clock starts just before the server is executed, and the request waits from then on: greedy, 128
tokens of prompt, 32 of answer, which must be the reference's. States:

  C4   the weights lie in a file system that is memory (/dev/shm), all else in the page cache
  C3   everything is in the page cache, no process runs
  C2   the weights are not in the page cache, all else is
  C1   neither weights nor code are in the page cache: Python's and this project's files, and torch's
  C0   the model is not on this machine: it comes from a stand-in for the Hub, and from one for S3

The limit is measured in turn with the servers: the bare start (a Python that imports torch and, on a
GPU, puts one number there; in C1 its code comes from the disk, too) and, in C1 and C2, the time that the
disk takes for the weights; in C0 the time that the stand-in takes for them when they are read in parallel
and thrown away. What the Hub serves has a SHA-256, so the time that takes, one processor a file, is shown
as well.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from harness import BenchError, answers, checkpoint, machine, page_cache, servers
from harness.remote import KINDS, Remote
from harness.report import Report, make_parser, progress, run
from harness.servers import Server
from harness.start_clock import Start, clock
from harness.summary import Summary, ratios, summarize
from harness.table import number, spread

ANSWER_TOKENS = 32
PAUSE_SECONDS = 0.5
TIMES = ("listening", "ready", "first_token", "last_token")
STATES = ("C0", "C1", "C2", "C3", "C4")
FROM_DISK = ("C1", "C2")
MEMORY = Path("/dev/shm")
BARE, DISK, TRANSFER, LIMIT, DIGEST = "bare start", "disk", "transfer", "limit", "digest of the files"


def bare_start(device: str) -> float:
    """Seconds that a Python takes to import torch and, on a GPU, to put one number there, until it ends."""
    code = "import torch; torch.zeros(1, device='cuda')" if device == "cuda" else "import torch"
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, stdin=subprocess.DEVNULL)
    return time.monotonic() - began


def prepare(state: str, files: list[Path], remote: Remote | None) -> None:
    """Bring the page cache, and the servers' own, into the state that is to be measured."""
    if remote is not None:
        remote.forget()
    if state in FROM_DISK:
        page_cache.evict(files)
    else:
        page_cache.read(files)
        held = page_cache.resident(files)
        if held < 1:
            raise BenchError(f"the page cache holds only {held:.0%} of the weights after reading them")
    if state == "C1":
        page_cache.evict_code()


def measure_limits(state: str, device: str, files: list[Path], remote: Remote | None) -> dict[str, float]:
    """The limits, in seconds; the disk's and the network's only where they matter."""
    if state == "C1":
        page_cache.evict_code()
    found = {BARE: bare_start(device)}
    if remote is not None:
        found[TRANSFER] = remote.transfer_seconds()
    if state in FROM_DISK:
        page_cache.evict(files)
        found[DISK] = page_cache.read(files)
    found[LIMIT] = max(found.values())
    if remote is not None and state == "C0 hub":
        # Not of the machine, but of what is asked of it: no answer ends before every file has its SHA-256.
        found[DIGEST] = remote.digest_seconds()
    return found


def measure(
    chosen: list[Server],
    state: str,
    options: argparse.Namespace,
    folder: Path,
    remote: Remote | None = None,
) -> tuple[dict[str, list[Start]], dict[str, list[float]]]:
    """The starts of each server, and the limits; both in every run, and each run beginning with another."""
    reference = answers.find(folder).count
    device = machine.device(options.device)
    starts: dict[str, list[Start]] = {server.name: [] for server in chosen}
    limits: dict[str, list[float]] = {}
    progress(f"{state}: one run to warm up")
    for turn in range(-1, options.runs):
        if turn >= 0:
            progress(f"{state}: run {turn + 1} of {options.runs}")
        found = measure_limits(state, device, checkpoint.weight_files(folder), remote)
        shift = max(turn, 0) % len(chosen)
        for server in chosen[shift:] + chosen[:shift]:
            prepare(state, server.weight_files, remote)
            start = clock(server, reference, ANSWER_TOKENS, options.timeout)
            progress(f"{state}: {server.name}: {told(start.first_token, start.marks, found)}")
            if turn >= 0:
                starts[server.name].append(start)
            time.sleep(PAUSE_SECONDS)
        if turn >= 0:
            for name, seconds in found.items():
                limits.setdefault(name, []).append(seconds)
    return starts, limits


def told(first_token: float, marks: dict[str, float], limits: dict[str, float]) -> str:
    """One start beside its limits, for who waits for the report."""
    times = {"first token": first_token, **limits}
    within = sorted(marks.items(), key=lambda item: item[1])
    return "; ".join(
        ", ".join(f"{name} {number(seconds)}" for name, seconds in row)
        for row in (times.items(), within)
        if row
    )


def measure_remote(report: Report, options: argparse.Namespace, folder: Path) -> None:
    """C0, from either source."""
    with Remote(folder, options.device, shlex.split(options.serve_args)) as remote:
        for kind in KINDS:
            state = f"C0 {kind}"
            tabulate(report, state, *measure([remote.server(kind)], state, options, folder, remote))


def measure_in_memory(report: Report, options: argparse.Namespace, folder: Path) -> None:
    """C4, with a copy of the model."""
    needed, free = checkpoint.weight_bytes(folder), shutil.disk_usage(MEMORY).free
    if needed >= free:
        raise BenchError(f"{MEMORY} has room for {free / 1e9:.1f} GB, and the model needs {needed / 1e9:.1f}")
    with tempfile.TemporaryDirectory(dir=MEMORY) as place:
        copy = Path(shutil.copytree(folder, Path(place, folder.name)))
        tabulate(report, "C4", *measure(servers.chosen(options, copy), "C4", options, copy))


def tabulate(
    report: Report, state: str, starts: dict[str, list[Start]], limits: dict[str, list[float]]
) -> None:
    """Times, the first token's ratio to the limit, and the server's own marks."""
    times = {
        name: {at: summarize(getattr(start, at) for start in row) for at in TIMES}
        for name, row in starts.items()
    }
    multiples = {name: ratios(row["first_token"].values, limits[LIMIT]) for name, row in times.items()}
    limit_rows = {name: summarize(values) for name, values in limits.items()}
    report.add_table(
        f"{state}: seconds since just before exec, median (lowest to highest)",
        ["", *(at.replace("_", " ") for at in TIMES), "first token / limit"],
        [
            *(
                [name, *(spread(row[at]) for at in TIMES), spread(multiples[name])]
                for name, row in times.items()
            ),
            *([name, "", "", spread(value), "", ""] for name, value in limit_rows.items()),
        ],
    )
    for name, row in starts.items():
        marks = medians([start.marks for start in row])
        if marks:
            said = ", ".join(f"{mark} {number(seconds)}" for mark, seconds in marks.items())
            report.add_note(f"{state}: marks of {name}, medians in seconds: {said}")
    report.data[state] = {
        "seconds": {name: {at: value.as_json() for at, value in row.items()} for name, row in times.items()},
        "limits": {name: value.as_json() for name, value in limit_rows.items()},
        "first_token_over_limit": {name: value.as_json() for name, value in multiples.items()},
        "starts": {name: [asdict(start) for start in row] for name, row in starts.items()},
    }


def medians(marks: list[dict[str, float]]) -> dict[str, float]:
    """The median of each mark that every start has, in the order of time."""
    common = set(marks[0]).intersection(*marks[1:])
    found: dict[str, Summary] = {name: summarize(row[name] for row in marks) for name in common}
    return {name: value.median for name, value in sorted(found.items(), key=lambda item: item[1].median)}


def main() -> None:
    parser = make_parser(__doc__)
    servers.add_server_flags(parser)
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="of each state (default: 5)")
    parser.add_argument("--state", nargs="+", choices=STATES, default=["C3"], help="default: C3")
    parser.add_argument("--timeout", type=float, default=300.0, metavar="S", help="default: 300")
    options = parser.parse_args()
    folder = servers.model_folder(options.model)
    report = Report("from exec to the first streamed token", options)
    chosen = servers.chosen(options, folder)
    report.add_servers(chosen)
    size = checkpoint.weight_bytes(folder)
    report.data["weight_bytes"] = size
    for state in options.state:
        if state == "C0":
            measure_remote(report, options, folder)
        elif state == "C4":
            measure_in_memory(report, options, folder)
        else:
            tabulate(report, state, *measure(chosen, state, options, folder))
    report.add_note(f"weights: {number(size / 1e9)} GB")
    report.finish()


if __name__ == "__main__":
    run(main)
