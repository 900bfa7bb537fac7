"""Weights from the page cache to the device, alone: no torch is imported meanwhile.

    python scripts/bench/upload.py --model FOLDER [--rounds N] [--json PATH]

Measured are both kinds of readers, those in C and their plain twins, buffers and all; the limit is the
link: how fast bytes that lie in pinned memory already reach the device, in the same run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from harness import ROOT, BenchError, checkpoint, limits_cuda, page_cache
from harness.report import Report, make_parser, progress, run
from harness.summary import summarize
from harness.table import number, spread

# Prints the seconds of each load of a model's weights, the driver's context being there already.
LOAD = """
import sys, time
from pathlib import Path
from runtime.model.families import read_model
from runtime.weights import native_readers
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.cuda_driver import Driver
from runtime.weights.plan import make_plan
from runtime.weights.upload import DeviceWeights

directory = Path(sys.argv[1])
assert (native_readers.library() is None) == (sys.argv[2] == "python"), "no readers of this kind"
plan = make_plan(read_model(directory), read_checkpoint(directory))
weights = DeviceWeights(plan, Driver())
for _ in range(int(sys.argv[3]) + 1):
    began = time.monotonic()
    weights.load(lambda done: None)
    print(time.monotonic() - began)
"""


def load(folder: Path, kind: str, rounds: int) -> list[float]:
    """Seconds of each load; the first one is not counted. Raises BenchError if it fails."""
    environment = {**os.environ, "FIRSTLIGHT_READERS": kind, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), kind, str(rounds)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise BenchError(f"the {kind} readers failed:\n{done.stderr[-2000:]}")
    return [float(line) for line in done.stdout.split()][1:]


def measure(report: Report, options: argparse.Namespace) -> None:
    """One row for each kind of readers, and the link."""
    folder = options.model
    size = checkpoint.weight_bytes(folder)
    progress("reading the files into the page cache")
    page_cache.read(checkpoint.weight_files(folder))
    rows = []
    for kind in ("native", "python"):
        progress(f"{kind} readers")
        speeds = summarize(size / 1e9 / seconds for seconds in load(folder, kind, options.rounds))
        report.data[f"{kind}_gb_per_s"] = speeds.as_json()
        rows.append([f"{kind} readers", spread(speeds)])
    progress("the link")
    link = limits_cuda.measure_apart()["upload"]
    report.data |= {"weight_bytes": size, "link_bytes_per_s": link}
    rows.append(["limit: the link, from pinned memory", number(link / 1e9)])
    report.add_table(f"GB/s for {number(size / 1e9)} GB, median (lowest to highest)", ["", "GB/s"], rows)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="with safetensors files")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    options = parser.parse_args()
    report = Report("from the page cache to the device", options)
    measure(report, options)
    report.finish()


if __name__ == "__main__":
    run(main)
