"""What the decoder is made of. Each layer holds views of the loaded weights and calls one kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from runtime.kernels.activation import silu_mul
from runtime.kernels.attention import attention
from runtime.kernels.batch import PackedBatch
from runtime.kernels.linear import LinearWeights, linear
from runtime.kernels.norm import add_rms_norm
from runtime.kernels.rotary import rotary_store
from runtime.model.config import ModelConfig

Weights = Mapping[str, tuple[torch.Tensor, ...]]


class LayerCache:
    """The paged keys and values of one layer; their layout is the kernels' business (`kernels/rotary.py`)."""

    __slots__ = ("keys", "values")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values


def linear_weights(weights: Weights, name: str) -> LinearWeights:
    """The (possibly fused) projection `name` with its bias, if the checkpoint has one."""
    biases = weights.get(f"{name}_bias", ())
    # The CPU's kernels add biases in float32; a GPU's library wants them as the weights are.
    return LinearWeights(
        weights[name], [bias.float() if bias.device.type == "cpu" else bias for bias in biases]
    )


class Embedding:
    """Token ids to rows of the embedding table, in the dtype that the decoder computes in."""

    def __init__(self, table: torch.Tensor, dtype: torch.dtype) -> None:
        self.table = table
        self.dtype = dtype

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden_size]"""
        if self.table.device.type == "cuda":
            from runtime.kernels.gpu.embedding import embedding

            out = self.table.new_empty((token_ids.shape[0], self.table.shape[1]), dtype=self.dtype)
            return embedding(token_ids, self.table, out)
        return self.table.index_select(0, token_ids).to(self.dtype)


class RMSNorm:
    """Residual addition and RMSNorm in one pass."""

    def __init__(self, weights: Weights, name: str, eps: float) -> None:
        self.weight = weights[name][0].float()
        self.eps = eps

    def __call__(self, x: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """residual += x in place; returns the normed residual. All [T, hidden_size]."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class Attention:
    """Self-attention over the paged cache."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, cos_sin: torch.Tensor) -> None:
        self.qkv = linear_weights(weights, f"{prefix}qkv")
        self.output = linear_weights(weights, f"{prefix}o")
        self.cos_sin = cos_sin
        self.num_heads = self.output.in_features // config.head_dim
        self.scale = config.head_dim**-0.5

    def __call__(self, x: torch.Tensor, batch: PackedBatch, cache: LayerCache) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]; the new keys and values go into the cache."""
        qkv = linear(x, self.qkv)
        rotary_store(
            qkv, self.cos_sin, batch.positions, batch.slots, cache.keys, cache.values, self.num_heads
        )
        return linear(
            attention(qkv, cache.keys, cache.values, batch, self.num_heads, self.scale), self.output
        )


class MLP:
    """The gated MLP: down(silu(gate(x)) * up(x))."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        self.gate_up = linear_weights(weights, f"{prefix}gate_up")
        self.down = linear_weights(weights, f"{prefix}down")

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]"""
        return linear(silu_mul(linear(x, self.gate_up)), self.down)
