"""The Llama family: Llama 2 and 3, Mistral, Yi, SmolLM2 and all that share their layout."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.model.config import ConfigError, ModelConfig, RawConfig
from runtime.model.layout import Parameter, Part, Split

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


def read_config(raw: RawConfig) -> ModelConfig:
    """Map the keys of a Llama config.json."""
    hidden_size, num_heads = raw.get_int("hidden_size"), raw.get_int("num_attention_heads")
    head_dim = raw.get_int("head_dim", hidden_size // num_heads)
    if raw.values.get("hidden_act", "silu") != "silu":
        raise ConfigError(
            f"{raw.path}: hidden_act {raw.values['hidden_act']!r} is not supported; Llama uses silu."
        )
    if raw.values.get("sliding_window") is not None:
        raise ConfigError(
            f"{raw.path}: sliding_window is not supported; set it to null if the model may do without."
        )
    attention_bias = raw.get_bool("attention_bias", False)
    return ModelConfig(
        family="llama",
        num_layers=raw.get_int("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=raw.get_int("num_key_value_heads", num_heads),
        head_dim=head_dim,
        intermediate_size=raw.get_int("intermediate_size"),
        vocab_size=raw.get_int("vocab_size"),
        max_position_embeddings=raw.get_int("max_position_embeddings", 2048),
        rms_norm_eps=raw.get_float("rms_norm_eps", 1e-6),
        rope=raw.rope(head_dim),
        tie_word_embeddings=raw.get_bool("tie_word_embeddings", False),
        attention_bias=attention_bias,
        attention_output_bias=attention_bias,
        mlp_bias=raw.get_bool("mlp_bias", False),
        torch_dtype=raw.torch_dtype,
    )


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Which checkpoint tensors fill which parameters, in the order the decoder reads them."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield Parameter("embedding", (Part("model.embed_tokens.weight", (vocab, hidden), "vocabulary"),))
    for index in range(config.num_layers):
        yield from _layer(config, f"layers.{index}.", f"model.layers.{index}.")
    yield Parameter("norm", (Part("model.norm.weight", (hidden,)),))
    if not config.tie_word_embeddings:
        yield Parameter("head", (Part("lm_head.weight", (vocab, hidden), "vocabulary"),))


def _layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    hidden, inter, dim = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_heads * dim, config.num_kv_heads * dim
    attn, mlp = f"{theirs}self_attn.", f"{theirs}mlp."
    yield Parameter(f"{ours}input_norm", (Part(f"{theirs}input_layernorm.weight", (hidden,)),))
    qkv: tuple[tuple[str, int, Split], ...] = (
        ("q_proj", queries, "heads"),
        ("k_proj", keys, "kv_heads"),
        ("v_proj", keys, "kv_heads"),
    )
    yield Parameter(
        f"{ours}qkv", tuple(Part(f"{attn}{n}.weight", (rows, hidden), split) for n, rows, split in qkv)
    )
    if config.attention_bias:
        yield Parameter(
            f"{ours}qkv_bias", tuple(Part(f"{attn}{n}.bias", (rows,), split) for n, rows, split in qkv)
        )
    yield Parameter(f"{ours}o", (Part(f"{attn}o_proj.weight", (hidden, queries), "columns"),))
    if config.attention_output_bias:
        yield Parameter(f"{ours}o_bias", (Part(f"{attn}o_proj.bias", (hidden,)),))
    yield Parameter(f"{ours}post_norm", (Part(f"{theirs}post_attention_layernorm.weight", (hidden,)),))
    gate_up = ("gate_proj", "up_proj")
    yield Parameter(
        f"{ours}gate_up", tuple(Part(f"{mlp}{n}.weight", (inter, hidden), "rows") for n in gate_up)
    )
    if config.mlp_bias:
        yield Parameter(
            f"{ours}gate_up_bias", tuple(Part(f"{mlp}{n}.bias", (inter,), "rows") for n in gate_up)
        )
    yield Parameter(f"{ours}down", (Part(f"{mlp}down_proj.weight", (hidden, inter), "columns"),))
    if config.mlp_bias:
        yield Parameter(f"{ours}down_bias", (Part(f"{mlp}down_proj.bias", (hidden,)),))
