"""Rotary embedding as transformers computes it, and where keys and values end up."""

from __future__ import annotations

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as rotate_interleaved
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as rotate_halves

from runtime.kernels.gpu.rotary import rotary_store, rotary_store_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUM_BLOCKS, BLOCK_SIZE = 4, 8
POSITIONS = [0, 5, 17, 3]
SLOTS = [9, -1, 31, 0]


def table(length: int, rotary_dim: int) -> torch.Tensor:
    frequencies = 10000.0 ** -(torch.arange(0, rotary_dim, 2, device=DEVICE) / rotary_dim)
    angles = torch.arange(length, device=DEVICE)[:, None] * frequencies
    return torch.stack((angles.cos(), angles.sin()), dim=1).contiguous()


def rotate(
    heads: torch.Tensor, cos_sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two heads [T, num_heads, head_dim] through transformers: the same tokens as queries and as keys."""
    cos, sin = (torch.cat((part, part), dim=-1)[None] for part in cos_sin[POSITIONS].unbind(1))
    rotary_dim = cos.shape[-1]
    batch = heads.transpose(0, 1)[None]
    if interleaved:
        turned, _ = rotate_interleaved(batch, batch, cos, sin)
    else:
        turned, _ = rotate_halves(batch[..., :rotary_dim], batch[..., :rotary_dim], cos, sin)
        turned = torch.cat((turned, batch[..., rotary_dim:]), dim=-1)
    return turned[0].transpose(0, 1)


@pytest.mark.parametrize("store", [rotary_store, rotary_store_torch])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "num_heads", "num_kv_heads"),
    [(64, 64, 4, 2), (64, 32, 3, 1), (80, 80, 2, 2), (16, 0, 6, 3)],
)
def test_against_transformers(
    store, interleaved: bool, head_dim: int, rotary_dim: int, num_heads: int, num_kv_heads: int
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(len(POSITIONS), (num_heads + 2 * num_kv_heads) * head_dim, device=DEVICE)
    heads = qkv.clone().view(len(POSITIONS), -1, head_dim)
    expected = heads.clone()
    cos_sin = table(20, rotary_dim) if rotary_dim else None
    if cos_sin is not None:
        expected[:, :-num_kv_heads] = rotate(heads[:, :-num_kv_heads], cos_sin, interleaved)
    keys, values = torch.full((2, NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, head_dim), 7.0, device=DEVICE)

    store(
        qkv,
        cos_sin,
        torch.tensor(POSITIONS, dtype=torch.int32, device=DEVICE),
        torch.tensor(SLOTS, dtype=torch.int32, device=DEVICE),
        keys,
        values,
        num_heads,
        interleaved,
    )

    torch.testing.assert_close(qkv, expected.view_as(qkv), atol=1e-6, rtol=1e-5)
    for cache, first in ((keys, num_heads), (values, num_heads + num_kv_heads)):
        by_slot = cache.transpose(1, 2).flatten(0, 1)
        written = {slot: token for token, slot in enumerate(SLOTS) if slot >= 0}
        for slot in range(NUM_BLOCKS * BLOCK_SIZE):
            if slot in written:
                assert torch.equal(
                    by_slot[slot], qkv.view_as(expected)[written[slot], first : first + num_kv_heads]
                )
            else:
                assert (by_slot[slot] == 7.0).all()
