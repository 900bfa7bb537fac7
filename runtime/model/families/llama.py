"""The Llama family: Llama 2 and 3, Yi, Mistral, SmolLM2 and all that share their layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from runtime.model.config import ModelConfig, RawConfig
from runtime.model.families import standard
from runtime.model.layout import Parameter

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


def read_config(raw: RawConfig) -> ModelConfig:
    """Map the keys of a Llama or Mistral config.json."""
    config = standard.read_config(raw, "llama")
    attention_bias = raw.get_bool("attention_bias", False)
    # Mistral's first release has a window in every layer, and leaving the key out means its size.
    mistral = raw.architecture == "MistralForCausalLM"
    window = raw.get_optional_int("sliding_window", 4096) if mistral else None
    return replace(
        config,
        windows=raw.get_windows(window, [True] * config.num_layers),
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=raw.get_bool("mlp_bias", False),
    )


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Which checkpoint tensors fill which parameters."""
    return standard.model(config, standard.layer)
