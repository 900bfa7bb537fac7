"""What the decoder is made of. Each layer holds views of the loaded weights and calls one kernel."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from runtime.kernels.activation import gelu_tanh_mul
from runtime.kernels.attention import AttentionForm, attention
from runtime.kernels.batch import PackedBatch
from runtime.kernels.embedding import embedding
from runtime.kernels.linear import LinearWeights, linear, logits_of, silu_linear
from runtime.kernels.norm import add_rms_norm, head_rms_norm
from runtime.kernels.rotary import rotary_store
from runtime.model.config import Activation, ModelConfig

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

    def __init__(self, table: torch.Tensor, dtype: torch.dtype, multiplier: float) -> None:
        self.table = table
        self.dtype = dtype
        # Rounded as the reference rounds it: in bfloat16, Gemma's 67.88 is 68.
        self.multiplier = torch.tensor(multiplier, dtype=dtype).item()

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden_size]"""
        return embedding(token_ids, self.table, self.dtype, self.multiplier)


class RMSNorm:
    """Residual addition and RMSNorm in one pass."""

    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        self.weight = norm_weight(config, weights, name)
        self.eps = config.rms_norm_eps

    def __call__(self, x: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """residual += x in place; returns the normed residual. All [T, hidden_size]."""
        return add_rms_norm(x, residual, self.weight, self.eps)


class OutputNorm:
    """RMSNorm of what attention or MLP adds to the residual, for checkpoints that have one there."""

    def __init__(self, config: ModelConfig, weights: Weights, name: str) -> None:
        self.norm = RMSNorm(config, weights, name) if name in weights else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]"""
        return x if self.norm is None else self.norm(None, x)


def norm_weight(config: ModelConfig, weights: Weights, name: str) -> torch.Tensor:
    """What a norm multiplies by, in float32."""
    weight = weights[name][0].float()
    return weight + config.norm_offset if config.norm_offset else weight


class Attention:
    """Self-attention over the paged cache. `cos_sin` is None where positions do not rotate."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        prefix: str,
        form: AttentionForm,
        cos_sin: torch.Tensor | None,
        interleaved: bool,
    ) -> None:
        self.qkv = linear_weights(weights, f"{prefix}qkv")
        self.output = linear_weights(weights, f"{prefix}o")
        self.form = form
        self.cos_sin = cos_sin
        self.interleaved = interleaved
        self.eps = config.rms_norm_eps
        self.head_norms: tuple[torch.Tensor, torch.Tensor] | None = None
        if f"{prefix}q_norm" in weights:
            q_norm, k_norm = (norm_weight(config, weights, f"{prefix}{which}_norm") for which in "qk")
            self.head_norms = q_norm, k_norm

    def __call__(
        self, x: torch.Tensor, batch: PackedBatch, query_scale: torch.Tensor | None, cache: LayerCache
    ) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]; the new keys and values go into the cache."""
        qkv = linear(x, self.qkv)
        if self.head_norms is not None:
            head_rms_norm(qkv, *self.head_norms, self.eps, self.form.num_heads)
        rotary_store(
            qkv, self.cos_sin, batch.positions, batch.slots, cache.keys, cache.values,
            self.form.num_heads, self.interleaved,
        )  # fmt: skip
        attended = attention(qkv, cache.keys, cache.values, batch, self.form, query_scale)
        return linear(attended, self.output)


class MLP:
    """The gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(self, weights: Weights, prefix: str, activation: Activation) -> None:
        self.gate_up = linear_weights(weights, f"{prefix}gate_up")
        self.down = linear_weights(weights, f"{prefix}down")
        self.activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size]"""
        if self.activation == "silu":
            gated = silu_linear(x, self.gate_up)
        else:
            gated = gelu_tanh_mul(linear(x, self.gate_up))
        return linear(gated, self.down)


class Head:
    """The last hidden state to logits, in float32."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.weights = LinearWeights(weights["embedding" if config.tie_word_embeddings else "head"])
        self.softcap = config.logits_softcap
        self.row_norms: torch.Tensor | None = None
        if config.normalized_head:
            norms = [torch.linalg.vector_norm(w, dim=1, dtype=torch.float32) for w in self.weights.weights]
            self.row_norms = torch.cat(norms).clamp(min=1e-12)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[R, hidden_size] -> [R, vocab_size]"""
        logits = logits_of(x, self.weights)
        if self.row_norms is not None:
            logits /= self.row_norms
        if self.softcap:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits
