"""What the decoder is made of. Each layer holds views of the loaded weights and calls one kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from runtime.kernels.activation import softcap
from runtime.kernels.attention import AttentionForm, attention
from runtime.kernels.batch import PackedBatch
from runtime.kernels.embedding import embedding
from runtime.kernels.linear import (
    LinearWeights,
    Product,
    gelu_tanh_linear,
    linear,
    logits_of,
    silu_linear,
)
from runtime.kernels.norm import add_rms_norm, head_rms_norm
from runtime.kernels.packed import PackedMatrix
from runtime.kernels.packed_linear import PackedLinear
from runtime.kernels.rotary import rotary_store
from runtime.model.config import Activation, ModelConfig

if TYPE_CHECKING:
    from runtime.parallel.group import Group

Tensors = Mapping[str, tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Weights:
    """A model's parameters by name: the parts of each, and the projections that are quantised."""

    tensors: Tensors
    packed: Mapping[str, PackedMatrix] = field(default_factory=dict)

    def __getitem__(self, name: str) -> tuple[torch.Tensor, ...]:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(self, name: str, default: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The parts of a parameter that need not be there."""
        return self.tensors.get(name, default)


class LayerCache:
    """The paged keys and values of one layer; their layout is the kernels' business (`kernels/rotary.py`)."""

    __slots__ = ("keys", "values")

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys = keys
        self.values = values


def linear_weights(weights: Weights, name: str, with_bias: bool = True) -> LinearWeights | PackedLinear:
    """The (possibly fused) projection `name` with its bias, if the checkpoint has one and it is wanted."""
    biases = weights.get(f"{name}_bias", ()) if with_bias else ()
    if name in weights.packed:
        return PackedLinear(weights.packed[name], torch.cat(biases) if biases else None)
    # The CPU's kernels add biases in float32; a GPU's library wants them as the weights are.
    return LinearWeights(
        weights[name], [bias.float() if bias.device.type == "cpu" else bias for bias in biases]
    )


def adds_bias(group: Group | None) -> bool:
    """Whether this rank adds the biases of sums that all ranks have a part in: one of them does."""
    return group is None or group.rank == 0


class Embedding:
    """Token ids to rows of the embedding table, in the dtype that the decoder computes in.

    In a group each rank has its share of the table's `vocab_size` rows.
    """

    def __init__(
        self, config: ModelConfig, table: torch.Tensor, dtype: torch.dtype, group: Group | None
    ) -> None:
        self.table = table
        self.group = group
        self.dtype = dtype
        # Rounded as the reference rounds it: in bfloat16, Gemma's 67.88 is 68.
        self.multiplier = torch.tensor(config.embedding_multiplier, dtype=dtype).item()
        self.first_id: int | None = None
        if group is not None:
            self.first_id = group.rank * -(-config.vocab_size // group.world_size)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden_size]"""
        rows = embedding(token_ids, self.table, self.dtype, self.multiplier, self.first_id)
        return rows if self.group is None else self.group.all_reduce(rows)


class RMSNorm:
    """Residual addition and RMSNorm in one pass. With a group, x is a rank's part of what is added.

    `before` is the projection that the result goes to. `after` is what stands between x and the addition.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        name: str,
        group: Group | None = None,
        before: LinearWeights | PackedLinear | None = None,
        after: OutputNorm | None = None,
    ) -> None:
        self.weight = norm_weight(config, weights, name)
        self.eps = config.rms_norm_eps
        self.group = group
        self.upcoming = None if before is None else before.read_first
        self.x_weight = None if after is None else after.weight

    def __call__(self, x: torch.Tensor | Product | None, residual: torch.Tensor) -> torch.Tensor:
        """residual += x in place; returns the normed residual. All [T, hidden_size]."""
        if isinstance(x, Product):
            assert self.group is not None
            return self.group.add_rms_norm(x, residual, self.weight, self.eps, self.upcoming)
        return add_rms_norm(x, residual, self.weight, self.eps, self.x_weight)


class OutputNorm:
    """RMSNorm of what attention or MLP adds to the residual, for checkpoints that have one there.

    The `RMSNorm` that comes next computes it, in the same pass. In a group it is a norm of the ranks' sum;
    where there is none, x stays what it is: a rank's part of a sum, not computed yet.
    """

    def __init__(self, config: ModelConfig, weights: Weights, name: str, group: Group | None) -> None:
        self.weight = norm_weight(config, weights, name) if name in weights else None
        self.group = group

    def __call__(self, x: Product) -> torch.Tensor | Product:
        """What is to be normed and added, [T, hidden_size]."""
        if self.group is None:
            return x.compute()
        return x if self.weight is None else self.group.all_reduce(x.compute())


def norm_weight(config: ModelConfig, weights: Weights, name: str) -> torch.Tensor:
    """What a norm multiplies by, in float32."""
    weight = weights[name][0].float()
    return weight + config.norm_offset if config.norm_offset else weight


class Attention:
    """Self-attention over the paged cache. `cos_sin` is None where positions do not rotate.

    In a group, ranks have some of the heads each; one of them, which `adds_bias`, adds the output's bias.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        prefix: str,
        form: AttentionForm,
        cos_sin: torch.Tensor | None,
        interleaved: bool,
        adds_bias: bool,
    ) -> None:
        self.qkv = linear_weights(weights, f"{prefix}qkv")
        self.output = linear_weights(weights, f"{prefix}o", adds_bias)
        self.form = form
        self.cos_sin = cos_sin
        self.interleaved = interleaved
        self.eps = config.rms_norm_eps
        self.head_norms: tuple[torch.Tensor, torch.Tensor] | None = None
        if f"{prefix}q_norm" in weights:
            q_norm, k_norm = (norm_weight(config, weights, f"{prefix}{which}_norm") for which in "qk")
            self.head_norms = q_norm, k_norm

    def __call__(
        self,
        x: torch.Tensor,
        batch: PackedBatch,
        query_scale: torch.Tensor | None,
        cache: LayerCache,
        between: Callable[[], None] | None = None,
    ) -> Product:
        """[T, hidden_size] -> [T, hidden_size], in a group this rank's part of the sum.

        The new keys and values go into the cache. `between` is called after the first product.
        """
        qkv = linear(x, self.qkv)
        if between is not None:
            between()
        if self.head_norms is not None:
            head_rms_norm(qkv, *self.head_norms, self.eps, self.form.num_heads)
        rotary_store(
            qkv, self.cos_sin, batch.positions, batch.slots, cache.keys, cache.values,
            self.form.num_heads, self.interleaved,
        )  # fmt: skip
        attended = attention(qkv, cache.keys, cache.values, batch, self.form, query_scale)
        return Product(attended, self.output)


class MLP:
    """The gated MLP: down(activation(gate(x)) * up(x)); `adds_bias` as for `Attention`."""

    def __init__(self, weights: Weights, prefix: str, activation: Activation, adds_bias: bool) -> None:
        self.gate_up = linear_weights(weights, f"{prefix}gate_up")
        self.down = linear_weights(weights, f"{prefix}down", adds_bias)
        self.activation = activation

    def __call__(self, x: torch.Tensor, between: Callable[[], None] | None = None) -> Product:
        """[T, hidden_size] -> [T, hidden_size], in a group this rank's part of the sum.

        `between` is called after the first product.
        """
        multiply = silu_linear if self.activation == "silu" else gelu_tanh_linear
        gated = multiply(x, self.gate_up)
        if between is not None:
            between()
        return Product(gated, self.down)


class Head:
    """The last hidden state to logits, in float32; in a group each rank computes its share of them."""

    def __init__(self, config: ModelConfig, weights: Weights, group: Group | None) -> None:
        self.vocab_size = config.vocab_size
        self.group = group
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
            logits = softcap(logits, self.softcap)
        return logits if self.group is None else self._gathered(logits, self.group)

    def _gathered(self, logits: torch.Tensor, group: Group) -> torch.Tensor:
        """All ranks' logits; the last ranks' shares may be shorter, and what fills them up is cut off."""
        missing = -(-self.vocab_size // group.world_size) - logits.shape[1]
        everyone = group.all_gather(F.pad(logits, (0, missing)) if missing else logits)
        return everyone[:, : self.vocab_size]
