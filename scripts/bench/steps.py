"""Where the time of a step goes: which kernels the device spends it on, and how long it waits for the host.

    python scripts/bench/steps.py --model FOLDER [--batch N ...] [--prompt N] [--prefill BxN ...]
                                  [--json PATH]

The engine runs in this process. First a number of steps is timed as they are, then as many under torch's
profiler, whose trace says what ran on the device and when. What is left of a step's time when the device's
own is taken away is what the device waits for the host. Beside that stands what the step would take if the
weights and the cache were read at the memory's speed, measured in the same run.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import ROOT, BenchError, limits_cuda, machine, servers
from harness.offline import engine_config
from harness.report import Report, make_parser, progress, run
from harness.roofline import Limits, Shape
from harness.table import number
from harness.workload import random_ids

if TYPE_CHECKING:
    from runtime.engine.core import Engine

STEPS = 40
# By what a kernel's name holds; the first that fits counts.
KINDS = {
    "attention": ("_decode_kernel", "_prefill_kernel"),
    "products": ("gemm", "nvjet", "cutlass", "splitK", "_row_kernel", "_rows_kernel", "product"),
    "sampling": ("scan_kernel", "weigh_kernel", "pick_kernel", "narrow_kernel", "settle_kernel", "adjust_"),
    "norms": ("norm",),
    "rotary and store": ("rotary",),
    "activation": ("_gated_kernel",),
    "inputs": ("embedding", "prepare", "updates", "Memcpy", "Memset", "copy", "index", "Cat"),
}


@dataclass(frozen=True)
class Profile:
    """Seconds a step: on the clock, and on the device by kind of kernel; `busy` is the device's in all."""

    wall: float
    busy: float
    kinds: dict[str, float]
    host: dict[str, float]


def kind_of(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much time lies in at least one of the spans."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def make_engine(folder: Path) -> Engine:
    from runtime.engine.start import start

    engine, *_ = start(
        engine_config(folder, {"device": "cuda", "enable_prefix_caching": False}), lambda _: None
    )
    return engine


def submit(engine: Engine, count: int, prompt: int, tokens: int, seed: str) -> None:
    from runtime.protocol import SamplingParams, Submit

    draw = random.Random(seed)
    for index in range(count):
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0)
        ids = random_ids(draw, prompt, engine.vocab_size)
        engine.submit(Submit(request_id=f"{seed} {index}", prompt_token_ids=ids, sampling=sampling))


def decode(engine: Engine, batch: int, prompt: int) -> Profile:
    """Steps in which `batch` sequences decode."""
    submit(engine, batch, prompt, 8 * STEPS, f"decode {batch}")
    while any(not sequence.sampled_here for sequence in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    for _ in range(4):
        engine.step()
    wall, host = timed_steps(engine, STEPS)
    profile = profiled(engine, STEPS, wall, host)
    finish(engine)
    return profile


def prefill(engine: Engine, count: int, prompt: int) -> Profile:
    """All steps that `count` prompts take, as one."""
    for _ in range(2):
        submit(engine, count, prompt, 1, f"prefill {count} {prompt}")
        began = time.perf_counter()
        finish(engine)
        wall = time.perf_counter() - began
    submit(engine, count, prompt, 1, f"prefill {count} {prompt}")
    return profiled(engine, 0, wall, {})


def finish(engine: Engine) -> None:
    if engine.scheduler.running and not engine.scheduler.waiting:
        engine.abort(
            [sequence.request_id for sequence in engine.scheduler.running if sequence.max_tokens > 1]
        )
    while engine.has_work:
        engine.step()


def timed_steps(engine: Engine, steps: int) -> tuple[float, dict[str, float]]:
    """Seconds a step, and of those what the host does in each part of it."""
    from runtime.protocol import encode_frame

    spent: Counter[str] = Counter()

    def timing(name: str, call: Any) -> Any:
        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = call(*arguments)
            spent[name] += time.perf_counter() - began
            return result

        return timed

    runner, scheduler = engine.runner, engine.scheduler
    originals = runner.launch, scheduler.schedule
    runner.launch = timing("launch", originals[0])  # type: ignore[method-assign]
    scheduler.schedule = timing("schedule", originals[1])  # type: ignore[method-assign]
    began = time.perf_counter()
    for _ in range(steps):
        output = engine.step()
        before = time.perf_counter()
        encode_frame(output)
        spent["encode"] += time.perf_counter() - before
    wall = (time.perf_counter() - began) / steps
    runner.launch, scheduler.schedule = originals  # type: ignore[method-assign]
    return wall, {name: seconds / steps for name, seconds in spent.items()}


def profiled(engine: Engine, steps: int, wall: float, host: dict[str, float]) -> Profile:
    """What the device does in so many steps (0: until there is nothing left to do, counted as one)."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(steps) if steps else itertools.takewhile(lambda _: engine.has_work, itertools.count()):
            engine.step()
        torch.cuda.synchronize()
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not events:
        raise BenchError("the profiler saw nothing on the device")
    kinds: Counter[str] = Counter()
    for event in events:
        kinds[kind_of(event.name)] += event.time_range.elapsed_us() / 1e6 / max(steps, 1)
    busy = covered((event.time_range.start, event.time_range.end) for event in events)
    return Profile(wall, busy / 1e6 / max(steps, 1), dict(kinds), host)


def tabulate(report: Report, name: str, profile: Profile, limit: float) -> None:
    rows = [
        [kind, number(seconds * 1e3), f"{seconds / profile.wall:.0%}"]
        for kind, seconds in sorted(profile.kinds.items(), key=lambda item: -item[1])
    ]
    waits = max(0.0, profile.wall - profile.busy)
    rows += [
        ["the device waits", number(waits * 1e3), f"{waits / profile.wall:.0%}"],
        ["the whole step", number(profile.wall * 1e3), ""],
        ["limit", number(limit * 1e3), f"{limit / profile.wall:.0%}"],
    ]
    rows += [[f"(host: {part})", number(seconds * 1e3), ""] for part, seconds in profile.host.items()]
    report.add_table(name, ["", "ms", "of the step"], rows)
    report.data.setdefault("steps", {})[name] = {
        "wall": profile.wall,
        "busy": profile.busy,
        "kinds": profile.kinds,
        "host": profile.host,
        "limit": limit,
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", metavar="FOLDER", help="a folder, or as for `firstlight serve`")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 64, 256], metavar="N")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens before the decoding")
    parser.add_argument("--prefill", nargs="*", default=["1x8000", "16x2000"], metavar="BxN")
    options = parser.parse_args()
    if machine.device("auto") != "cuda":
        raise BenchError("there is no GPU here")
    sys.path.insert(0, str(ROOT))
    folder = servers.model_folder(options.model)
    report = Report("where the time of a step goes", options)
    progress("limits")
    found = limits_cuda.measure_apart()
    limits, shape = Limits(found["read"], found["product"]), Shape.of(folder)
    engine = make_engine(folder)
    while engine.runner.use_idle_time():
        pass
    for batch in options.batch:
        progress(f"decode, {batch} sequences")
        profile = decode(engine, batch, options.prompt)
        middle = options.prompt + STEPS
        tabulate(
            report, f"decode, {batch} sequences", profile, limits.seconds(shape.decode([middle] * batch))
        )
    for case in options.prefill:
        progress(f"prefill, {case}")
        count, prompt = (int(part) for part in case.split("x"))
        profile = prefill(engine, count, prompt)
        tabulate(report, f"prefill, {case}", profile, limits.seconds(shape.prefill([prompt] * count)))
    report.finish()


if __name__ == "__main__":
    run(main)
