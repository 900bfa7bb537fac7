"""Qwen2, Qwen2.5 and, before they had the name, Qwen1.5: Llama with biases of queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from runtime.model.config import ConfigError, ModelConfig, RawConfig
from runtime.model.families import standard
from runtime.model.layout import Parameter

ARCHITECTURES = ("Qwen2ForCausalLM",)


def read_config(raw: RawConfig) -> ModelConfig:
    """Map the keys of a Qwen2 config.json."""
    config = standard.read_config(raw, "qwen2")
    return replace(config, attention_bias=True, windows=windows(raw, config.num_layers))


def windows(raw: RawConfig, num_layers: int) -> tuple[int, ...]:
    """Each layer's window. The keys are there even where no layer has one."""
    if not raw.get_bool("use_sliding_window", False):
        return ()
    first = raw.values.get("max_window_layers", 28)
    if not isinstance(first, int):
        raise ConfigError(f"{raw.where}: max_window_layers must be an integer, not {first!r}.")
    return raw.get_windows(
        raw.get_optional_int("sliding_window", 4096), [index >= first for index in range(num_layers)]
    )


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Which checkpoint tensors fill which parameters."""
    return standard.model(config, standard.layer)
