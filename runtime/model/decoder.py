"""The one decoder-only transformer, written once, for packed batches over a paged cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from runtime.kernels.batch import PackedBatch
from runtime.kernels.linear import LinearWeights, logits_of
from runtime.model.config import ModelConfig
from runtime.model.layers import MLP, Attention, Embedding, LayerCache, RMSNorm, Weights
from runtime.model.rope import cos_sin_table


class DecoderLayer:
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int, cos_sin: torch.Tensor) -> None:
        prefix = f"layers.{index}."
        self.input_norm = RMSNorm(weights, f"{prefix}input_norm", config.rms_norm_eps)
        self.attention = Attention(config, weights, prefix, cos_sin)
        self.post_norm = RMSNorm(weights, f"{prefix}post_norm", config.rms_norm_eps)
        self.mlp = MLP(weights, prefix)

    def attend(
        self, x: torch.Tensor | None, residual: torch.Tensor, batch: PackedBatch, cache: LayerCache
    ) -> torch.Tensor:
        """The first half: residual += x, then the attention's contribution, [T, hidden_size]."""
        return self.attention(self.input_norm(x, residual), batch, cache)

    def transform(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """The second half: residual += x, then the MLP's contribution, [T, hidden_size]."""
        return self.mlp(self.post_norm(x, residual))


class Decoder:
    """A model with its weights. `dtype` is what activations are computed in."""

    def __init__(self, config: ModelConfig, weights: Weights, max_model_len: int, dtype: torch.dtype) -> None:
        self.config = config
        self.embedding = Embedding(weights["embedding"][0], dtype)
        cos_sin = cos_sin_table(config.rope, max_model_len).to(self.embedding.table.device)
        self.layers = [DecoderLayer(config, weights, index, cos_sin) for index in range(config.num_layers)]
        self.norm = RMSNorm(weights, "norm", config.rms_norm_eps)
        self.head = LinearWeights(weights["embedding" if config.tie_word_embeddings else "head"])

    def forward(self, batch: PackedBatch, cache: Sequence[LayerCache]) -> torch.Tensor:
        """The logits after `batch.logits_rows`, [R, vocab_size] float32."""
        residual = self.embedding(batch.token_ids)
        x: torch.Tensor | None = None
        *layers, last = zip(self.layers, cache, strict=True)
        for layer, layer_cache in layers:
            x = layer.attend(x, residual, batch, layer_cache)
            x = layer.transform(x, residual)
        layer, layer_cache = last
        x = layer.attend(x, residual, batch, layer_cache)
        if batch.logits_rows is not None and batch.logits_rows.shape[0] < residual.shape[0]:
            # Past the last layer's attention, only the rows whose next token is wanted matter.
            x, residual = x[batch.logits_rows], residual[batch.logits_rows]
        if not residual.shape[0]:
            return residual.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        x = layer.transform(x, residual)
        return logits_of(self.norm(x, residual), self.head)
