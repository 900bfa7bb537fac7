"""Gemma 2: soft caps, a window in every other layer, and norms behind attention and MLP as well."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from runtime.model.config import ModelConfig, RawConfig
from runtime.model.families import standard
from runtime.model.layout import Parameter, whole

ARCHITECTURES = ("Gemma2ForCausalLM",)


def read_config(raw: RawConfig) -> ModelConfig:
    """Map the keys of a Gemma 2 config.json."""
    config = common_config(raw, "gemma2")
    alternating = [index % 2 == 0 for index in range(config.num_layers)]
    return replace(
        config,
        attention_softcap=raw.get_optional_float("attn_logit_softcapping", 50.0) or 0.0,
        logits_softcap=raw.get_optional_float("final_logit_softcapping", 30.0) or 0.0,
        windows=raw.get_windows(raw.get_optional_int("sliding_window", 4096), alternating),
    )


def common_config(raw: RawConfig, family: str) -> ModelConfig:
    """What Gemma 2 and 3 share."""
    raw.refuse("use_bidirectional_attention", False, None)
    activation = ("hidden_activation", "gelu_pytorch_tanh")
    config = standard.read_config(raw, family, head_dim=256, activation=activation, tied=True)
    bias = raw.get_bool("attention_bias", False)
    return replace(
        config,
        attention_bias=bias,
        attention_output_bias=bias,
        attention_scale=raw.get_float("query_pre_attn_scalar", 256.0) ** -0.5,
        # The checkpoint keeps what each weight is off from one.
        norm_offset=1.0,
        embedding_multiplier=config.hidden_size**0.5,
    )


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Which checkpoint tensors fill which parameters."""
    return standard.model(config, layer)


def layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    """A layer with a norm on either side of attention and of the MLP."""
    hidden = config.hidden_size
    yield whole(f"{ours}attention_norm", f"{theirs}input_layernorm.weight", hidden)
    yield from standard.attention(config, ours, theirs)
    yield whole(f"{ours}attention_output_norm", f"{theirs}post_attention_layernorm.weight", hidden)
    yield whole(f"{ours}mlp_norm", f"{theirs}pre_feedforward_layernorm.weight", hidden)
    yield from standard.mlp(config, ours, theirs)
    yield whole(f"{ours}mlp_output_norm", f"{theirs}post_feedforward_layernorm.weight", hidden)
