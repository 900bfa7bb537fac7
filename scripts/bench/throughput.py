"""The engine alone, without HTTP: the standard workload, time per output token, prefill.

    python scripts/bench/throughput.py [--model FOLDER] [--device cuda] [--tensor-parallel-size N]
                                       [--only NAME ...] [--peer-python PYTHON] [--json PATH]
    python scripts/bench/throughput.py --quick        a small version of it, for two cores

  standard         256 requests at once, prompts and answers of 100 to 1024 tokens: output tokens a second
  single, batch-N  time per output token of 1 or N answers after prompts of 128 tokens
  prefill-BxN      prompt tokens a second of B prompts of N tokens

The device's limits are measured before and after: how fast it reads memory, how fast it multiplies
matrices. What that allows for each case stands beside it. With --peer-python a Python that has vLLM is
measured too; two engines do not fit on one device together, so they run one after the other.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness import BenchError, answers, limits_cpu, limits_cuda, machine, roofline, servers
from harness.offline import OfflineEngine
from harness.offline_rounds import Task, measure
from harness.report import Report, make_parser, progress, run
from harness.roofline import Limits, Shape
from harness.summary import summarize
from harness.table import spread
from harness.workload import Case, Decode, Workload

BENCH = Path(__file__).resolve().parent


def device_limits(device: str, devices: int) -> Limits:
    """What all devices that share the model reach together."""
    progress("limits of the device")
    if device == "cuda":
        found = limits_cuda.measure_apart()
        return Limits(devices * found["read"], devices * found["product"])
    return Limits(limits_cpu.memory_read(limits_cpu.cores()), limits_cpu.matrix_product())


def measure_ours(
    folder: Path, device: str, task: Task, settings: dict[str, Any], references: answers.References
) -> dict[str, list[float]]:
    """Seconds of each case on this project's engine."""
    # Every round has the same prompts: nothing may be found again, on any engine.
    settings = {
        "device": device,
        "world_size": task.tensor_parallel_size,
        "enable_prefix_caching": False,
        **settings,
    }
    with OfflineEngine(folder, settings) as engine:

        def settle() -> None:
            if device == "cuda" and not engine.wait_for_graphs():
                progress("firstlight: no mark says that its CUDA graphs are there; measuring anyway")

        return measure("firstlight", engine.generate, references, task, settle)


def measure_vllm(python: Path, folder: Path, task: Task) -> tuple[str, dict[str, list[float]]]:
    """vLLM's version, and the seconds of each case."""
    command = [str(python), "-m", "harness.vllm_offline", str(folder), task.as_json()]
    environment = {**os.environ, "PYTHONPATH": str(BENCH)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise BenchError("vLLM could not be measured, see above")
    found = json.loads(done.stdout.splitlines()[-1])
    return found["version"], found["seconds"]


def speed(case: Case, seconds: float, vocab_size: int) -> float:
    """In the case's unit: milliseconds per token where it is a time, else tokens a second."""
    if isinstance(case, Decode):
        return seconds * 1e3
    if isinstance(case, Workload):
        return sum(request.max_tokens for request in case.requests(vocab_size)) / seconds
    return case.batch * case.prompt / seconds


def unit(case: Case) -> str:
    if isinstance(case, Decode):
        return "ms per token"
    return "output tok/s" if isinstance(case, Workload) else "prompt tok/s"


def tabulate(
    report: Report, task: Task, shape: Shape, limits: list[Limits], found: dict[str, dict[str, list[float]]]
) -> None:
    """A row for each case: every engine, the limit, and how much of it each engine reaches."""
    best = Limits(max(one.read for one in limits), max(one.product for one in limits))
    rows = []
    for case in task.cases:
        limit = roofline.seconds(case, shape, best)
        seconds = {name: summarize(values[case.name]) for name, values in found.items()}
        speeds = {
            name: summarize(speed(case, value, shape.vocab_size) for value in row.values)
            for name, row in seconds.items()
        }
        of_limit = {name: limit / row.median for name, row in seconds.items()}
        rows.append(
            [
                f"{case.name}, {unit(case)}",
                *(spread(row) for row in speeds.values()),
                spread(summarize([speed(case, limit, shape.vocab_size)])),
                *(f"{share:.0%}" for share in of_limit.values()),
            ]
        )
        report.data.setdefault("cases", {})[case.name] = {
            "unit": unit(case),
            "speed": {name: row.as_json() for name, row in speeds.items()},
            "limit": speed(case, limit, shape.vocab_size),
            "share_of_limit": of_limit,
            "seconds": {name: row.as_json() for name, row in seconds.items()},
        }
    headers = ["", *found, "limit", *(f"{name} / limit" for name in found)]
    report.add_table("median (lowest to highest)", headers, rows)
    report.add_note(
        "the device reads "
        + spread(summarize(one.read / 1e9 for one in limits))
        + " GB/s and multiplies "
        + spread(summarize(one.product / 1e12 for one in limits))
        + " TFLOP/s"
    )
    report.data["limits"] = [asdict(one) for one in limits]


def engine_settings(pairs: list[str]) -> dict[str, Any]:
    """What `--engine NAME=VALUE` says, values as JSON where they are JSON."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise BenchError(f"--engine {pair}: write NAME=VALUE")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model", metavar="MODEL", help="a folder, or as for `firstlight serve`")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases, by name")
    parser.add_argument("--quick", action="store_true", help="small cases, for a CPU")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--engine", action="append", default=[], metavar="NAME=VALUE", help="a field of EngineConfig"
    )
    parser.add_argument("--peer-python", type=Path, metavar="PYTHON", help="a Python that has vLLM")
    return parser.parse_args()


def main() -> None:
    options = parse()
    settings = engine_settings(options.engine)
    folder = servers.model_folder(options.model)
    references = answers.find(folder)
    shape = Shape.of(folder)
    devices = options.tensor_parallel_size
    task = Task(options.quick, options.only, options.rounds, shape.vocab_size, devices)
    device = machine.device(options.device)
    report = Report(f"the engine without HTTP ({', '.join(case.name for case in task.cases)})", options)
    limits = [device_limits(device, devices)]
    found = {"firstlight": measure_ours(folder, device, task, settings, references)}
    limits.append(device_limits(device, devices))
    if options.peer_python is not None:
        version, found["vLLM"] = measure_vllm(options.peer_python, folder, task)
        report.data["peer"] = f"vLLM {version}"
        limits.append(device_limits(device, devices))
    tabulate(report, task, shape, limits, found)
    report.finish()


if __name__ == "__main__":
    run(main)
