"""Baichuan: one tensor for queries, keys and values; ALiBi or rotary; Baichuan2's unit-length head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.runtime.model.references.plain import angles, attend, rms_norm, save, turn_halves

HIDDEN, HEADS, DIM, INTER, LAYERS = 96, 6, 16, 80, 2
# ALiBi, for a number of heads that is no power of two: 2 ** -8i/4, then every other of 2 ** -8i/8.
SLOPES = [2**-2.0, 2**-4.0, 2**-6.0, 2**-8.0, 2**-1.0, 2**-3.0]


def make(
    directory: Path, vocab: int, alibi: bool, unit_head: bool, architecture: str = "BaichuanForCausalLM"
):
    shapes = {
        "model.embed_tokens.weight": (vocab, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (vocab, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
            f"{prefix}self_attn.W_pack.weight": (3 * HIDDEN, HIDDEN),
            f"{prefix}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}mlp.gate_proj.weight": (INTER, HIDDEN),
            f"{prefix}mlp.up_proj.weight": (INTER, HIDDEN),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, INTER),
        }
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": "baichuan",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "vocab_size": vocab,
        "model_max_length": 160,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    if not alibi:
        config["max_position_embeddings"] = 160
    weights = save(directory, config, shapes)
    head = weights["lm_head.weight"]
    if unit_head:
        head = F.normalize(head, dim=1)

    def logits(tokens: list[int], num_prompt: int) -> torch.Tensor:
        place = torch.arange(len(tokens))
        distance = place[None, :] - place[:, None]
        bias = torch.tensor(SLOPES)[:, None, None] * distance if alibi else None
        turned = angles(len(tokens), DIM, 10000.0)
        x = weights["model.embed_tokens.weight"][tokens]
        for layer in range(LAYERS):

            def w(name: str, layer: int = layer) -> torch.Tensor:
                return weights[f"model.layers.{layer}.{name}.weight"]

            packed = rms_norm(x, w("input_layernorm"), 1e-6) @ w("self_attn.W_pack").T
            q, k, v = packed.unflatten(-1, (3, HEADS, DIM)).unbind(1)
            if not alibi:
                q, k = turn_halves(q, turned), turn_halves(k, turned)
            x = x + attend(q, k, v, bias) @ w("self_attn.o_proj").T
            normed = rms_norm(x, w("post_attention_layernorm"), 1e-6)
            gated = F.silu(normed @ w("mlp.gate_proj").T) * (normed @ w("mlp.up_proj").T)
            x = x + gated @ w("mlp.down_proj").T
        return rms_norm(x, weights["model.norm.weight"], 1e-6) @ head.T

    return logits
