"""Each family on a GPU: its reference's answers, from prompts and from graphs, together and preempted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from runtime.engine.memory import block_bytes
from runtime.model.families import read_model
from tests.runtime.engine.test_against_transformers import make_engine
from tests.runtime.model.checkpoints import CASES, of_transformers
from tests.runtime.model.test_fallback import SERVED
from tests.runtime.model.test_families import PROMPTS, answers_of, check

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", CASES)
def test_answers_are_the_references(name: str, tmp_path: Path) -> None:
    reference = CASES[name](tmp_path)
    size = block_bytes(read_model(tmp_path).config, 16, torch.float32)
    for settings in (
        {"kv_cache_bytes": 8 << 20},
        {"kv_cache_bytes": 9 * size, "max_model_len": 100, "max_num_batched_tokens": 11},
    ):
        engine = make_engine(tmp_path, device="cuda", **settings)
        for _ in range(2):
            answers = answers_of(engine, *PROMPTS)
            assert answers[0].keys() == PROMPTS.keys()
            check(reference, answers)


@pytest.mark.parametrize("name", SERVED)
def test_a_model_without_a_family_answers_as_its_class_does(name: str, tmp_path: Path) -> None:
    reference = of_transformers(name, tmp_path, **SERVED[name])
    engine = make_engine(tmp_path, device="cuda", kv_cache_bytes=8 << 20, max_num_batched_tokens=11)
    for _ in range(2):
        answers = answers_of(engine, *PROMPTS)
        assert answers[0].keys() == PROMPTS.keys()
        check(reference, answers)
