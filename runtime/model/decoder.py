"""The one decoder-only transformer, written once, for packed batches over a paged cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from runtime.kernels.attention import AttentionForm
from runtime.kernels.batch import PackedBatch
from runtime.kernels.linear import Product
from runtime.model.config import ModelConfig, RopeConfig
from runtime.model.layers import (
    MLP,
    Attention,
    Embedding,
    Head,
    LayerCache,
    OutputNorm,
    RMSNorm,
    Weights,
    adds_bias,
)
from runtime.model.overlap import Halves
from runtime.model.rope import alibi_slopes, cos_sin_table, log_n_table

if TYPE_CHECKING:
    from runtime.parallel.group import Group


class CausalLM(Protocol):
    """What the engine runs: `Decoder`, or a model of another kind with the same interface.

    `capturable` says whether a decode step may be captured in a CUDA graph; `halves` is how long steps are
    computed, None if like all others. `before` is called with the name of the weights that are used next, as
    they may be on their way still: `embedding`, `layers.0` and so on, and any other name for all of them.
    """

    before: Callable[[str], None]

    @property
    def config(self) -> ModelConfig: ...
    @property
    def capturable(self) -> bool: ...
    @property
    def halves(self) -> Halves | None: ...
    @property
    def num_position_tables(self) -> int: ...

    def position_base(self, num_prompt: int) -> int:
        """See `Decoder.position_base`."""
        ...

    def forward(self, batch: PackedBatch, cache: Sequence[LayerCache]) -> torch.Tensor:
        """See `Decoder.forward`."""
        ...


class DecoderLayer:
    """Attention and MLP, each behind a norm and added to the residual stream.

    `after` is the norm of what the layer before adds to it, if there is one.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        prefix: str,
        attention: Attention,
        group: Group | None,
        after: OutputNorm | None,
    ) -> None:
        # Without norms of their own, the ranks' parts are added up by the norm that comes next.
        adds_up = None if f"{prefix}attention_output_norm" in weights else group
        self.attention = attention
        self.mlp = MLP(weights, prefix, config.activation, adds_bias(group))
        self.attention_norm = RMSNorm(
            config, weights, f"{prefix}attention_norm", adds_up, attention.qkv, after
        )
        self.attention_output_norm = OutputNorm(config, weights, f"{prefix}attention_output_norm", group)
        self.mlp_norm = RMSNorm(
            config, weights, f"{prefix}mlp_norm", adds_up, self.mlp.gate_up, self.attention_output_norm
        )
        self.mlp_output_norm = OutputNorm(config, weights, f"{prefix}mlp_output_norm", group)

    def attend(
        self,
        x: torch.Tensor | Product | None,
        residual: torch.Tensor,
        batch: PackedBatch,
        query_scale: torch.Tensor | None,
        cache: LayerCache,
    ) -> torch.Tensor | Product:
        """The first half: residual += x, then the attention's contribution, [T, hidden_size]."""
        normed = self.attention_norm(x, residual)
        return self.attention_output_norm(self.attention(normed, batch, query_scale, cache))

    def transform(self, x: torch.Tensor | Product, residual: torch.Tensor) -> torch.Tensor | Product:
        """The second half: residual += x, then the MLP's contribution, [T, hidden_size]."""
        return self.mlp_output_norm(self.mlp(self.mlp_norm(x, residual)))


