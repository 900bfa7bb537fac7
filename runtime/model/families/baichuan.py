"""Baichuan and Baichuan2: Llama with one tensor for queries, keys and values; the larger ones with ALiBi."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from runtime.model.config import ModelConfig, RawConfig
from runtime.model.families import standard
from runtime.model.layout import Parameter, packed, whole

# The first 7B wrote itself with a capital C.
ARCHITECTURES = ("BaichuanForCausalLM", "BaiChuanForCausalLM")
# Baichuan2 is known by its vocabulary; the rows of its head count as unit vectors.
_BAICHUAN2_VOCAB = 125696


def read_config(raw: RawConfig) -> ModelConfig:
    """Map the keys of a Baichuan config.json.

    Sizes 7B and 13B share their architecture's name. Only the 7B's positions rotate, and only its config
    says how many there may be; the 13B has a model_max_length.
    """
    config = standard.read_config(raw, "baichuan")
    rotates = raw.values.get("max_position_embeddings") is not None
    length = "max_position_embeddings" if rotates else "model_max_length"
    return replace(
        config,
        max_position_embeddings=raw.get_int(length),
        rope=config.rope if rotates else None,
        alibi=not rotates,
        normalized_head=config.vocab_size == _BAICHUAN2_VOCAB,
    )


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Which checkpoint tensors fill which parameters."""
    return standard.model(config, _layer)


def _layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    hidden = config.hidden_size
    yield whole(f"{ours}attention_norm", f"{theirs}input_layernorm.weight", hidden)
    yield packed(
        f"{ours}qkv",
        f"{theirs}self_attn.W_pack.weight",
        [(hidden, "heads"), (hidden, "kv_heads"), (hidden, "kv_heads")],
        hidden,
    )
    yield whole(f"{ours}o", f"{theirs}self_attn.o_proj.weight", hidden, hidden, split="columns")
    yield whole(f"{ours}mlp_norm", f"{theirs}post_attention_layernorm.weight", hidden)
    yield from standard.mlp(config, ours, theirs)
