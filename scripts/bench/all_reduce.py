"""Sums over several GPUs, with the residual addition and RMSNorm that follow: ours against NCCL.

    python scripts/bench/all_reduce.py --tensor-parallel-size N [--hidden-size N] [--json PATH]

A process for each GPU. Every sum is checked first; then a CUDA graph of some of them is timed.

  NCCL      an all-reduce through NCCL, then the kernel for residual and norm
  one-shot  our kernel in which every rank adds up all rows
  two-shot  our kernel in which each row is added up by one rank, for all
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import subprocess
import sys

from harness import ROOT, BenchError
from harness.process import rank_devices
from harness.report import Report, make_parser, run

WAYS = ("NCCL", "one-shot", "two-shot")


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds of one sum of so many rows, by way."""
    size = options.tensor_parallel_size
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731", "TOKEN": secrets.token_hex(8),
    }  # fmt: skip
    processes = []
    for rank in range(size):
        own = {**environment, **rank_devices(rank, size)}
        command = [sys.executable, __file__, *sys.argv[1:], "--rank", str(rank)]
        processes.append(subprocess.Popen(command, env=own, stdout=subprocess.PIPE, text=True))
    try:
        out, _ = processes[0].communicate(timeout=options.timeout)
    except subprocess.TimeoutExpired:
        raise BenchError(f"the ranks were not through after {options.timeout} s") from None
    finally:
        for process in processes:
            process.kill()
    if processes[0].returncode != 0:
        raise BenchError("rank 0 failed, see above")
    found: dict[str, dict[str, float]] = json.loads(out.splitlines()[-1])
    return found


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--tensor-parallel-size", type=int, required=True, metavar="N")
    parser.add_argument("--hidden-size", type=int, default=8192, metavar="N", help="default: 8192")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="default: 120")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.rank is not None:
        sys.path.append(str(ROOT))
        from gpu import sums

        sums.run_rank(options.rank, options.tensor_parallel_size, options.hidden_size)
    report = Report("a sum over all ranks, then residual addition and RMSNorm", options)
    found = measure(options)
    rows = [
        [m, *(f"{found[name][m] * 1e6:.1f}" if m in found[name] else "" for name in WAYS)]
        for m in found["NCCL"]
    ]
    report.add_table(f"microseconds, {options.hidden_size} elements a row", ["rows", *WAYS], rows)
    report.data["seconds"] = found
    report.finish()


if __name__ == "__main__":
    run(main)