class Decoder:
    """A model with its weights. `dtype` is what activations are computed in.

    In a group, `weights` are this rank's share, and what `config` counts is the whole model.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        max_model_len: int,
        dtype: torch.dtype,
        group: Group | None = None,
    ) -> None:
        self.config = config if group is None else config.of_rank(group.world_size)
        self.before: Callable[[str], None] = lambda name: None
        self.max_model_len = max_model_len
        self.embedding = Embedding(config, weights["embedding"][0], dtype, group)
        # A CPU's tapes hold no exchange with other ranks.
        self.capturable = group is None or self.embedding.table.is_cuda
        self.layers = _layers(config, weights, max_model_len, self.embedding.table.device, group)
        # Where norms add up the ranks' parts, they are what the residual stream comes from.
        self.group = self.layers[-1].mlp_norm.group
        self.head = Head(config, weights, group)
        self.norm = RMSNorm(
            config, weights, "norm", self.group, self.head.weights, self.layers[-1].mlp_output_norm
        )
        sums = None if self.group is None else self.group.halves
        self.halves = None if sums is None else Halves(self, sums)
        self.log_n: torch.Tensor | None = None
        if config.log_n_length is not None and config.log_n_length < max_model_len:
            table = log_n_table(config.log_n_length, max_model_len).repeat(self.num_position_tables)
            self.log_n = table.to(self.embedding.table.device)

    @property
    def num_position_tables(self) -> int:
        """How many tables of positions there are, one after the other; requests differ in which is theirs."""
        rope = self.config.rope
        return 1 if rope is None else rope.doublings(self.max_model_len) + 1

    def position_base(self, num_prompt: int) -> int:
        """What is added to the positions of a request, all its life, if its prompt has `num_prompt` tokens.

        Keys and values of the same tokens with another base are other keys and values.
        """
        rope = self.config.rope
        return 0 if rope is None else rope.doublings(num_prompt) * self.max_model_len

    def query_scale(self, batch: PackedBatch) -> torch.Tensor | None:
        """What queries are multiplied by, [T]; None for nothing."""
        return None if self.log_n is None else self.log_n[batch.positions]

    def forward(self, batch: PackedBatch, cache: Sequence[LayerCache]) -> torch.Tensor:
        """The logits after `batch.logits_rows`, [R, vocab_size] float32."""
        self.before("embedding")
        residual = self.embedding(batch.token_ids)
        query_scale = self.query_scale(batch)
        x: torch.Tensor | Product | None = None
        *layers, last = zip(self.layers, cache, strict=True)
        for index, (layer, layer_cache) in enumerate(layers):
            self.before(f"layers.{index}")
            x = layer.attend(x, residual, batch, query_scale, layer_cache)
            x = layer.transform(x, residual)
        self.before(f"layers.{len(layers)}")
        layer, layer_cache = last
        x = layer.attend(x, residual, batch, query_scale, layer_cache)
        if batch.logits_rows is not None and batch.logits_rows.shape[0] < residual.shape[0]:
            # Past the last layer's attention, only the rows whose next token is wanted matter.
            rows = batch.logits_rows
            x, residual = x[rows], residual[rows] if self.group is None else self.group.whole(residual, rows)
        return self.finish(x, residual)

    def finish(self, x: torch.Tensor | Product, residual: torch.Tensor) -> torch.Tensor:
        """What comes after the last layer's attention, whose contribution is x; both [R, hidden_size]."""
        if not residual.shape[0]:
            return residual.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        x = self.layers[-1].transform(x, residual)
        self.before("all")
        return self.head(self.norm(x, residual))


def _slopes(config: ModelConfig, device: torch.device, group: Group | None) -> torch.Tensor | None:
    """The biases' slopes of the heads that are computed here, [num_heads]."""
    if not config.alibi:
        return None
    slopes = alibi_slopes(config.num_heads).to(device)
    return slopes if group is None else slopes.chunk(group.world_size)[group.rank].contiguous()


def _layers(
    config: ModelConfig, weights: Weights, max_model_len: int, device: torch.device, group: Group | None
) -> list[DecoderLayer]:
    """All layers; those that rotate alike share one table of angles."""
    scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
    slopes = _slopes(config, device, group)
    num_heads = config.num_heads // (1 if group is None else group.world_size)

    def table(rope: RopeConfig | None) -> torch.Tensor | None:
        return None if rope is None else cos_sin_table(rope, max_model_len, device)

    everywhere = config.rope, table(config.rope)
    in_windows = (config.local_rope, table(config.local_rope)) if config.local_rope else everywhere
    layers: list[DecoderLayer] = []
    for index, window in enumerate(config.windows or (0,) * config.num_layers):
        prefix = f"layers.{index}."
        # A window that nothing served is longer than hides nothing.
        visible = window if window < max_model_len else 0
        form = AttentionForm(num_heads, scale, config.attention_softcap, visible, slopes)
        rope, cos_sin = in_windows if window else everywhere
        interleaved = rope is not None and rope.interleaved
        attention = Attention(config, weights, prefix, form, cos_sin, interleaved, adds_bias(group))
        after = layers[-1].mlp_output_norm if layers else None
        layers.append(DecoderLayer(config, weights, prefix, attention, group, after))
    return layers
