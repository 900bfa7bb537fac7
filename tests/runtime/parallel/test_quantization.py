"""Two ranks with quantised weights answer as one process with all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.engine.test_against_transformers import make_engine
from tests.runtime.model.checkpoints import of_transformers
from tests.runtime.model.references.packing import quantise
from tests.runtime.model.test_families import PROMPTS, answers_of
from tests.runtime.model.test_quantization import FORMATS
from tests.runtime.parallel.engines import run_ranks

SIZES = {"hidden_size": 96, "intermediate_size": 128, "num_attention_heads": 8}


@pytest.mark.parametrize(
    "name",
    [
        "GPTQ Int8",
        "GPTQ Int4 with zero points",
        "GPTQ Int4, one group",
        "GPTQ in the order of activations",
        "AWQ",
    ],
)
def test_answers_are_those_of_one_process(name: str, tmp_path: Path) -> None:
    of_transformers("Qwen2", tmp_path, **SIZES)
    quantise(tmp_path, FORMATS[name])
    expected, logprobs = answers_of(make_engine(tmp_path), *PROMPTS)
    found = run_ranks(tmp_path, 2, lambda engine: answers_of(engine, *PROMPTS))
    assert found[0] == found[1]
    assert found[0][0] == expected
    for prompt, values in logprobs.items():
        assert found[0][1][prompt] == pytest.approx(values, abs=1e-3)
