"""ChatGLM2 and 3, and GLM-4 in their format: half of each head rotates, in neighbouring pairs."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.model.config import ModelConfig, RawConfig, RopeConfig
from runtime.model.layout import Parameter, Split, packed, whole

ARCHITECTURES = ("ChatGLMModel", "ChatGLMForConditionalGeneration")
# Switches of the original code that no published checkpoint turns.
_FIXED = {
    "rmsnorm": True,
    "add_bias_linear": False,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
}


def read_config(raw: RawConfig) -> ModelConfig:
    """Map the keys of a ChatGLM config.json."""
    for key, value in _FIXED.items():
        raw.refuse(key, value)
    hidden_size, num_heads = raw.get_int("hidden_size"), raw.get_int("num_attention_heads")
    head_dim = raw.get_int("kv_channels", hidden_size // num_heads)
    shares_keys = raw.get_bool("multi_query_attention", False)
    return ModelConfig(
        family="chatglm",
        num_layers=raw.get_int("num_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=raw.get_int("multi_query_group_num", 1) if shares_keys else num_heads,
        head_dim=head_dim,
        intermediate_size=raw.get_int("ffn_hidden_size"),
        vocab_size=raw.get_int("padded_vocab_size"),
        max_position_embeddings=raw.get_int("seq_length"),
        rms_norm_eps=raw.get_float("layernorm_epsilon", 1e-5),
        rope=RopeConfig(
            theta=10000.0 * raw.get_float("rope_ratio", 1.0), rotary_dim=head_dim // 2, interleaved=True
        ),
        torch_dtype=raw.torch_dtype,
        tie_word_embeddings=raw.get_bool("tie_word_embeddings", False),
        attention_bias=raw.get_bool("add_qkv_bias", False),
    )


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Which checkpoint tensors fill which parameters."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield whole(
        "embedding", "transformer.embedding.word_embeddings.weight", vocab, hidden, split="vocabulary"
    )
    for index in range(config.num_layers):
        yield from _layer(config, f"layers.{index}.", f"transformer.encoder.layers.{index}.")
    yield whole("norm", "transformer.encoder.final_layernorm.weight", hidden)
    if not config.tie_word_embeddings:
        yield whole("head", "transformer.output_layer.weight", vocab, hidden, split="vocabulary")


def _layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    hidden, inter = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    qkv: list[tuple[int, Split]] = [(queries, "heads"), (keys, "kv_heads"), (keys, "kv_heads")]
    attention, mlp = f"{theirs}self_attention.", f"{theirs}mlp."
    yield whole(f"{ours}attention_norm", f"{theirs}input_layernorm.weight", hidden)
    yield packed(f"{ours}qkv", f"{attention}query_key_value.weight", qkv, hidden)
    if config.attention_bias:
        yield packed(f"{ours}qkv_bias", f"{attention}query_key_value.bias", qkv)
    yield whole(f"{ours}o", f"{attention}dense.weight", hidden, queries, split="columns")
    yield whole(f"{ours}mlp_norm", f"{theirs}post_attention_layernorm.weight", hidden)
    yield packed(f"{ours}gate_up", f"{mlp}dense_h_to_4h.weight", [(inter, "rows"), (inter, "rows")], hidden)
    yield whole(f"{ours}down", f"{mlp}dense_4h_to_h.weight", hidden, inter, split="columns")
