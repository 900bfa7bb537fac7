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
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_heads: int,
) -> None:
    """Rotate the queries and keys in qkv in place and put keys and values where `slots` says.

    qkv      [T, (num_heads + 2 num_kv_heads) * head_dim]: all queries, all keys, all values
    cos_sin  [max_position, 2, rotary_dim / 2] float32; the first half of the rotated dimensions turns
             with the second ("neox" layout); dimensions past rotary_dim pass through
    """
    if qkv.device.type == "cuda":
        from runtime.kernels.gpu import rotary

        rotary.rotary_store(qkv, cos_sin, positions, slots, keys, values, num_heads)
        return
    lib = native.library() if qkv.device.type == "cpu" else None
    if lib is None:
        rotary_store_torch(qkv, cos_sin, positions, slots, keys, values, num_heads)
        return
    _, num_kv_heads, block_size, head_dim = values.shape
    lib.rotary_store(
        qkv.data_ptr(), cos_sin.data_ptr(), positions.data_ptr(), slots.data_ptr(), keys.data_ptr(),
        values.data_ptr(), qkv.shape[0], num_heads, num_kv_heads, head_dim, 2 * cos_sin.shape[2], block_size,
    )  # fmt: skip


def rotary_store_torch(
    qkv: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    num_heads: int,
) -> None:
    """The plain twin of `rotary_store`."""
    _, num_kv_heads, block_size, head_dim = values.shape
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, head_dim)
    half = cos_sin.shape[2]
    cos, sin = cos_sin[positions].unbind(1)
    turned = heads[:, : num_heads + num_kv_heads, : 2 * half].float()
    first, second = turned[..., :half], turned[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    heads[:, : num_heads + num_kv_heads, : 2 * half] = rotated.to(qkv.dtype)
    block, offset = slots // block_size, slots % block_size
    keys[block, :, :, offset] = heads[:, num_heads : num_heads + num_kv_heads]
    values[block, :, offset] = heads[:, num_heads + num_kv_heads :]
