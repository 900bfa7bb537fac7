"""One model of random weights that are made on the GPU, with no checkpoint anywhere, and its engine.

`python -m harness.device_model [RANK WORLD_SIZE PORT TOKEN]` is a process for one model, or for one rank of
it: it imports what it needs, waits for a `Task` as a line of JSON, and answers with what it measured.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import ROOT, BenchError
from harness.shapes import SHAPES
from harness.workload import PREFILL, QUICK_STANDARD, STANDARD, Prefill, Workload, random_ids

if TYPE_CHECKING:
    import torch

    from runtime.engine.core import Engine
    from runtime.model.families import Model
    from runtime.parallel.ranks import Ranks
    from runtime.weights.plan import Plan

STEPS = 48
PROMPT = 128
_LAYERS = ("num_hidden_layers", "num_layers")
_STANDARD_DEVIATION = 0.02
_PATIENCE_S = 120.0


@dataclass(frozen=True)
class Task:
    """A model of the catalogue, and how it is measured: `layers` 0 is all, `batches` the sizes of decodes."""

    model: str
    max_model_len: int
    layers: int
    batches: list[int]
    standard: bool
    steps: int = STEPS


@dataclass(frozen=True)
class Found:
    """What came out: seconds, bytes, tokens. `tpot` is by size of batch, the time a token takes; `standard`
    and `prefill` are tokens a second, of answers and of prompts."""

    ready: float
    step_bytes: int
    kv_bytes: int
    weight_bytes: int
    capacity: int
    layers: int
    tpot: dict[int, float]
    standard: float | None
    prefill: float | None


def config_of(name: str, layers: int = 0) -> dict[str, Any]:
    """config.json of a model, with fewer layers if asked for."""
    config = dict(SHAPES[name])
    key = next(key for key in _LAYERS if key in config)
    if layers:
        config[key] = min(layers, config[key])
    return config


def plan_of(model: Model, rank: int = 0, world_size: int = 1) -> Plan:
    """The plan of loading what there is no file of."""
    from runtime.weights.imagined import imagined_checkpoint
    from runtime.weights.plan import make_plan

    return make_plan(model, imagined_checkpoint(model), rank, world_size)


def fill(name: str, tensor: torch.Tensor, model: Model) -> None:
    """Random numbers such as a model might hold: weights of standard deviation 0.02, norms of one."""
    import torch

    kind = name.rpartition(".")[2]
    quantization = model.config.quantization
    if kind == "qweight":
        tensor.random_(-(1 << 31), 1 << 31)
    elif kind == "qzeros":
        assert quantization is not None
        # The middle of a field, less what is added to it.
        middle = (1 << (quantization.bits - 1)) - quantization.zero_offset
        word = sum(middle << shift for shift in range(0, 32, quantization.bits))
        tensor.fill_(word - (1 << 32) if word >> 31 else word)
    elif kind == "scales":
        assert quantization is not None
        # Of either sign: integers have a mean of half a step, which would grow from layer to layer.
        signs = torch.randint_like(tensor, 2).mul_(2).sub_(1)
        tensor.copy_(signs).mul_(_STANDARD_DEVIATION / ((1 << quantization.bits) / 12**0.5))
    elif "norm" in kind:
        tensor.fill_(1 - model.config.norm_offset)
    else:
        torch.nn.init.normal_(tensor, std=_STANDARD_DEVIATION)


def step_bytes(model: Model, plan: Plan) -> int:
    """What a decode step reads of the weights: all but an embedding that is not the head too, and constants
    that are dropped."""
    left_out = () if model.config.tie_word_embeddings else ("embedding",)
    return sum(
        piece.num_bytes
        for parameter in plan.parameters
        if parameter.name not in left_out and not parameter.name.endswith((".qzeros", ".g_idx"))
        for piece in parameter.pieces
    )


def make_engine(task: Task, directory: Path, ranks: Ranks | None) -> tuple[Engine, Model, Plan]:
    """The engine of a model whose config.json is in `directory`, ready, with its graphs captured.

    With `ranks` it is this rank's part of the engine, and all of them must do the same.
    """
    import torch

    from runtime.catalogue import ModelSpec
    from runtime.engine import canary
    from runtime.engine.build import build_engine
    from runtime.engine.gpu.memory import DeviceMemory
    from runtime.model.families import ForeignModel, read_model
    from runtime.protocol import EngineConfig
    from runtime.weights.cuda_driver import Driver
    from runtime.weights.upload import DeviceWeights

    model = read_model(directory)
    assert not isinstance(model, ForeignModel)
    rank, world_size = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
    plan, driver, group = plan_of(model, rank, world_size), Driver(), None
    weights = DeviceWeights(plan, driver)
    torch.manual_seed(rank)
    if ranks is not None:
        from runtime.parallel.entry import enter

        ranks.meet(has_gpu=True)
        group = enter(ranks, driver, _PATIENCE_S)
    for name, parts in weights.tensors().items():
        for part in parts:
            fill(name, part, model)
    config = EngineConfig.of(
        ModelSpec(id=task.model, source=str(directory)),
        str(directory),
        device="cuda",
        max_model_len=task.max_model_len,
        gpu_memory_utilization=0.95,
        max_num_seqs=256 if task.standard else max(task.batches),
        enable_prefix_caching=False,
    )
    memory = DeviceMemory(driver, weights, world_size)
    engine, _ = build_engine(config, directory, model, weights.tensors, "cuda", memory, group)
    canary.answer(canary.ask(engine))
    while engine.runner.use_idle_time():
        pass
    torch.cuda.synchronize()
    return engine, model, plan


def submit(engine: Engine, prompt: list[int], tokens: int, name: str) -> None:
    from runtime.protocol import SamplingParams, Submit

    sampling = SamplingParams(max_tokens=tokens, temperature=0.0)
    engine.submit(Submit(request_id=name, prompt_token_ids=prompt, sampling=sampling))


def decode_seconds(engine: Engine, batch: int, steps: int) -> float:
    """The time of a step in which `batch` sequences decode."""
    draw = random.Random(batch)
    names = [f"{batch} {index}" for index in range(batch)]
    for name in names:
        submit(engine, random_ids(draw, PROMPT, engine.vocab_size), 4 * steps + 64, name)
    while any(not each.sampled_here for each in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()
    for _ in range(8):
        engine.step()
    began = time.perf_counter()
    for _ in range(steps):
        engine.step()
    took = (time.perf_counter() - began) / steps
    engine.abort(names)
    while engine.has_work:
        engine.step()
    return took


def workload_rate(engine: Engine, workload: Workload) -> float:
    """Output tokens a second of a workload, all of it submitted at once."""
    requests = workload.requests(engine.vocab_size)
    missing = {str(index): request.max_tokens for index, request in enumerate(requests)}
    asked = sum(missing.values())
    began = time.perf_counter()
    for name, request in zip(missing, requests, strict=True):
        submit(engine, request.prompt, request.max_tokens, name)
    while engine.has_work:
        for delta in engine.step().deltas:
            missing[delta.request_id] -= len(delta.token_ids)
    took = time.perf_counter() - began
    if other := [int(name) for name, count in missing.items() if count]:
        request, lacks = requests[other[0]], missing[str(other[0])]
        raise BenchError(
            f"{len(other)} of {len(requests)} answers have other lengths than asked for: one, after "
            f"{len(request.prompt)} tokens, lacks {lacks} of {request.max_tokens}; the model's maximum is "
            f"{engine.max_model_len}"
        )
    return asked / took


def prefill_rate(engine: Engine, case: Prefill) -> float:
    """Prompt tokens a second until the last prompt's token."""
    draw = random.Random(case.name)
    began = time.perf_counter()
    for index in range(case.batch):
        submit(engine, random_ids(draw, case.prompt, engine.vocab_size), 1, str(index))
    while engine.has_work:
        engine.step()
    return case.batch * case.prompt / (time.perf_counter() - began)


