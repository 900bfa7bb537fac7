"""ChatGLM3: half of each head turns, in neighbouring pairs, more slowly by rope_ratio; few key heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.runtime.model.references.plain import angles, attend, rms_norm, save, turn_pairs

HIDDEN, HEADS, GROUPS, DIM, INTER, VOCAB, LAYERS = 48, 4, 2, 16, 80, 120, 2


def make(directory: Path, rope_ratio: int | None):
    rows = (HEADS + 2 * GROUPS) * DIM
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (VOCAB, HIDDEN),
        "transformer.encoder.final_layernorm.weight": (HIDDEN,),
        "transformer.output_layer.weight": (VOCAB, HIDDEN),
        "transformer.rotary_pos_emb.inv_freq": (DIM // 4,),
    }
    for layer in range(LAYERS):
        prefix = f"transformer.encoder.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}self_attention.query_key_value.weight": (rows, HIDDEN),
            f"{prefix}self_attention.query_key_value.bias": (rows,),
            f"{prefix}self_attention.dense.weight": (HIDDEN, HEADS * DIM),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}mlp.dense_h_to_4h.weight": (2 * INTER, HIDDEN),
            f"{prefix}mlp.dense_4h_to_h.weight": (HIDDEN, INTER),
        }
    config: dict[str, Any] = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "multi_query_attention": True,
        "multi_query_group_num": GROUPS,
        "kv_channels": DIM,
        "ffn_hidden_size": INTER,
        "padded_vocab_size": VOCAB,
        "layernorm_epsilon": 1e-5,
        "rmsnorm": True,
        "add_qkv_bias": True,
        "add_bias_linear": False,
        "original_rope": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "apply_query_key_layer_scaling": True,
        "seq_length": 160,
        "torch_dtype": "float32",
    }
    if rope_ratio is not None:
        config["rope_ratio"] = rope_ratio
    weights = save(directory, config, shapes)

    def logits(tokens: list[int], num_prompt: int) -> torch.Tensor:
        turned = angles(len(tokens), DIM // 2, 10000.0 * (rope_ratio or 1))

        def turn(x: torch.Tensor) -> torch.Tensor:
            return torch.cat((turn_pairs(x[..., : DIM // 2], turned), x[..., DIM // 2 :]), -1)

        x = weights["transformer.embedding.word_embeddings.weight"][tokens]
        for layer in range(LAYERS):

            def w(name: str, layer: int = layer) -> torch.Tensor:
                return weights[f"transformer.encoder.layers.{layer}.{name}"]

            normed = rms_norm(x, w("input_layernorm.weight"), 1e-5)
            qkv = normed @ w("self_attention.query_key_value.weight").T
            qkv = (qkv + w("self_attention.query_key_value.bias")).unflatten(-1, (-1, DIM))
            q, k, v = qkv.split((HEADS, GROUPS, GROUPS), dim=1)
            x = x + attend(turn(q), turn(k), v) @ w("self_attention.dense.weight").T
            normed = rms_norm(x, w("post_attention_layernorm.weight"), 1e-5)
            first, second = (normed @ w("mlp.dense_h_to_4h.weight").T).chunk(2, -1)
            x = x + (F.silu(first) * second) @ w("mlp.dense_4h_to_h.weight").T
        x = rms_norm(x, weights["transformer.encoder.final_layernorm.weight"], 1e-5)
        return x @ weights["transformer.output_layer.weight"].T

    return logits
