"""Once warm, no size of batch compiles anything: a compile in mid-traffic stalls every request."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import triton

from runtime.kernels.gpu import binaries
from runtime.kernels.gpu.activation import silu_mul
from runtime.kernels.gpu.embedding import embedding
from runtime.kernels.gpu.gemv import gemv
from runtime.kernels.gpu.norm import add_rms_norm
from runtime.kernels.gpu.prepare import apply_updates, prepare_decode
from runtime.kernels.gpu.rotary import rotary_store
from runtime.kernels.gpu.sampling.logprobs import token_logprobs
from runtime.kernels.gpu.sampling.mask import RowMasks
from runtime.kernels.gpu.sampling.parameters import SamplingTables, Stages
from runtime.kernels.gpu.sampling.sampler import Batch, Sampler
from tests.runtime.engine.test_against_transformers import save_random_llama

pytestmark = pytest.mark.gpu
SIZES = [1, 2, 3, 5, 15, 16, 17, 100, 128]
VOCAB, HIDDEN, MAX_ROWS = 5000, 256, 128


@contextmanager
def compiled() -> Iterator[list[str]]:
    """The kernels that are compiled meanwhile."""
    names: list[str] = []

    def note(*, fn: Any, **_: object) -> None:
        names.append(fn.name)

    # What was kept of earlier compilations is nothing to go by here.
    with triton.knobs.runtime.scope(), mock.patch.object(binaries, "find", return_value=None):
        triton.knobs.runtime.jit_post_compile_hook = note
        yield names


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def words(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32, device="cuda")


class Step:
    """Every kernel of a step, for batches of any size that begin anywhere in a larger buffer."""

    def __init__(self) -> None:
        self.tables = SamplingTables.allocate(MAX_ROWS, VOCAB, "cuda")
        self.sampler = Sampler(self.tables, MAX_ROWS, VOCAB)
        self.cache = bf16(2, 4, 2, 16, 64)
        self.weight, self.head = bf16(HIDDEN, HIDDEN), bf16(VOCAB, HIDDEN)
        self.last_token, self.seq_len, self.blocks = words(MAX_ROWS), words(MAX_ROWS), words(MAX_ROWS, 4)
        self.cos_sin = torch.randn(64, 2, 32, device="cuda")

    def run(self, size: int) -> None:
        sections = words(6, 4 * MAX_ROWS)[:, size % 4 : size % 4 + size].unbind()
        rows, token_ids, positions, slots, lengths, tokens = sections
        rows.copy_(torch.arange(size))
        apply_updates(words(size, 3), words(1), self.blocks)
        prepare_decode(
            rows, self.last_token, self.seq_len, self.blocks, 16, token_ids, positions, slots, lengths
        )
        x = embedding(token_ids, self.head, bf16(size, HIDDEN))
        x = add_rms_norm(x, bf16(size, HIDDEN), self.weight[0], 1e-5, torch.empty_like(x))
        rotary_store(bf16(size, 8 * 64), self.cos_sin, positions, slots, *self.cache, 4)
        silu_mul(bf16(size, 2 * HIDDEN), x)
        if 1 < size <= 16:
            gemv(x, self.weight, x.clone())
        logits = bf16(size, VOCAB)
        batch = Batch(logits, rows, lengths)
        masks = RowMasks(words(size), words(MAX_ROWS, VOCAB // 32 + 1)[:size])
        for stages in (Stages(), Stages(draw=True), Stages(True, True, True, True)):
            self.sampler.sample(batch, stages, tokens, self.last_token, self.seq_len, masks)
        token_logprobs(logits, tokens, 3)


def test_new_batch_sizes_compile_nothing() -> None:
    step = Step()
    with compiled() as first:
        step.run(9)
    with compiled() as later:
        for size in SIZES:
            step.run(size)

    assert first
    assert later == []


# An engine that answers requests of every kind, and says which kernels it had to compile, and when.
SERVE = """
import sys
from runtime.catalogue import ModelSpec
from runtime.engine.start import start
from runtime.protocol import EngineConfig, SamplingParams, Submit

def compiled():
    cache = sys.modules.get("runtime.kernels.gpu.cache")
    return cache.compiled() if cache else {}


config = EngineConfig(
    model=ModelSpec(id="m", source=sys.argv[1]), cache_dir=sys.argv[2], device="cuda", kv_cache_bytes=1 << 28
)
engine, ready, *_ = start(config, lambda event: None)
print("start:", ready.counters["kernels_compiled"], *compiled())
KINDS = [
    {"temperature": 0.0}, {"temperature": 1.0, "seed": 1}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.1}, {"logit_bias": {7: 2.0}, "temperature": 0.0},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"min_tokens": 3, "stop_token_ids": (5,), "top_k": 3}, {"logprobs": 3}, {"prompt_logprobs": 2},
    {"logprobs": 0, "top_p": 0.5, "repetition_penalty": 1.1},
]
number = 0
for count in (1, 2, 5, 17, 40):
    for kinds in ([kind] for kind in KINDS) if count < 3 else (KINDS, KINDS[:2]):
        for each in range(count):
            length = (1, 3, 64, 17, 700)[(number + each) % 5]
            prompt = [(number * 31 + each * 7 + at) % 500 for at in range(length)]
            sampling = SamplingParams(max_tokens=6, **kinds[each % len(kinds)])
            engine.submit(Submit(request_id=f"{number}.{each}", prompt_token_ids=prompt, sampling=sampling))
        while engine.has_work:
            engine.step()
        number += 1
while engine.runner.use_idle_time():
    pass
print("served:", *compiled())
print("imported the compiler:", "triton" in sys.modules)
"""


def test_with_kernels_compiled_ahead_an_engine_compiles_nothing(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512,
        "vocab_size": 512, "max_position_embeddings": 2048,
    }  # fmt: skip
    model = tmp_path / "model"
    save_random_llama(model, torch.bfloat16, **shape)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "kernels")}
    major, minor = torch.cuda.get_device_capability()

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    python("-m", "runtime.engine.kernels_ahead", str(model), f"{major}{minor}")
    said = python("-c", SERVE, str(model), str(tmp_path / "cache"))
    assert said.splitlines() == ["start: 0", "served:", "imported the compiler: False"]
