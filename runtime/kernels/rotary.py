"""Rotary position embedding, fused with the write of keys and values into the paged cache.

The cache of one layer is two tensors; on a GPU see `gpu/rotary.py`. On a CPU keys lie transposed within
a block, [num_blocks, num_kv_heads, head_dim, block_size], so that one query meets neighbouring tokens in
neighbouring lanes; values are [num_blocks, num_kv_heads, block_size, head_dim].
"""

from __future__ import annotations

import torch

from runtime.kernels import native


def rotary_store(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_heads: int,
    interleaved: bool = False,
) -> None:
    """Rotate the queries and keys in qkv in place and put keys and values where `slots` says.

    qkv        [T, (num_heads + 2 num_kv_heads) * head_dim]: all queries, all keys, all values
    cos_sin    [max_position, 2, rotary_dim / 2] float32, or None where nothing rotates; dimensions past
               rotary_dim pass through
    positions  [T], rows of cos_sin

    Dimension i turns with i + rotary_dim / 2 ("neox" layout), or if interleaved, 2 i with 2 i + 1 ("gptj").
    """
    if qkv.device.type == "cuda":
        from runtime.kernels.gpu import rotary

        rotary.rotary_store(qkv, cos_sin, positions, slots, keys, values, num_heads, interleaved)
        return
    lib = native.library() if qkv.device.type == "cpu" else None
    if lib is None or cos_sin is None or interleaved:
        rotary_store_torch(qkv, cos_sin, positions, slots, keys, values, num_heads, interleaved)
        return
    _, num_kv_heads, block_size, head_dim = values.shape
    lib.rotary_store(
        qkv.data_ptr(), cos_sin.data_ptr(), positions.data_ptr(), slots.data_ptr(), keys.data_ptr(),
        values.data_ptr(), qkv.shape[0], num_heads, num_kv_heads, head_dim, 2 * cos_sin.shape[2], block_size,
    )  # fmt: skip


def rotary_store_torch(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor | None,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_heads: int,
    interleaved: bool = False,
) -> None:
    """The plain twin of `rotary_store`."""
    _, num_kv_heads, block_size, head_dim = values.shape
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    if cos_sin is not None:
        half = cos_sin.shape[2]
        turned = heads[:, : num_heads + num_kv_heads, : 2 * half]
        pairs = turned.view(*turned.shape[:2], *((half, 2) if interleaved else (2, half)))
        first, second = pairs.float().unbind(-1 if interleaved else -2)
        cos, sin = cos_sin[positions][:, None].unbind(2)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        turned.copy_(torch.stack(rotated, dim=-1 if interleaved else -2).flatten(-2))
    block, offset = slots // block_size, slots % block_size
    keys[block, :, :, offset] = heads[:, num_heads : num_heads + num_kv_heads]
    values[block, :, offset] = heads[:, num_heads + num_kv_heads :]
