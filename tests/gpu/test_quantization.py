"""Quantised checkpoints on a GPU: the answers of the weights that they stand for, where those are sure."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import transformers

from runtime.kernels import packed_linear
from runtime.protocol import Event, Wake
from tests.gpu.apart import tried_apart
from tests.gpu.test_sleep import fall_asleep, make
from tests.runtime.engine.test_against_transformers import differences, make_engine
from tests.runtime.model.checkpoints import of_transformers
from tests.runtime.model.references.packing import quantise
from tests.runtime.model.test_families import PROMPTS, answers_of
from tests.runtime.model.test_quantization import FORMATS, SIZES

pytestmark = pytest.mark.gpu
# Formats that differ in how they are unpacked alone are left to the CPU's tests.
CASES = [
    ("GPTQ Int8", "float16"),
    ("GPTQ Int8 with zero points", "bfloat16"),
    ("GPTQ Int4", "bfloat16"),
    ("GPTQ Int4, one group", "float16"),
    ("GPTQ Int4, groups that are not whole", "float16"),
    ("GPTQ Int4 with zero points", "float16"),
    ("GPTQ in the order of activations", "float16"),
    ("AWQ", "float16"),
    ("FP8", "bfloat16"),
    ("FP8 in blocks", "float16"),
    ("FP8, a scale for each output", "float16"),
]
SLEEPERS = [("GPTQ Int8",), ("GPTQ Int4 with zero points",), ("AWQ",), ("FP8 in blocks",)]
Outcomes = dict[tuple[Any, ...], Future[None]]


def make_checkpoint(directory: Path, name: str, dtype: str) -> dict[str, torch.Tensor]:
    """A tiny model, with random quantised weights; returns what they mean."""
    of_transformers("Qwen2", directory, **SIZES)
    meant = quantise(directory, FORMATS[name])
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch_dtype": dtype}))
    return meant


def reference(directory: Path, meant: dict[str, torch.Tensor], dtype: str) -> Any:
    """The model by transformers, whose files are those of before its weights were quantised."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    for name, weight in meant.items():
        model.get_parameter(name).data.copy_(weight)
    return model


def check_answers(name: str, dtype: str) -> None:
    with tempfile.TemporaryDirectory() as plain, tempfile.TemporaryDirectory() as folder:
        of_transformers("Qwen2", Path(plain), **SIZES)
        meant = make_checkpoint(Path(folder), name, dtype)
        model, half = (reference(Path(plain), meant, each) for each in ("float32", dtype))
        half.cuda()
        many = 20 if dtype == "bfloat16" else packed_linear.DEQUANTIZE_ROWS
        with mock.patch.object(packed_linear, "DEQUANTIZE_ROWS", many):
            compare(Path(folder), name, model, half)


def compare(directory: Path, name: str, model: Any, half: Any) -> None:
    engine = make_engine(directory, device="cuda", kv_cache_bytes=8 << 20, max_num_batched_tokens=40)
    layer = engine.runner.decoder.layers[0]
    assert isinstance(layer.mlp.down, packed_linear.PackedLinear) == ("not whole" not in name)
    for names in (["beyond four times"], list(PROMPTS), list(PROMPTS)):
        told = answers_of(engine, *names)[0]
        assert told.keys() == set(names)
        for each, place in differences(model, {each: PROMPTS[each] for each in names}, told).items():
            tokens = torch.tensor([PROMPTS[each] + told[each][:place]])
            with torch.no_grad():
                row = model(tokens).logits[0, -1]
                # How far another computation of this width is off says how closely tokens can be told apart.
                noise = float((half(tokens.cuda()).logits[0, -1].float().cpu() - row).abs().max())
            margin = float(row.max() - row[told[each][place]])
            assert margin < 3 * noise, f"{each} leaves the reference at {place} by {margin}, noise {noise}"


@pytest.fixture(scope="module")
def answered() -> Iterator[Outcomes]:
    with tried_apart(check_answers, CASES) as outcomes:
        yield outcomes


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_answers_are_those_of_the_weights_that_are_meant(case: tuple[str, str], answered: Outcomes) -> None:
    answered[case].result()


def check_asleep(name: str) -> None:
    events: list[Event] = []
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), name, "float16")
        engine, sleeper = make(Path(folder), events)
        before = answers_of(engine, *PROMPTS)
        for level in (2, 1, 2):
            fall_asleep(sleeper, level)
            sleeper.take(Wake())
            assert answers_of(engine, *PROMPTS) == before


@pytest.fixture(scope="module")
def woken() -> Iterator[Outcomes]:
    with tried_apart(check_asleep, SLEEPERS) as outcomes:
        yield outcomes


@pytest.mark.parametrize("case", SLEEPERS, ids=" ".join)
def test_asleep_and_awake_the_answers_are_the_same(case: tuple[str], woken: Outcomes) -> None:
    woken[case].result()
