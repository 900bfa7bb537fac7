"""Causal attention of a packed batch over the paged cache (its layout: see `rotary.py`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from runtime.kernels import native
from runtime.kernels.batch import DeviceBatch, PackedBatch


def query_tile(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> int:
    """How many new tokens of a sequence one CPU work item takes; the packed batch is cut accordingly."""
    lib = native.library()
    tile = 0 if lib is None else lib.attention_tile(num_heads // num_kv_heads, head_dim, block_size)
    return int(tile)


def attention(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PackedBatch,
    num_heads: int,
    scale: float,
) -> torch.Tensor:
    """qkv [T, (num_heads + 2 num_kv_heads) * head_dim], rotated -> [T, num_heads * head_dim].

    The new tokens' keys and values are in the cache already.
    """
    if isinstance(batch, DeviceBatch):
        return _attention_gpu(qkv, keys, values, batch, num_heads, scale)
    _, num_kv_heads, block_size, head_dim = values.shape
    native_tile = qkv.device.type == "cpu" and query_tile(num_heads, num_kv_heads, head_dim, block_size)
    lib = native.library()
    if not native_tile or lib is None:
        return attention_torch(qkv, keys, values, batch, num_heads, scale)
    out = torch.empty((qkv.shape[0], num_heads * head_dim))
    lib.attention(
        qkv.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), batch.block_tables.data_ptr(),
        batch.block_tables.shape[1], batch.query_start.data_ptr(), batch.seq_lens.data_ptr(),
        batch.work_items.data_ptr(), batch.work_items.shape[0],
        num_heads, num_kv_heads, head_dim, block_size, scale,
    )  # fmt: skip
    return out


def _attention_gpu(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: DeviceBatch,
    num_heads: int,
    scale: float,
) -> torch.Tensor:
    from runtime.kernels.gpu.attention_decode import paged_decode
    from runtime.kernels.gpu.attention_prefill import paged_prefill

    head_dim = values.shape[3]
    q = qkv.view(qkv.shape[0], -1, head_dim)[:, :num_heads]
    out = torch.empty((qkv.shape[0], num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    n = batch.num_decodes
    if n:
        paged_decode(
            q[:n], keys, values, batch.block_tables, batch.table_rows[:n], batch.seq_lens[:n], out[:n],
            scale=scale, num_splits=batch.decode_splits, workspace=batch.workspace,
        )  # fmt: skip
    if n < q.shape[0]:
        paged_prefill(
            q, keys, values, batch.block_tables, batch.query_start, batch.seq_lens[n:], batch.work_items, out,
            scale=scale, table_rows=batch.table_rows[n:], num_splits=batch.prefill_splits,
            workspace=batch.workspace,
        )  # fmt: skip
    return out.view(qkv.shape[0], -1)


def attention_torch(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PackedBatch,
    num_heads: int,
    scale: float,
) -> torch.Tensor:
    """The plain twin of `attention`: gathers each sequence's blocks and attends densely."""
    _, num_kv_heads, block_size, head_dim = values.shape
    queries = qkv.view(qkv.shape[0], -1, head_dim)[:, :num_heads]
    out = torch.empty_like(queries)
    starts = batch.query_start.tolist()
    for row, length in enumerate(batch.seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        blocks = batch.block_tables[row, : -(-length // block_size)].long()
        k = keys[blocks].permute(1, 0, 3, 2).reshape(num_kv_heads, -1, head_dim)[:, :length]
        v = values[blocks].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :length]
        q = queries[begin:end].transpose(0, 1)
        last_visible = torch.arange(length - (end - begin), length, device=qkv.device)
        mask = torch.arange(length, device=qkv.device)[None] <= last_visible[:, None]
        attended = F.scaled_dot_product_attention(
            q[None], k[None].to(q.dtype), v[None].to(q.dtype), attn_mask=mask, scale=scale, enable_gqa=True
        )
        out[begin:end] = attended[0].transpose(0, 1)
    return out.reshape(qkv.shape[0], num_heads * head_dim)
