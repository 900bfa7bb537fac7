"""Each rank's share of a model, against whole tensors as the safetensors package reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.errors import FirstlightError
from runtime.model.families import read_model
from runtime.weights.checkpoint import CheckpointError, read_checkpoint
from runtime.weights.chunks import chunks_of
from runtime.weights.loader import MappedWeights
from runtime.weights.plan import ALIGNMENT, Plan, PlanError, make_plan
from tests.runtime.weights.conftest import CONFIG, HEAD_DIM, HEADS, KV_HEADS, LAYERS, SHAPES, write_model

WORLD_SIZES = (1, 2, 4)
# Which axis is divided, by the last names of a tensor; tensors that are not named are whole everywhere.
AXES = {
    **dict.fromkeys(("embed_tokens.weight", "lm_head.weight"), 0),
    **dict.fromkeys((f"{n}_proj.{kind}" for n in ("q", "gate", "up") for kind in ("weight", "bias")), 0),
    **dict.fromkeys(("o_proj.weight", "down_proj.weight"), 1),
}
KV_NAMES = tuple(f"{n}_proj.{kind}" for n in ("k", "v") for kind in ("weight", "bias"))

Shares = list[dict[str, torch.Tensor]]


def _plans(directory: Path, world_size: int) -> list[Plan]:
    model, tensors = read_model(directory), read_checkpoint(directory)
    return [make_plan(model, tensors, rank, world_size) for rank in range(world_size)]


def _shares(directory: Path, world_size: int) -> Shares:
    """What each rank gets of each checkpoint tensor."""
    shares = []
    for plan in _plans(directory, world_size):
        views = MappedWeights(plan).tensors()
        shares.append(
            {
                piece.tensor.name: view
                for parameter in plan.parameters
                for piece, view in zip(parameter.pieces, views[parameter.name], strict=True)
            }
        )
    return shares


def _whole(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_shares_of_all_ranks_are_the_whole_tensors(llama: Path, world_size: int) -> None:
    shares, whole = _shares(llama, world_size), _whole(llama)
    assert all(share.keys() == whole.keys() == SHAPES.keys() for share in shares)
    for name, tensor in whole.items():
        parts = [share[name] for share in shares]
        axis = AXES.get(".".join(name.split(".")[-2:]))
        if name.endswith(KV_NAMES):
            # A head that several ranks need is with each of them.
            distinct = parts[:: max(1, world_size // KV_HEADS)]
            assert torch.equal(torch.cat(distinct), tensor), name
        elif axis is None:
            assert all(torch.equal(part, tensor) for part in parts), name
        else:
            assert torch.equal(torch.cat(parts, axis), tensor), name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_rank_has_the_kv_heads_that_its_query_heads_read(llama: Path, world_size: int) -> None:
    whole = _whole(llama)
    per_kv_head = HEADS // KV_HEADS
    for rank, share in enumerate(_shares(llama, world_size)):
        name = "model.layers.0.self_attn.{}_proj.weight"
        queries = share[name.format("q")].unflatten(0, (-1, HEAD_DIM))
        first = rank * len(queries)
        read = sorted({(first + n) // per_kv_head for n in range(len(queries))})
        for kind in ("k", "v"):
            heads = whole[name.format(kind)].unflatten(0, (-1, HEAD_DIM))[read]
            assert torch.equal(share[name.format(kind)].unflatten(0, (-1, HEAD_DIM)), heads)


def test_a_vocabulary_that_does_not_divide_leaves_the_last_rank_less(llama: Path) -> None:
    rows = [len(share["lm_head.weight"]) for share in _shares(llama, 4)]
    assert rows == [14, 14, 14, 11]


def test_a_vocabulary_smaller_than_its_padding_leaves_ranks_with_none(tmp_path: Path) -> None:
    write_model(tmp_path, torch.float32)
    tensors = _whole(tmp_path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:5].clone()
    _rewrite(tmp_path, tensors, vocab_size=5)
    assert [len(share["lm_head.weight"]) for share in _shares(tmp_path, 4)] == [2, 2, 1, 0]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_parameters_lie_apart_in_the_arena_and_their_pieces_side_by_side(
    llama: Path, world_size: int
) -> None:
    for plan in _plans(llama, world_size):
        end = 0
        for parameter in plan.parameters:
            assert parameter.offset % ALIGNMENT == 0
            assert parameter.offset >= end
            end = parameter.offset + sum(piece.num_bytes for piece in parameter.pieces)
        assert end <= plan.arena_bytes
        assert plan.read_bytes == sum(p.num_bytes for parameter in plan.parameters for p in parameter.pieces)
        assert set(plan.files) == set(llama.glob("*.safetensors"))


@pytest.mark.parametrize("buffer_bytes", [100, 1000, 1 << 20])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_an_arena_filled_chunk_by_chunk_holds_the_shares(
    llama: Path, world_size: int, buffer_bytes: int
) -> None:
    """The way to a device, with plain memory in the device's place."""
    for plan, share in zip(_plans(llama, world_size), _shares(llama, world_size), strict=True):
        arena = bytearray(plan.arena_bytes)
        for chunk in chunks_of(plan, buffer_bytes):
            run = chunk.file.read_bytes()[chunk.start : chunk.start + chunk.num_bytes]
            target = chunk.target
            for row in range(0, len(run), chunk.pitch):
                kept = run[row + chunk.skip : row + chunk.skip + chunk.width]
                arena[target : target + len(kept)] = kept
                target += len(kept)
        for parameter in plan.parameters:
            expected = b"".join(_bytes(share[piece.tensor.name]) for piece in parameter.pieces)
            assert arena[parameter.offset : parameter.offset + len(expected)] == expected, parameter.name


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_a_tied_head_is_read_once(llama: Path, tmp_path: Path) -> None:
    tensors = _whole(llama)
    _rewrite(tmp_path, tensors, tie_word_embeddings=True)
    (plan,) = _plans(tmp_path, 1)
    read = [piece.tensor.name for parameter in plan.parameters for piece in parameter.pieces]
    assert sorted(read) == sorted(SHAPES.keys() - {"lm_head.weight"})


