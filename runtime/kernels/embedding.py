"""Token embedding: rows of a table, in the dtype that is computed in."""

from __future__ import annotations

import torch

from runtime.kernels import native
from runtime.kernels.linear import NATIVE_TYPES


def embedding(
    token_ids: torch.Tensor, table: torch.Tensor, dtype: torch.dtype, multiplier: float
) -> torch.Tensor:
    """token_ids [T], table [vocab_size, hidden_size] -> rows of it times multiplier, in dtype."""
    if table.device.type == "cuda":
        from runtime.kernels.gpu.embedding import embedding as on_gpu

        out = table.new_empty((token_ids.shape[0], table.shape[1]), dtype=dtype)
        return on_gpu(token_ids, table, out, scale=multiplier)
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
