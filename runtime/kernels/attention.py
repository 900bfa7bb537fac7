"""Causal attention of a packed batch over the paged cache (its layout: see `rotary.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.kernels import native
from runtime.kernels.batch import DeviceBatch, PackedBatch

# The plain twin holds the scores of this many new tokens at once.
_TORCH_TILE = 256


@dataclass(frozen=True, slots=True)
class AttentionForm:
    """How one layer attends.

    scale         what the products of queries and keys are multiplied by
    softcap       c in c * tanh(score / c), after scaling; 0 for none
    window        how many tokens back a token sees, itself included; 0 for all
    alibi_slopes  [num_heads] float32: slope * (key position - query position) is added to the scores
                  (Press et al., 2021); None for none
    """

    num_heads: int
    scale: float
    softcap: float = 0.0
    window: int = 0
    alibi_slopes: torch.Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether it is scaled dot products and nothing else."""
        return not self.softcap and not self.window and self.alibi_slopes is None


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
    form: AttentionForm,
    query_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """qkv [T, (num_heads + 2 num_kv_heads) * head_dim], rotated -> [T, num_heads * head_dim].

    The new tokens' keys and values are in the cache already. `query_scale` [T] float32 are further factors
    of the queries, one a token; qkv may be overwritten with what they make of it.
    """
    if isinstance(batch, DeviceBatch):
        return _attention_gpu(qkv, keys, values, batch, form, query_scale)
    _, num_kv_heads, block_size, head_dim = values.shape
    num_heads = form.num_heads
    if query_scale is not None:
        qkv[:, : num_heads * head_dim] *= query_scale[:, None]
    native_tile = qkv.device.type == "cpu" and query_tile(num_heads, num_kv_heads, head_dim, block_size)
    lib = native.library()
    if not native_tile or lib is None or not form.plain:
        return attention_torch(qkv, keys, values, batch, form)
    out = torch.empty((qkv.shape[0], num_heads * head_dim))
    lib.attention(
        qkv.data_ptr(), keys.data_ptr(), values.data_ptr(), out.data_ptr(), batch.block_tables.data_ptr(),
        batch.block_tables.shape[1], batch.query_start.data_ptr(), batch.seq_lens.data_ptr(),
        batch.work_items.data_ptr(), batch.work_items.shape[0],
        num_heads, num_kv_heads, head_dim, block_size, form.scale,
    )  # fmt: skip
    return out


def _attention_gpu(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: DeviceBatch,
    form: AttentionForm,
    query_scale: torch.Tensor | None,
) -> torch.Tensor:
    from runtime.kernels.gpu.attention_decode import paged_decode
    from runtime.kernels.gpu.attention_prefill import paged_prefill

    head_dim = values.shape[3]
    q = qkv.view(qkv.shape[0], -1, head_dim)[:, : form.num_heads]
    out = torch.empty((qkv.shape[0], form.num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    n = batch.num_decodes
    if n:
        paged_decode(
            q[:n], keys, values, batch.block_tables, batch.table_rows[:n], batch.seq_lens[:n], out[:n],
            scale=form.scale, softcap=form.softcap, window=form.window, alibi_slopes=form.alibi_slopes,
            query_scale=query_scale, num_splits=batch.decode_splits, workspace=batch.workspace,
        )  # fmt: skip
    if n < q.shape[0]:
        paged_prefill(
            q, keys, values, batch.block_tables, batch.query_start, batch.seq_lens[n:], batch.work_items, out,
            scale=form.scale, softcap=form.softcap, window=form.window, alibi_slopes=form.alibi_slopes,
            query_scale=query_scale, table_rows=batch.table_rows[n:], num_splits=batch.prefill_splits,
            workspace=batch.workspace,
        )  # fmt: skip
    return out.view(qkv.shape[0], -1)


def attention_torch(
    qkv: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: PackedBatch, form: AttentionForm
) -> torch.Tensor:
    """The plain twin of `attention`: gathers each sequence's blocks and attends densely."""
    _, num_kv_heads, block_size, head_dim = values.shape
    queries = qkv.view(qkv.shape[0], -1, head_dim)[:, : form.num_heads]
    out = torch.empty_like(queries)
    starts = batch.query_start.tolist()
    for row, length in enumerate(batch.seq_lens.tolist()):
        begin, end = starts[row], starts[row + 1]
        blocks = batch.block_tables[row, : -(-length // block_size)].long()
        k = keys[blocks].permute(1, 2, 0, 3).reshape(num_kv_heads, head_dim, -1)[..., :length]
        v = values[blocks].transpose(0, 1).reshape(num_kv_heads, -1, head_dim)[:, :length]
        for first in range(begin, end, _TORCH_TILE):
            last = min(first + _TORCH_TILE, end)
            positions = torch.arange(length - (end - first), length - (end - last), device=qkv.device)
            out[first:last] = attend_densely(
                queries[first:last], k.to(qkv.dtype), v.to(qkv.dtype), positions, form
            )
    return out.reshape(qkv.shape[0], form.num_heads * head_dim)


def attend_densely(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor, form: AttentionForm
) -> torch.Tensor:
    """Causal attention of n tokens of one sequence, in plain torch: [n, num_heads, value_dim].

    q [n, num_heads, head_dim] at `positions` [n], k [num_kv_heads, head_dim, length] and
    v [num_kv_heads, length, value_dim].
    """
    count, num_heads, head_dim = q.shape
    num_kv_heads, _, length = k.shape
    grouped = q.transpose(0, 1).reshape(num_kv_heads, -1, head_dim)
    scores = (grouped @ k).float().view(num_heads, count, length) * form.scale
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    distance = torch.arange(length, device=q.device)[None] - positions[:, None]
    if form.alibi_slopes is not None:
        scores += form.alibi_slopes[:, None, None] * distance
    hidden = distance > 0
    if form.window:
        hidden |= distance <= -form.window
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1).to(q.dtype)
    attended = weights.view(num_kv_heads, -1, length) @ v
    return attended.view(num_heads, count, -1).transpose(0, 1)
