"""Qwen3: Qwen2 with norms of queries and keys in the place of biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from runtime.model.config import ModelConfig, RawConfig
from runtime.model.families import qwen2, standard
from runtime.model.layout import Parameter

ARCHITECTURES = ("Qwen3ForCausalLM",)


def read_config(raw: RawConfig) -> ModelConfig:
    """Map the keys of a Qwen3 config.json."""
    config = standard.read_config(raw, "qwen3", head_dim=128)
    bias = raw.get_bool("attention_bias", False)
    return replace(
        config,
        attention_bias=bias,
        attention_output_bias=bias,
        windows=qwen2.windows(raw, config.num_layers),
    )


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Which checkpoint tensors fill which parameters."""
    return standard.model(config, _layer)


def _layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    yield from standard.layer(config, ours, theirs)
    yield from standard.head_norms(config, ours, theirs)
