"""Random paged batches for the attention kernels, and what attention is by `torch`'s own operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# What no kernel may touch: table entries behind a sequence's last block point far outside the cache.
NOWHERE = 1 << 28


@dataclass(frozen=True)
class Shape:
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    device: str = "cpu"


@dataclass
class Paged:
    """Some sequences, contiguous and paged. `counts` of each one's last tokens are new (queries).

    The queries are a view into a packed qkv, as the engine has them. Cells of the cache that hold no
    token are NaN, and so is `out` until it is written.
    """

    shape: Shape
    counts: list[int]
    seq_lens: list[int]
    contiguous: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    q: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    block_tables: torch.Tensor
    table_rows: torch.Tensor | None
    out: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, counts: list[int], seq_lens: list[int], seed: int = 0) -> Paged:
        generator = torch.Generator(shape.device).manual_seed(seed)
        block, dim, kv_heads = shape.block_size, shape.head_dim, shape.num_kv_heads
        new = {"device": shape.device, "dtype": shape.dtype}
        needed = [math.ceil(length / block) for length in seq_lens]
        num_slots, max_blocks = len(counts) + 2, max(needed) + 1
        order = torch.randperm(sum(needed) + 3, generator=generator, device=shape.device)
        slots = torch.randperm(num_slots, generator=generator, device=shape.device)[: len(counts)]
        keys = torch.full((len(order), kv_heads, block, dim), math.nan, **new)
        values = torch.full_like(keys, math.nan)
        tables = torch.full((num_slots, max_blocks), NOWHERE, dtype=torch.int32, device=shape.device)
        qkv = torch.randn(sum(counts), (shape.num_heads + 2 * kv_heads) * dim, generator=generator, **new)
        q = qkv.view(len(qkv), -1, dim)[:, : shape.num_heads]
        contiguous, first_block, first_row = [], 0, 0
        for slot, count, length, blocks in zip(slots.tolist(), counts, seq_lens, needed, strict=True):
            mine = order[first_block : first_block + blocks]
            k, v = torch.randn(2, length, kv_heads, dim, generator=generator, **new)
            for cache, tokens in ((keys, k), (values, v)):
                padded = torch.full((blocks * block, kv_heads, dim), math.nan, **new)
                padded[:length] = tokens
                cache[mine] = padded.view(blocks, block, kv_heads, dim).transpose(1, 2)
            tables[slot, :blocks] = mine.int()
            contiguous.append((q[first_row : first_row + count], k, v))
            first_block, first_row = first_block + blocks, first_row + count
        out = torch.full((len(qkv), shape.num_heads, dim), math.nan, **new)
        return cls(shape, counts, seq_lens, contiguous, q, keys, values, tables, slots.int(), out)

    @property
    def query_start(self) -> torch.Tensor:
        return self.ints([0, *torch.tensor(self.counts).cumsum(0).tolist()])

    def ints(self, numbers: Any) -> torch.Tensor:
        return torch.as_tensor(numbers, dtype=torch.int32, device=self.shape.device)

    def expected(self, **features: Any) -> torch.Tensor:
        """[T, num_heads, head_dim] float32, one sequence after another; zeros for an empty one."""
        query_scale = features.pop("query_scale", None)
        parts, row = [], 0
        for q, k, v in self.contiguous:
            scale = None if query_scale is None else query_scale[row : row + len(q)]
            row += len(q)
            parts.append(
                reference(q, k, v, query_scale=scale, **features) if len(k) else torch.zeros_like(q).float()
            )
        return torch.cat(parts)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    query_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last tokens' queries [n, num_heads, head_dim] over k, v [length, num_kv_heads,
    head_dim], in float32 by `scaled_dot_product_attention`, which knows all of this but the soft cap."""
    count, length = len(q), len(k)
    q, k, v = (x.float().transpose(0, 1) for x in (q, k, v))
    if query_scale is not None:
        q = q * query_scale[None, :, None]
    i = torch.arange(length - count, length, device=q.device)[:, None]
    j = torch.arange(length, device=q.device)[None]
    hidden = (j > i) | (j <= i - window) if window else j > i
    bias = torch.zeros(len(q), count, length, device=q.device)
    if alibi_slopes is not None:
        bias += alibi_slopes[:, None, None] * (j - i)
    bias.masked_fill_(hidden, -math.inf)
    if softcap:
        group = len(q) // len(k)
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        capped = torch.tanh(torch.einsum("hid,hjd->hij", q, k) * (scale / softcap)) * softcap
        return torch.einsum("hij,hjd->ihd", (capped + bias).softmax(-1), v)
    with sdpa_kernel(SDPBackend.MATH):  # others may compute with TF32
        attended = F.scaled_dot_product_attention(
            q[None], k[None], v[None], attn_mask=bias[None], scale=scale, enable_gqa=True
        )
    return attended[0].transpose(0, 1)


def feature_cases(num_heads: int, num_queries: int, device: str) -> dict[str, dict[str, Any]]:
    """What models ask for beyond plain attention, with every head and every query different."""
    slopes = torch.exp2(-torch.arange(1, num_heads + 1, device=device) * (8 / num_heads))
    query_scale = torch.linspace(1.0, 2.0, num_queries, device=device)
    return {
        "plain": {},
        "soft cap": {"softcap": 3.0},
        "window smaller than a tile": {"window": 5},
        "window over several tiles": {"window": 100},
        "soft cap and window": {"softcap": 3.0, "window": 33},
        "ALiBi": {"alibi_slopes": slopes},
        "query scale": {"query_scale": query_scale},
        "query scale and soft cap": {"query_scale": query_scale, "softcap": 3.0},
        "query scale and ALiBi": {"query_scale": query_scale, "alibi_slopes": slopes},
    }


FEATURES = list(feature_cases(1, 1, "cpu"))
