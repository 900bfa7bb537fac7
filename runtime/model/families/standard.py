"""What Llama and most families after it spell alike: keys of config.json, and names of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from runtime.model.config import ModelConfig, RawConfig
from runtime.model.layout import Parameter, stacked, whole

# (config, prefix of our names, prefix of the checkpoint's) -> the parameters of one layer.
Layer = Callable[[ModelConfig, str, str], Iterator[Parameter]]


def read_config(
    raw: RawConfig,
    family: str,
    head_dim: int | None = None,
    activation: tuple[str, str] = ("hidden_act", "silu"),
    tied: bool = False,
) -> ModelConfig:
    """The common keys. `activation` is a key with its default, `tied` the default of tie_word_embeddings."""
    hidden_size, num_heads = raw.get_int("hidden_size"), raw.get_int("num_attention_heads")
    head_dim = raw.get_int("head_dim", head_dim or hidden_size // num_heads)
    return ModelConfig(
        family=family,
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
        torch_dtype=raw.torch_dtype,
        tie_word_embeddings=raw.get_bool("tie_word_embeddings", tied),
        activation=raw.get_activation(*activation),
    )


def model(config: ModelConfig, layer: Layer) -> Iterator[Parameter]:
    """All parameters, in the order in which the decoder reads them."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield whole("embedding", "model.embed_tokens.weight", vocab, hidden, split="vocabulary")
    for index in range(config.num_layers):
        yield from layer(config, f"layers.{index}.", f"model.layers.{index}.")
    yield whole("norm", "model.norm.weight", hidden)
    if not config.tie_word_embeddings:
        yield whole("head", "lm_head.weight", vocab, hidden, split="vocabulary")


def layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    """A layer with a norm before attention and one before the MLP."""
    yield whole(f"{ours}attention_norm", f"{theirs}input_layernorm.weight", config.hidden_size)
    yield from attention(config, ours, theirs)
    yield whole(f"{ours}mlp_norm", f"{theirs}post_attention_layernorm.weight", config.hidden_size)
    yield from mlp(config, ours, theirs)


def attention(config: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    """Queries, keys and values as tensors of their own, and the output."""
    prefix = f"{theirs}self_attn."
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for bias in ("", "_bias") if config.attention_bias else ("",):
        kind, columns = ("bias", ()) if bias else ("weight", (config.hidden_size,))
        yield stacked(
            f"{ours}qkv{bias}",
            [
                (f"{prefix}q_proj.{kind}", queries, "heads"),
                (f"{prefix}k_proj.{kind}", keys, "kv_heads"),
                (f"{prefix}v_proj.{kind}", keys, "kv_heads"),
            ],
            *columns,
        )
    yield whole(f"{ours}o", f"{prefix}o_proj.weight", config.hidden_size, queries, split="columns")
    if config.attention_output_bias:
        yield whole(f"{ours}o_bias", f"{prefix}o_proj.bias", config.hidden_size)


def head_norms(config: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    """The norms of queries and keys."""
    for which in ("q", "k"):
        yield whole(f"{ours}{which}_norm", f"{theirs}self_attn.{which}_norm.weight", config.head_dim)


def mlp(config: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    """Gate and up as tensors of their own, and down."""
    hidden, inter = config.hidden_size, config.intermediate_size
    prefix = f"{theirs}mlp."
    for bias in ("", "_bias") if config.mlp_bias else ("",):
        kind, columns = ("bias", ()) if bias else ("weight", (hidden,))
        yield stacked(
            f"{ours}gate_up{bias}",
            [(f"{prefix}gate_proj.{kind}", inter, "rows"), (f"{prefix}up_proj.{kind}", inter, "rows")],
            *columns,
        )
    yield whole(f"{ours}down", f"{prefix}down_proj.weight", hidden, inter, split="columns")
    if config.mlp_bias:
        yield whole(f"{ours}down_bias", f"{prefix}down_proj.bias", hidden)
