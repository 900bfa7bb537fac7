"""A decoder that computes long steps in halves gives the tokens of one that does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from runtime.engine.cpu.runner import HostRunner
from runtime.engine.scheduler import Scheduled
from runtime.engine.step_parts import StepPart
from runtime.kernels.batch import PackedBatch
from runtime.model.decoder import Decoder
from runtime.model.layers import LayerCache
from runtime.model.overlap import Halves
from runtime.parallel.group import Group
from tests.runtime.engine.test_against_transformers import (
    PROMPTS,
    differences,
    run,
    save_random_llama,
    submit,
)
from tests.runtime.parallel.engines import run_ranks

LONG = 48


class Sums:
    """A `Half` through gloo, that adds up a sum when it is settled."""

    max_rows = 1 << 20

    def __init__(self, group: Group) -> None:
        self._group = group
        self._sent: torch.Tensor | None = None
        self._result: torch.Tensor | None = None

    @property
    def under_way(self) -> bool:
        return self._sent is not None

    def send(self, x: torch.Tensor) -> None:
        assert self._sent is None
        self._sent = x.clone()
        x.zero_()  # nobody needs it any more

    def settle(self, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        assert self._sent is not None
        assert self._result is None
        self._result = self._group.add_rms_norm(self._sent, residual, weight, eps)

    def received(self) -> torch.Tensor:
        assert self._result is not None
        result, self._sent, self._result = self._result, None, None
        return result

    def own_of(self, residual: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return residual[rows] if self._group.rank == 0 else torch.zeros_like(residual[rows])


def test_tokens_are_the_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_random_llama(tmp_path, torch.float32)
    pack, forward = HostRunner._pack, Decoder.forward
    cut: list[int] = []

    def pack_halves(runner: HostRunner, scheduled: Sequence[Scheduled]) -> object:
        part = StepPart(0, 0, scheduled)
        if part.stop < LONG:
            return pack(runner, scheduled)
        first, second = part.halves()
        assert first.stop == second.start
        assert second.stop == part.stop
        cut.append(first.stop)
        return pack(runner, first.prompts), pack(runner, second.prompts)

    def forward_halves(
        decoder: Decoder, batch: PackedBatch | tuple[PackedBatch, PackedBatch], cache: Sequence[LayerCache]
    ) -> torch.Tensor:
        if isinstance(batch, PackedBatch):
            return forward(decoder, batch, cache)
        assert decoder.group is not None
        sums: tuple[Sums, Sums] = (Sums(decoder.group), Sums(decoder.group))
        return Halves(decoder, sums).forward(batch, cache)  # type: ignore[arg-type]

    monkeypatch.setattr(HostRunner, "_pack", pack_halves)
    monkeypatch.setattr(Decoder, "forward", forward_halves)
    prompts = {f"r{n}": prompt for n, prompt in enumerate([*PROMPTS, list(range(30, 110))])}

    def answers(engine: object) -> tuple[dict[str, list[int]], dict[str, list[float]]]:
        for name, prompt in prompts.items():
            submit(engine, name, prompt, prompt_logprobs=2 if name == "r2" else None)  # type: ignore[arg-type]
        return run(engine)  # type: ignore[arg-type]

    found = run_ranks(tmp_path, 2, answers, enable_prefix_caching=False)
    assert found[0] == found[1]
    assert differences(model, prompts, found[0][0]) == {}
    assert cut