# ---- what does not fit -------------------------------------------------------------------------


def _rewrite(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    for old in (*directory.glob("*.safetensors"), *directory.glob("*.index.json")):
        old.unlink()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG | config))


UP = f"model.layers.{LAYERS - 1}.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("replacement", "says"),
    [
        (None, f"Tensor {UP} is not in the checkpoint"),
        (torch.zeros(40, 25), f"tensor {UP} has shape [40, 25]; config.json implies [40, 24]"),
        (torch.zeros(40 * 24), f"tensor {UP} has shape [960]; config.json implies [40, 24]"),
        (torch.zeros(40, 24, dtype=torch.int8), f"tensor {UP} has dtype I8"),
        (torch.zeros(40, 24, dtype=torch.float64), f"tensor {UP} has dtype F64"),
        (torch.zeros(40, 24, dtype=torch.float16), f"{UP}: F16"),
    ],
    ids=["missing", "shape", "flat", "int8", "float64", "mixed"],
)
def test_a_checkpoint_that_is_not_what_the_config_says(
    tmp_path: Path, replacement: torch.Tensor | None, says: str
) -> None:
    write_model(tmp_path, torch.float32)
    tensors = _whole(tmp_path)
    del tensors[UP]
    _rewrite(tmp_path, tensors if replacement is None else {**tensors, UP: replacement})
    with pytest.raises(CheckpointError) as caught:
        _plans(tmp_path, 1)
    assert says in str(caught.value)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    write_model(tmp_path, torch.float32)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no 'model-2\.safetensors'"):
        _plans(tmp_path, 1)


@pytest.mark.parametrize("world_size", [0, 3, 5, 16])
def test_a_number_of_ranks_that_the_heads_do_not_divide_by(llama: Path, world_size: int) -> None:
    with pytest.raises(PlanError, match=r"These sizes fit: \[1, 2, 4, 8\]"):
        make_plan(read_model(llama), read_checkpoint(llama), 0, world_size)
    assert issubclass(PlanError, FirstlightError)
