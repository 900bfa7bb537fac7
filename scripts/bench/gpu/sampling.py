"""Sampling a token for every row of logits, stage by stage, against reading the logits once."""

from __future__ import annotations

import itertools

import torch
from harness.report import Report, progress
from harness.table import number

from gpu.limits import Limits
from gpu.timing import replay_seconds
from runtime.kernels.gpu.sampling.logprobs import token_logprobs
from runtime.kernels.gpu.sampling.parameters import SamplingTables, Stages
from runtime.kernels.gpu.sampling.sampler import Batch, Sampler
from runtime.protocol import SamplingParams

VOCAB_SIZE = 128256
BATCHES = (1, 8, 64, 256)
ASKED = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top-p": {"temperature": 0.8, "top_p": 0.95},
    "top-k": {"temperature": 0.8, "top_k": 50},
    "top-k, top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "greedy, penalties": {"temperature": 0.0, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
}
LOGITS = {"peaked": 12.0, "flat": 0.0}
"""How far the likely tokens of a row stand out of the others, which are normal with deviation 2.5."""


def _logits(rows: int, height: float, dtype: torch.dtype) -> torch.Tensor:
    logits = torch.randn(rows, VOCAB_SIZE, device="cuda") * 2.5
    likely = torch.randint(VOCAB_SIZE, (rows, 40), device="cuda")
    return logits.scatter_add_(1, likely, torch.rand(rows, 40, device="cuda") * height).to(dtype)


def add_tables(report: Report, limits: Limits) -> None:
    largest = max(BATCHES)
    tables = SamplingTables.allocate(largest, VOCAB_SIZE, "cuda")
    sampler = Sampler(tables, largest, VOCAB_SIZE)
    last_token, seq_len, tokens = torch.zeros(3, largest, dtype=torch.int32, device="cuda")
    lines, data = [], {}
    for (shape, height), (name, asked) in itertools.product(LOGITS.items(), ASKED.items()):
        progress(f"{name}, {shape} logits")
        sampling = SamplingParams(max_tokens=1, **asked)  # type: ignore[arg-type]
        stages = Stages.of(sampling)
        for slot in range(largest):
            tables.enter(slot, sampling, slot, range(1000))
        for dtype in (torch.float32, torch.bfloat16):
            times = {}
            for rows in BATCHES:
                batch = Batch(
                    _logits(rows, height, dtype),
                    torch.arange(rows, dtype=torch.int32, device="cuda"),
                    torch.full((rows,), 1000, dtype=torch.int32, device="cuda"),
                )
                times[rows] = replay_seconds(
                    lambda batch=batch, stages=stages: sampler.sample(
                        batch, stages, tokens[: len(batch.rows)], last_token, seq_len
                    )
                )
            label = f"{name}, {shape}, {'float32' if dtype == torch.float32 else 'bf16'}"
            data[label] = {str(rows): seconds for rows, seconds in times.items()}
            reading = largest * VOCAB_SIZE * dtype.itemsize / limits.read
            cells = [number(seconds * 1e6) for seconds in times.values()]
            lines.append([label, *cells, number(reading * 1e6)])
    report.data["sampling"] = data
    report.add_table(
        f"sampling from {VOCAB_SIZE} tokens, µs by rows",
        ["", *map(str, BATCHES), f"reading {largest} rows once"],
        lines,
    )
    _logprobs(report)


def _logprobs(report: Report) -> None:
    cells = []
    for rows in BATCHES:
        logits, tokens = (
            _logits(rows, 12.0, torch.float32),
            torch.zeros(rows, dtype=torch.int32, device="cuda"),
        )
        cells.append(number(replay_seconds(lambda x=logits, y=tokens: token_logprobs(x, y, 5)) * 1e6))
    report.add_table(
        "log probabilities, five likeliest, µs by rows", ["", *map(str, BATCHES)], [["", *cells]]
    )
