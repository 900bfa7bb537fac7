"""Token embedding: rows of a table, in the dtype that is computed in."""

from __future__ import annotations

import torch

from runtime.kernels import native
from runtime.kernels.linear import NATIVE_TYPES


def embedding(
    token_ids: torch.Tensor,
    table: torch.Tensor,
    dtype: torch.dtype,
    multiplier: float,
    first_id: int | None = None,
) -> torch.Tensor:
    """token_ids [T], table [vocab_size, hidden_size] -> rows of it times multiplier, in dtype.

    With `first_id`, the table is a part of the whole that begins with that id, and ids outside give zeros.
    """
    if table.device.type == "cuda":
        from runtime.kernels.gpu.embedding import embedding as on_gpu

        out = table.new_empty((token_ids.shape[0], table.shape[1]), dtype=dtype)
        return on_gpu(token_ids, table, out, first_id or 0, multiplier)
    if first_id is not None:
        token_ids = token_ids - first_id
        outside = (token_ids < 0) | (token_ids >= table.shape[0])
        held = embedding(token_ids.masked_fill(outside, 0), table, dtype, multiplier)
        return held.masked_fill_(outside[:, None], 0.0)
    lib = native.library()
    if lib is None or dtype != torch.float32 or table.dtype not in NATIVE_TYPES or table.stride(1) != 1:
        return embedding_torch(token_ids, table, dtype, multiplier)
    out = torch.empty((token_ids.shape[0], table.shape[1]))
    lib.embedding(
        token_ids.data_ptr(), token_ids.shape[0], table.data_ptr(), table.stride(0),
        NATIVE_TYPES[table.dtype], table.shape[1], multiplier, out.data_ptr(),
    )  # fmt: skip
    return out


def embedding_torch(
    token_ids: torch.Tensor, table: torch.Tensor, dtype: torch.dtype, multiplier: float
) -> torch.Tensor:
    """The plain twin of `embedding`."""
    rows = table.index_select(0, token_ids).to(dtype)
    return rows if multiplier == 1.0 else rows * multiplier
