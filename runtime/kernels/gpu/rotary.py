"""Rotary position embedding, fused with the write of keys and values into the paged cache.

The cache of one layer is two tensors, keys and values, each [num_blocks, num_kv_heads, block_size,
head_dim]: what one head keeps of one block is contiguous.
"""

from __future__ import annotations

import torch

from runtime.kernels.gpu.early import begin, early_launch
from runtime.kernels.gpu.language import tl, triton
from runtime.kernels.gpu.launch import cdiv, kernel, next_power_of_2

# How many elements of a token one program turns at once: a power of two.
_TILE = 2048


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

    qkv        [T, (num_heads + 2 num_kv_heads) * head_dim], contiguous: all queries, keys, values
    cos_sin    [max_position, 2, rotary_dim / 2] float32, or None where nothing rotates (ALiBi);
               dimensions past rotary_dim pass through
    positions  [T], rows of cos_sin
    slots      [T] int32: block * block_size + offset, or -1 for what is not to be kept

    Dimension i turns with i + rotary_dim / 2 ("neox" layout), or if interleaved, 2 i with 2 i + 1.
    """
    _, num_kv_heads, block_size, head_dim = values.shape
    half = 0 if cos_sin is None else cos_sin.shape[2]
    # A whole number of heads a program, and at least as many elements as it has threads.
    heads_per_program = max(1, _TILE // next_power_of_2(head_dim))
    _rotary_store_kernel[(qkv.shape[0], cdiv(num_heads + 2 * num_kv_heads, heads_per_program))](
        qkv,
        qkv if cos_sin is None else cos_sin,
        positions,
        slots,
        keys,
        values,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        HALF=half,
        HALF_PADDED=next_power_of_2(max(half, 1)),
        REST_PADDED=next_power_of_2(max(head_dim - 2 * half, 1)),
        HEADS=heads_per_program,
        INTERLEAVED=interleaved,
        num_warps=4,
        **early_launch(),
    )


@kernel
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _rotary_store_kernel(
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    keys_ptr,
    values_ptr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    REST_PADDED: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    EARLY: tl.constexpr,
):
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    row_ptr = qkv_ptr + token * (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM + head * HEAD_DIM
    slot = tl.load(slots_ptr + token).to(tl.int64)
    # Of padding, no heads are kept.
    num_kept = tl.where(slot >= 0, NUM_KV_HEADS, 0)
    is_key = (head >= NUM_HEADS) & (head < NUM_HEADS + num_kept)
    is_value = (head >= NUM_HEADS + NUM_KV_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS + num_kept)
    turns = head < NUM_HEADS + NUM_KV_HEADS
    kv_head = tl.where(head >= NUM_HEADS + NUM_KV_HEADS, head - NUM_HEADS - NUM_KV_HEADS, head - NUM_HEADS)
    cell = ((slot // BLOCK_SIZE * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM
    if HALF > 0:
        pair = tl.arange(0, HALF_PADDED)[None, :]
        first_dim = pair * 2 if INTERLEAVED else pair
        second_dim = first_dim + (1 if INTERLEAVED else HALF)
        mask = (head < NUM_HEADS + 2 * NUM_KV_HEADS) & (pair < HALF)
        first = tl.load(row_ptr + first_dim, mask, other=0.0)
        second = tl.load(row_ptr + second_dim, mask, other=0.0)
        angle_ptr = cos_sin_ptr + tl.load(positions_ptr + token).to(tl.int64) * (2 * HALF) + pair
        cos = tl.load(angle_ptr, pair < HALF, other=0.0)
        sin = tl.load(angle_ptr + HALF, pair < HALF, other=0.0)
        wide_first = first.to(tl.float32)
        wide_second = second.to(tl.float32)
        turned_first = (wide_first * cos - wide_second * sin).to(first.dtype)
        turned_second = (wide_second * cos + wide_first * sin).to(first.dtype)
        first = tl.where(turns, turned_first, first)
        second = tl.where(turns, turned_second, second)
        tl.store(row_ptr + first_dim, first, mask & turns)
        tl.store(row_ptr + second_dim, second, mask & turns)
        tl.store(keys_ptr + cell + first_dim, first, mask & is_key)
        tl.store(keys_ptr + cell + second_dim, second, mask & is_key)
        tl.store(values_ptr + cell + first_dim, first, mask & is_value)
        tl.store(values_ptr + cell + second_dim, second, mask & is_value)
    if 2 * HALF < HEAD_DIM:
        dim = 2 * HALF + tl.arange(0, REST_PADDED)[None, :]
        kept = (dim < HEAD_DIM) & (is_key | is_value)
        rest = tl.load(row_ptr + dim, kept, other=0.0)
        tl.store(keys_ptr + cell + dim, rest, kept & is_key)
        tl.store(values_ptr + cell + dim, rest, kept & is_value)


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
        pairs = turned.unflatten(-1, (half, 2) if interleaved else (2, half))
        first, second = pairs.float().unbind(-1 if interleaved else -2)
        cos, sin = cos_sin[positions.long()][:, None].unbind(2)
        rotated = (first * cos - second * sin, second * cos + first * sin)
        turned.copy_(torch.stack(rotated, dim=-1 if interleaved else -2).flatten(-2))
    kept = slots >= 0
    block, offset = slots[kept].long() // block_size, slots[kept].long() % block_size
    keys[block, :, offset] = heads[kept, num_heads : num_heads + num_kv_heads].to(keys.dtype)
    values[block, :, offset] = heads[kept, num_heads + num_kv_heads :].to(values.dtype)
