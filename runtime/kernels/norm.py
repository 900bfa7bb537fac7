"""RMSNorm: of the residual stream, fused with the addition before it; and of queries and keys, by heads."""

from __future__ import annotations

import torch

from runtime.kernels import native


def add_rms_norm(
    x: torch.Tensor | None,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    x_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual += x in place (unless x is None); returns residual / rms(residual) * weight.

    x and residual are [m, hidden_size], weight is [hidden_size] in float32. With `x_weight`, [hidden_size]
    in float32, what is added is x / rms(x) * x_weight.
    """
    if residual.device.type == "cuda":
        from runtime.kernels.gpu import norm

        return norm.add_rms_norm(x, residual, weight, eps, torch.empty_like(residual), x_weight=x_weight)
    if x is not None and x_weight is not None:
        x = add_rms_norm(None, x, x_weight, eps)
    lib = native.library() if residual.device.type == "cpu" else None
    if lib is None:
        return add_rms_norm_torch(x, residual, weight, eps)
    out = torch.empty_like(residual)
    m, n = residual.shape
    lib.add_rms_norm(
        None if x is None else x.data_ptr(), residual.data_ptr(), weight.data_ptr(), eps, m, n, out.data_ptr()
    )
    return out


def add_rms_norm_torch(
    x: torch.Tensor | None, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The plain twin of `add_rms_norm`: statistics in float32, as the Llama family computes them."""
    if x is not None:
        residual += x
    wide = residual.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed.to(residual.dtype) * weight.to(residual.dtype)).contiguous()


def head_rms_norm(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, num_heads: int
) -> None:
    """Norm each head's query and key in qkv in place.

    qkv is [T, (num_heads + 2 num_kv_heads) * head_dim], contiguous: all queries, all keys, all values. The
    weights are [head_dim] in float32.
    """
    if qkv.device.type == "cuda":
        from runtime.kernels.gpu import norm

        norm.head_rms_norm(qkv, q_weight, k_weight, eps, num_heads)
    else:
        head_rms_norm_torch(qkv, q_weight, k_weight, eps, num_heads)


def head_rms_norm_torch(
    qkv: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, num_heads: int
) -> None:
    """The plain twin of `head_rms_norm`."""
    heads = qkv.view(qkv.shape[0], -1, q_weight.shape[0])
    num_normed = (heads.shape[1] + num_heads) // 2
    for part, weight in ((heads[:, :num_heads], q_weight), (heads[:, num_heads:num_normed], k_weight)):
        wide = part.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        part.copy_(wide * scale * weight.float())
