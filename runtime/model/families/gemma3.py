"""Gemma 3's text models: Gemma 2 with norms of queries and keys for soft caps, and two kinds of angles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from runtime.model.config import ConfigError, ModelConfig, RawConfig
from runtime.model.families import gemma2, standard
from runtime.model.layout import Parameter

ARCHITECTURES = ("Gemma3ForCausalLM",)


def read_config(raw: RawConfig) -> ModelConfig:
    """Map the keys of a Gemma 3 text config.json."""
    by_layer_type = raw.values.pop("rope_parameters", None) or {}
    if not isinstance(by_layer_type, dict):
        raise ConfigError(f"{raw.where}: rope_parameters must be an object or null, not {by_layer_type!r}.")
    config = gemma2.common_config(raw, "gemma3")
    every = raw.get_int("sliding_window_pattern", 6)
    windowed = [(index + 1) % every != 0 for index in range(config.num_layers)]
    theta = {
        "full_attention": raw.get_float("rope_theta", 1e6),
        "sliding_attention": raw.get_float("rope_local_base_freq", 1e4),
    }
    scaling: dict[str, Any] = {"full_attention": raw.values.get("rope_scaling")} | by_layer_type
    rope, local_rope = (
        raw.rope_from(
            {"rope_theta": theta[kind]} | (scaling.get(kind) or {}), kind, config.head_dim, theta[kind]
        )
        for kind in ("full_attention", "sliding_attention")
    )
    return replace(
        config,
        attention_softcap=raw.get_optional_float("attn_logit_softcapping") or 0.0,
        logits_softcap=raw.get_optional_float("final_logit_softcapping") or 0.0,
        windows=raw.get_windows(raw.get_optional_int("sliding_window", 4096), windowed),
        rope=rope,
        local_rope=local_rope,
    )


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Which checkpoint tensors fill which parameters."""
    return standard.model(config, _layer)


def _layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    yield from gemma2.layer(config, ours, theirs)
    yield from standard.head_norms(config, ours, theirs)
