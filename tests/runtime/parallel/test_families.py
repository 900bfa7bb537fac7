"""Two and four ranks answer as the reference does, for every family."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.model import checkpoints
from tests.runtime.model.references import baichuan, internlm2, qwen
from tests.runtime.model.test_families import PROMPTS, answers_of, check
from tests.runtime.parallel.engines import run_ranks

# ALiBi for twelve heads: those of eight, then every other of sixteen. See `references/baichuan.py`.
SLOPES = [*(2.0**-n for n in range(1, 9)), *(2.0 ** -(n + 0.5) for n in range(4))]


@pytest.fixture(autouse=True)
def heads_for_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that four ranks can share, and a vocabulary that they cannot share evenly."""
    monkeypatch.setattr(
        checkpoints, "SIZES", checkpoints.SIZES | {"num_attention_heads": 8, "vocab_size": 121}
    )
    for module, own in (
        (baichuan, {"HEADS": 12, "HIDDEN": 192, "SLOPES": SLOPES}),
        (internlm2, {"HEADS": 8, "KV_HEADS": 4, "GROUP": 2, "HIDDEN": 128}),
        (qwen, {"HEADS": 4, "HIDDEN": 64}),
    ):
        for name, value in own.items():
            monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("name", checkpoints.CASES)
def test_answers_are_the_references(name: str, tmp_path: Path) -> None:
    reference = checkpoints.CASES[name](tmp_path)
    for world_size in (2, 4):
        found = run_ranks(
            tmp_path, world_size, lambda engine: (answers_of(engine, *PROMPTS), engine.fingerprint)
        )
        assert all(other == found[0] for other in found)
        check(reference, found[0][0])