def measure(task: Task, ranks: Ranks | None) -> Found:
    """Everything about one model; bytes are those of one rank."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "config.json").write_text(json.dumps(config_of(task.model, task.layers)))
        engine, model, plan = make_engine(task, directory, ranks)
        ready = time.perf_counter() - began
        config = model.config if ranks is None else model.config.of_rank(ranks.world_size)
        blocks = engine.scheduler.blocks
        tpot = {batch: decode_seconds(engine, batch, task.steps) for batch in task.batches}
        standard, prefill = None, None
        if task.standard:
            # Once before, so that whatever is compiled or loaded for steps with prompts is.
            workload_rate(engine, QUICK_STANDARD)
            prefill_rate(engine, PREFILL)
            prefill = prefill_rate(engine, PREFILL)
            standard = workload_rate(engine, STANDARD)
        return Found(
            ready=ready,
            step_bytes=step_bytes(model, plan),
            kv_bytes=2 * config.num_layers * config.num_kv_heads * config.head_dim * 2,
            weight_bytes=plan.read_bytes,
            capacity=blocks.num_blocks * blocks.block_size,
            layers=config.num_layers,
            tpot=tpot,
            standard=standard,
            prefill=prefill,
        )


def ranks_of(arguments: list[str]) -> Ranks | None:
    """This process's place among several; None for one that is alone."""
    if not arguments:
        return None
    from runtime.parallel.control import Meeting
    from runtime.parallel.ranks import Ranks

    rank, world_size, port, token = arguments
    return Ranks(int(rank), int(world_size), Meeting("127.0.0.1", int(port), token))


def main() -> None:
    """Serve one task."""
    sys.path.append(str(ROOT))
    import torch  # noqa: F401

    import runtime.engine.build
    import runtime.engine.gpu.memory
    import runtime.engine.gpu.runner  # noqa: F401

    if line := sys.stdin.readline():
        ranks = ranks_of(sys.argv[1:])
        found = measure(Task(**json.loads(line)), ranks)
        print(json.dumps(asdict(found)), flush=True)
        if ranks is not None:
            ranks.control.exchange(0)  # nobody leaves before all have answered
            os._exit(0)


if __name__ == "__main__":
    main()
