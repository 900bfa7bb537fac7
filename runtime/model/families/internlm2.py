"""InternLM2 and 2.5: Llama under other names, each key head's queries, key and value side by side."""

from __future__ import annotations

from collections.abc import Iterator

from runtime.model.config import ModelConfig, RawConfig
from runtime.model.families import standard
from runtime.model.layout import Parameter, Part, RowRange, stacked, whole

ARCHITECTURES = ("InternLM2ForCausalLM",)


def read_config(raw: RawConfig) -> ModelConfig:
    """Map the keys of an InternLM2 config.json."""
    raw.refuse("bias", False)
    return standard.read_config(raw, "internlm2")


def parameters(config: ModelConfig) -> Iterator[Parameter]:
    """Which checkpoint tensors fill which parameters."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield whole("embedding", "model.tok_embeddings.weight", vocab, hidden, split="vocabulary")
    for index in range(config.num_layers):
        yield from _layer(config, f"layers.{index}.", f"model.layers.{index}.")
    yield whole("norm", "model.norm.weight", hidden)
    if not config.tie_word_embeddings:
        yield whole("head", "output.weight", vocab, hidden, split="vocabulary")


def _layer(config: ModelConfig, ours: str, theirs: str) -> Iterator[Parameter]:
    hidden, inter, queries = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    mlp = f"{theirs}feed_forward."
    yield whole(f"{ours}attention_norm", f"{theirs}attention_norm.weight", hidden)
    yield _qkv(config, f"{ours}qkv", f"{theirs}attention.wqkv.weight")
    yield whole(f"{ours}o", f"{theirs}attention.wo.weight", hidden, queries, split="columns")
    yield whole(f"{ours}mlp_norm", f"{theirs}ffn_norm.weight", hidden)
    yield stacked(
        f"{ours}gate_up", [(f"{mlp}w1.weight", inter, "rows"), (f"{mlp}w3.weight", inter, "rows")], hidden
    )
    yield whole(f"{ours}down", f"{mlp}w2.weight", hidden, inter, split="columns")


def _qkv(config: ModelConfig, ours: str, theirs: str) -> Parameter:
    """The rows are [num_kv_heads, group + 2, head_dim]: a group's queries, then its key, then its value."""
    group = config.num_heads // config.num_kv_heads
    shape = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim, config.hidden_size

    def heads(first: int, last: int) -> tuple[RowRange, ...]:
        starts = (kv_head * (group + 2) for kv_head in range(config.num_kv_heads))
        return tuple(((s + first) * config.head_dim, (s + last) * config.head_dim) for s in starts)

    return Parameter(
        ours,
        (
            Part(theirs, shape, "heads", heads(0, group)),
            Part(theirs, shape, "kv_heads", heads(group, group + 1)),
            Part(theirs, shape, "kv_heads", heads(group + 1, group + 2)),
        ),
    )
