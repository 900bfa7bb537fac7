"""Small GGUF files for tests, written by the format's own package from models of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

Array = npt.NDArray[np.float32]
Type = gguf.GGMLQuantizationType

LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
OTHER_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(hub_name: str) -> str:
    """GGUF's name of a tensor; names that are none of the Hub's stay as they are."""
    if not hub_name.startswith("model.layers."):
        return OTHER_NAMES.get(hub_name, hub_name)
    _, _, layer, part = hub_name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[part]}"


def rotary_pairs(weight: Array, num_heads: int) -> Array:
    """The order of rows in which llama.cpp keeps q and k: element i of each half, side by side."""
    rows = np.arange(weight.shape[0]).reshape(num_heads, 2, -1)
    return weight[np.stack([rows[:, 0], rows[:, 1]], axis=-1).reshape(-1)]


def write_gguf(
    path: Path,
    config: Any,
    state: dict[str, Array],
    kind: Type = Type.F32,
    tokenizer: Tokenizer | None = None,
    metadata: dict[str, Any] | None = None,
    pre: str = "smollm",
) -> dict[str, Array]:
    """Write a Llama or Qwen 2 model; matrices as `kind`. Returns the weights that the file stands for."""
    arch = config.model_type
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    add_tokenizer(writer, tokenizer or trained_tokenizer(), pre)
    for key, value in (metadata or {}).items():
        writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    stored = {}
    for name, value in state.items():
        heads = {"q_proj.weight": config.num_attention_heads, "k_proj.weight": config.num_key_value_heads}
        num_heads = heads.get(".".join(name.split(".")[-2:])) if arch == "llama" else None
        ordered = rotary_pairs(value, num_heads) if num_heads else value
        tensor_kind = kind if value.ndim == 2 else Type.F32
        data = gguf.quants.quantize(ordered, tensor_kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=tensor_kind)
        # Rows are quantised one by one, so their order does not matter to what they become.
        stored[name] = gguf.quants.dequantize(gguf.quants.quantize(value, tensor_kind), tensor_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, pre: str) -> None:
    added = tokenizer.get_added_tokens_decoder()
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    tokens = sorted(vocab, key=vocab.__getitem__)
    kinds = [
        (gguf.TokenType.CONTROL if added[i].special else gguf.TokenType.USER_DEFINED)
        if i in added
        else gguf.TokenType.NORMAL
        for i in range(len(tokens))
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges_of(tokenizer)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")


def merges_of(tokenizer: Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]  # type: ignore[no-any-return]


CORPUS = [
    "The quick brown fox jumps over the lazy dog, and it's 1234 times they'll say they've done so.\n",
    "def hash(key):\n    return key % 97\n\n\n  42 is the answer; Don't WE'RE know?\t\ttabs\r\n",
    "Grüße aus München – naïve café, 東京は日本の首都です。 你好，世界！ Привет мир 🎉👩‍👩‍👧‍👦 ½ ٣",
]


def trained_tokenizer(pre_tokenizer: Any = None, normalizer: Any = None, vocab_size: int = 448) -> Tokenizer:
    """A small byte-level BPE tokenizer; the ids 0 to 2 are special, as in SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer
