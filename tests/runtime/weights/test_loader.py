"""Weights on the CPU: views of the mapped files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from runtime.model.families import read_model
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.loader import MappedWeights
from runtime.weights.plan import Plan, make_plan
from tests.runtime.weights.conftest import write_model


def _plan(directory: Path, rank: int = 0, world_size: int = 1) -> Plan:
    return make_plan(read_model(directory), read_checkpoint(directory), rank, world_size)


def _mapped_file(address: int) -> str | None:
    """The file that the kernel says this address of ours is mapped from."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, path = line.split(maxsplit=5)
        first, last = (int(bound, 16) for bound in span.split("-"))
        if first <= address < last:
            return path
    return None


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_parameters_are_the_files_bytes_where_they_are_mapped(
    llama: Path, rank: int, world_size: int
) -> None:
    plan = _plan(llama, rank, world_size)
    weights = MappedWeights(plan)
    tensors = weights.tensors()
    for parameter in plan.parameters:
        for piece, view in zip(parameter.pieces, tensors[parameter.name], strict=True):
            assert _mapped_file(view.data_ptr()) == str(piece.tensor.file), parameter.name


def test_what_is_written_to_a_view_never_reaches_the_file(tmp_path: Path) -> None:
    write_model(tmp_path, torch.float32)
    before = {file: file.read_bytes() for file in tmp_path.glob("*.safetensors")}
    weights = MappedWeights(_plan(tmp_path))
    weights.tensors()["norm"][0].fill_(7)
    assert torch.equal(weights.tensors()["norm"][0], torch.full_like(weights.tensors()["norm"][0], 7))
    assert {file: file.read_bytes() for file in before} == before


def test_tensors_that_lie_unaligned_are_read_all_the_same(tmp_path: Path) -> None:
    write_model(tmp_path, torch.float32)
    whole = {}
    for file in tmp_path.glob("*.safetensors"):
        content = file.read_bytes()
        whole.update(load(content))
        length = int.from_bytes(content[:8], "little")
        # One space more at the header's end, which JSON does not mind, and every tensor lies at an odd place.
        file.write_bytes(
            (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
        )
    plan = _plan(tmp_path)
    tensors = MappedWeights(plan).tensors()
    for parameter in plan.parameters:
        for piece, view in zip(parameter.pieces, tensors[parameter.name], strict=True):
            assert piece.tensor.start % 4
            assert torch.equal(view, whole[piece.tensor.name])


def test_loading_tells_how_far_it_is(llama: Path) -> None:
    weights = MappedWeights(_plan(llama))
    seen: list[int] = []
    weights.load(seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == weights.num_bytes == sum(f.stat().st_size for f in llama.glob("*.safetensors"))
