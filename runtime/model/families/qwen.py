"""The first Qwen: prompts longer than it was trained with turn more slowly, and later queries grow."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.model.config import ModelConfig, RawConfig, RopeConfig
from runtime.model.layout import Parameter, Split, packed, stacked, whole

ARCHITECTURES = ("QWenLMHeadModel",)


def read_config(raw: RawConfig) -> ModelConfig:
    """Map the keys of a Qwen config.json."""
    raw.refuse("no_bias", True)
    raw.refuse("scale_attn_weights", True)
    hidden_size, num_heads = raw.get_int("hidden_size"), raw.get_int("num_attention_heads")
    head_dim = raw.get_int("kv_channels", hidden_size // num_heads)
    trained = {
        key: raw.get_int("seq_length") if raw.get_bool(key, True) else None
        for key in ("use_dynamic_ntk", "use_logn_attn")
    }
    return ModelConfig(
        family="qwen",
        num_layers=raw.get_int("num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        # The key counts gate and up together.
        intermediate_size=raw.get_int("intermediate_size") // 2,
        vocab_size=raw.get_int("vocab_size"),
        max_position_embeddings=raw.get_int("max_position_embeddings", 8192),
        rms_norm_eps=raw.get_float("layer_norm_epsilon", 1e-6),
        rope=RopeConfig(
            theta=raw.get_float("rotary_emb_base", 10000.0),
            rotary_dim=int(head_dim * raw.get_float("rotary_pct", 1.0)),
            ntk_length=trained["use_dynamic_ntk"],
        ),
        torch_dtype=raw.torch_dtype,
        tie_word_embeddings=raw.get_bool("tie_word_embeddings", False),
        attention_bias=True,
        log_n_length=trained["use_logn_attn"],
    )


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Which checkpoint tensors fill which parameters."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield whole("embedding", "transformer.wte.weight", vocab, hidden, split="vocabulary")
    for index in range(config.num_layers):
        yield from _layer(config, f"layers.{index}.", f"transformer.h.{index}.")
    yield whole("norm", "transformer.ln_f.weight", hidden)
    if not config.tie_word_embeddings:
        yield whole("head", "lm_head.weight", vocab, hidden, split="vocabulary")


def _layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    hidden, inter = config.hidden_size, config.intermediate_size
    queries = config.num_heads * config.head_dim
    thirds: list[tuple[int, Split]] = [(queries, "heads"), (queries, "kv_heads"), (queries, "kv_heads")]
    yield whole(f"{ours}attention_norm", f"{theirs}ln_1.weight", hidden)
    yield packed(f"{ours}qkv", f"{theirs}attn.c_attn.weight", thirds, hidden)
    yield packed(f"{ours}qkv_bias", f"{theirs}attn.c_attn.bias", thirds)
    yield whole(f"{ours}o", f"{theirs}attn.c_proj.weight", hidden, queries, split="columns")
    yield whole(f"{ours}mlp_norm", f"{theirs}ln_2.weight", hidden)
    # w2 is the gate.
    yield stacked(
        f"{ours}gate_up",
        [(f"{theirs}mlp.w2.weight", inter, "rows"), (f"{theirs}mlp.w1.weight", inter, "rows")],
        hidden,
    )
    yield whole(f"{ours}down", f"{theirs}mlp.c_proj.weight", hidden, inter, split="columns")
