"""Every model of the catalogue at its real shape, with random weights made on the GPU.

    python scripts/bench/models.py [--only MODEL ...] [--batches N ...] [--standard MODEL ...] [--layers N]
                                   [--tensor-parallel-size N] [--warm-up] [--json PATH]

Each has the catalogue's length, 0.95 of the GPU's memory, and a process of its own, with --tensor-parallel-
size one for each GPU; then bytes and limits are those of one of them. `ready` is from the first number of the
weights to captured graphs. What a token takes (TPOT) stands beside what reading the weights and the cache
once would take, at the memory's speed as measured in the same run. A model that would not fit beside a useful
cache has fewer layers, and its row says so. With --standard a model also runs the standard workload of
throughput.py, and its prefill of 16 prompts of 2000 tokens. --warm-up first runs two layers of each, several
at a time, so that kernels are compiled.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import ROOT, BenchError, limits_cuda, machine
from harness.device_model import Found, Task, config_of, plan_of
from harness.process import free_port, rank_devices
from harness.report import Report, make_parser, progress, run
from harness.shapes import SHAPES
from harness.table import number
from harness.workload import STANDARD

BENCH = Path(__file__).resolve().parent
# Of the GPU's memory, what weights may take for there to be room for a cache.
_WEIGHTS_SHARE = 0.7
_AT_A_TIME = 8
_PATH = [path for path in [os.environ.get("PYTHONPATH")] if path]


class Child:
    """A process for one model, or one for each of its ranks, which has imported what it needs by the time
    that its turn comes."""

    def __init__(self, world_size: int) -> None:
        meeting = (str(free_port()), secrets.token_hex(8))
        self._processes = [self._start(rank, world_size, *meeting) for rank in range(world_size)]

    @staticmethod
    def _start(rank: int, world_size: int, *meeting: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "harness.device_model"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCH), *_PATH])}
        if world_size > 1:
            command += [str(rank), str(world_size), *meeting]
            environment |= rank_devices(rank, world_size)
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, task: Task) -> Found:
        """What it measures. Raises BenchError if it breaks."""
        first, *others = self._processes
        for process in others:
            assert process.stdin is not None
            process.stdin.write(json.dumps(asdict(task)) + "\n")
            process.stdin.close()
        out, errors = first.communicate(json.dumps(asdict(task)) + "\n")
        for process in others:
            process.kill()
        if first.returncode != 0:
            raise BenchError(f"{task.model}: {errors.strip()[-1500:]}")
        found = json.loads(out.splitlines()[-1])
        tpot = {int(batch): seconds for batch, seconds in found.pop("tpot").items()}
        return Found(tpot=tpot, **found)

    def close(self) -> None:
        """End it without a task."""
        for process in self._processes:
            process.communicate("")


def layers_that_fit(name: str, memory: int, world_size: int) -> int:
    """0 for all of a model's layers, or how many leave room for a cache."""
    import tempfile

    from runtime.model.families import ForeignModel, read_model

    def size(layers: int) -> int:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config_of(name, layers)))
            model = read_model(Path(folder))
            assert not isinstance(model, ForeignModel)
            return plan_of(model, 0, world_size).arena_bytes

    whole, one, two = size(0), size(1), size(2)
    if whole <= _WEIGHTS_SHARE * memory:
        return 0
    return int((_WEIGHTS_SHARE * memory - one) // (two - one)) + 1


def gpu_memory() -> int:
    """Bytes of the first GPU."""
    found = machine.gpus()
    if not found:
        raise BenchError("there is no GPU here")
    return int(found[0].rpartition(",")[2].split()[0]) << 20


def in_order(only: list[str], names: list[str]) -> list[str]:
    """Those whose names have one of these parts, part by part; all if there are none."""
    wanted = [name for part in only for name in names if part in name]
    return list(dict.fromkeys(wanted)) if only else names


def tasks(options: Any) -> list[Task]:
    """What to measure, in the order of --only, or the catalogue's."""
    from runtime.catalogue import load_catalogue

    models = load_catalogue(ROOT / "models.yaml").models
    memory = gpu_memory()
    chosen = []
    for name in in_order(options.only, [name for name in models if name in SHAPES]):
        layers = options.layers or layers_that_fit(name, memory, options.tensor_parallel_size)
        standard = any(part in name for part in options.standard)
        chosen.append(Task(name, models[name].max_model_len or 4096, layers, options.batches, standard))
    return chosen


def warm_up(all_tasks: list[Task], world_size: int) -> None:
    """Compile everybody's kernels: two layers are as many kernels as all."""
    # The shortest in which each of the workload's requests has room.
    length = 2 * STANDARD.longest
    small = [
        Task(task.model, min(task.max_model_len, length), 2, task.batches, task.standard, steps=2)
        for task in all_tasks
    ]

    def tried(task: Task) -> str | None:
        try:
            Child(world_size).run(task)
        except BenchError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for task, error in zip(small, pool.map(tried, small), strict=True):
            if error is not None:
                progress(f"warm-up of {task.model}: {error}")


def row(task: Task, found: Found, read: float, data: dict[str, Any]) -> list[str]:
    """A model's line: for each batch the time of a token, and how many times its limit that is."""
    cells = [number(found.ready), number(found.weight_bytes / 1e9), f"{found.capacity:,}"]
    limits = {}
    for batch, seconds in found.tpot.items():
        context = 128 + 8 + task.steps // 2
        limits[batch] = (found.step_bytes + batch * context * found.kv_bytes) / read
        cells.append(f"{number(seconds * 1e3)} ({seconds / limits[batch]:.2f} x)")
    most = max(found.tpot)
    cells.append(number(most / found.tpot[most]))
    cells += ["" if rate is None else number(rate) for rate in (found.standard, found.prefill)]
    layers = f", {found.layers} layers" if task.layers else ""
    data[task.model] = {**asdict(found), "limits": limits, "reduced": bool(task.layers)}
    return [f"{task.model}{layers}", *cells]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="MODEL", help="ids, or parts of them")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64], metavar="N")
    parser.add_argument(
        "--standard", nargs="+", default=[], metavar="MODEL", help="run the workload on these"
    )
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="fewer than the real models have")
    parser.add_argument("--warm-up", action="store_true", help="compile kernels first, on all cores")
    options = parser.parse_args()
    size = options.tensor_parallel_size
    sys.path.append(str(ROOT))
    report = Report("every model at its real shape", options)
    chosen = tasks(options)
    if options.warm_up:
        progress(f"warm-up of {len(chosen)} models")
        warm_up(chosen, size)
    read = limits_cuda.measure_apart()["read"]
    report.data |= {"read_bytes_per_s": read, "models": {}}
    report.add_note(f"the GPU reads {number(read / 1e9)} GB/s; x is times the limit")
    rows, broken = [], []
    following = Child(size)
    for place, task in enumerate(chosen):
        child, following = following, Child(size) if place + 1 < len(chosen) else None
        progress(task.model)
        try:
            rows.append(row(task, child.run(task), read, report.data["models"]))
            progress("  ".join(rows[-1]))
        except BenchError as error:
            broken.append(str(error))
            progress(str(error))
    batches = [f"batch {batch}, ms" for batch in options.batches]
    headers = [
        "",
        "ready, s",
        "GB",
        "KV tokens",
        *batches,
        f"tok/s at {max(options.batches)}",
        "standard, tok/s",
        "prefill, tok/s",
    ]
    report.add_table("time per output token at each size of batch", headers, rows)
    report.data["broken"] = broken
    report.finish()
    if broken:
        raise BenchError("\n".join(broken))


if __name__ == "__main__":
    run(main)
