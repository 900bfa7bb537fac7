"""What each rank gets of tensors that hold queries, keys and values, or gate and up, in one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from runtime.model.families import read_model
from runtime.weights.checkpoint import read_checkpoint
from runtime.weights.chunks import chunks_of
from runtime.weights.loader import MappedWeights
from runtime.weights.plan import Plan, make_plan
from tests.runtime.model.checkpoints import CASES
from tests.runtime.model.references import baichuan, chatglm, internlm2

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _interleaved(tensor: torch.Tensor) -> Parts:
    blocks = tensor.unflatten(0, (internlm2.KV_HEADS, internlm2.GROUP + 2, internlm2.DIM))
    q, k, v = blocks.split((internlm2.GROUP, 1, 1), dim=1)
    return q.flatten(0, 2), k.flatten(0, 2), v.flatten(0, 2)


def _grouped(tensor: torch.Tensor) -> Parts:
    q, k, v = tensor.split([n * chatglm.DIM for n in (chatglm.HEADS, chatglm.GROUPS, chatglm.GROUPS)])
    return q, k, v


# Of each family: its tensor in the second layer, and how that comes apart.
QKV: dict[str, tuple[str, Callable[[torch.Tensor], Parts], int]] = {
    "Baichuan 13B": ("model.layers.1.self_attn.W_pack.weight", lambda t: tuple(t.chunk(3)), baichuan.HEADS),
    "InternLM2": ("model.layers.1.attention.wqkv.weight", _interleaved, internlm2.KV_HEADS),
    "ChatGLM3": (
        "transformer.encoder.layers.1.self_attention.query_key_value.weight", _grouped, chatglm.GROUPS
    ),
}  # fmt: skip


def _arena(plan: Plan, name: str) -> bytes:
    """A parameter as it would lie on a device, with plain memory in the device's place."""
    arena = bytearray(plan.arena_bytes)
    for chunk in chunks_of(plan, 1000):
        run = chunk.file.read_bytes()[chunk.start : chunk.start + chunk.num_bytes]
        target = chunk.target
        for row in range(0, len(run), chunk.pitch):
            kept = run[row + chunk.skip : row + chunk.skip + chunk.width]
            arena[target : target + len(kept)] = kept
            target += len(kept)
    (parameter,) = (parameter for parameter in plan.parameters if parameter.name == name)
    size = sum(piece.num_bytes for piece in parameter.pieces)
    return bytes(arena[parameter.offset : parameter.offset + size])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("family", QKV)
def test_every_rank_has_its_heads_of_a_packed_tensor(family: str, world_size: int, tmp_path: Path) -> None:
    CASES[family](tmp_path)
    name, come_apart, _ = QKV[family]
    q, k, v = come_apart(load_file(tmp_path / "model.safetensors")[name])
    for rank in range(world_size):
        plan = make_plan(read_model(tmp_path), read_checkpoint(tmp_path), rank, world_size)
        expected = torch.cat([part.chunk(world_size)[rank] for part in (q, k, v)])
        assert torch.equal(torch.cat(MappedWeights(plan).tensors()["layers.1.qkv"]), expected)
        assert _arena(plan, "layers.1.qkv") == expected.contiguous().numpy().tobytes()


def test_more_ranks_than_key_heads_hold_the_same_one(tmp_path: Path) -> None:
    CASES["ChatGLM3"](tmp_path)
    name, come_apart, num_kv_heads = QKV["ChatGLM3"]
    q, k, v = come_apart(load_file(tmp_path / "model.safetensors")[name])
    for rank in range(4):
        plan = make_plan(read_model(tmp_path), read_checkpoint(tmp_path), rank, 4)
        kv_head = rank * num_kv_heads // 4
        expected = torch.cat(
            (q.chunk(4)[rank], k.chunk(num_kv_heads)[kv_head], v.chunk(num_kv_heads)[kv_head])
        )
        assert torch.equal(torch.cat(MappedWeights(plan).tensors()["layers.1.qkv"]), expected)
        assert _arena(plan, "layers.1.qkv") == expected.numpy().tobytes()


@pytest.mark.parametrize("world_size", [1, 2])
def test_gate_and_up_in_one_tensor_are_divided_each_by_itself(world_size: int, tmp_path: Path) -> None:
    CASES["ChatGLM3"](tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    gate, up = whole["transformer.encoder.layers.0.mlp.dense_h_to_4h.weight"].chunk(2)
    for rank in range(world_size):
        plan = make_plan(read_model(tmp_path), read_checkpoint(tmp_path), rank, world_size)
        expected = torch.cat([part.chunk(world_size)[rank] for part in (gate, up)])
        assert torch.equal(torch.cat(MappedWeights(plan).tensors()["layers.0.gate_up"]), expected)
        assert _arena(plan, "layers.0.gate_up") == expected.numpy().tobytes()
