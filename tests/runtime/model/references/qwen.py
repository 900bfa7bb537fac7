"""The first Qwen: dynamic NTK, queries that grow with the logarithm of their position, c_attn, w1 and w2."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F

from tests.runtime.model.references.plain import angles, attend, rms_norm, save, turn_halves

HIDDEN, HEADS, DIM, INTER, VOCAB, LAYERS, TRAINED = 48, 3, 16, 80, 120, 2, 16


def make(directory: Path):
    shapes = {
        "transformer.wte.weight": (VOCAB, HIDDEN),
        "transformer.ln_f.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        h = f"transformer.h.{layer}."
        shapes |= {
            f"{h}ln_1.weight": (HIDDEN,),
            f"{h}ln_2.weight": (HIDDEN,),
            f"{h}attn.c_attn.weight": (3 * HIDDEN, HIDDEN),
            f"{h}attn.c_attn.bias": (3 * HIDDEN,),
            f"{h}attn.c_proj.weight": (HIDDEN, HIDDEN),
            f"{h}mlp.w1.weight": (INTER, HIDDEN),
            f"{h}mlp.w2.weight": (INTER, HIDDEN),
            f"{h}mlp.c_proj.weight": (HIDDEN, INTER),
            # A buffer that some releases saved along.
            f"{h}attn.rotary_emb.inv_freq": (DIM // 2,),
        }
    config = {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "kv_channels": DIM,
        "intermediate_size": 2 * INTER,
        "vocab_size": VOCAB,
        "seq_length": TRAINED,
        "max_position_embeddings": 160,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "layer_norm_epsilon": 1e-6,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "no_bias": True,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    weights = save(directory, config, shapes)

    def logits(tokens: list[int], num_prompt: int) -> torch.Tensor:
        alpha = max(2 ** math.ceil(math.log(num_prompt / TRAINED, 2) + 1) - 1, 1)
        turned = angles(len(tokens), DIM, 10000 * alpha ** (DIM / (DIM - 2)))
        growth = torch.tensor([max(1.0, math.log(p + 1, TRAINED)) for p in range(len(tokens))])
        x = weights["transformer.wte.weight"][tokens]
        for layer in range(LAYERS):
            w = {
                name.removeprefix(f"transformer.h.{layer}."): tensor
                for name, tensor in weights.items()
                if name.startswith(f"transformer.h.{layer}.")
            }
            normed = rms_norm(x, w["ln_1.weight"], 1e-6)
            qkv = normed @ w["attn.c_attn.weight"].T + w["attn.c_attn.bias"]
            q, k, v = (part.reshape(-1, HEADS, DIM) for part in qkv.chunk(3, -1))
            q, k = turn_halves(q, turned) * growth[:, None, None], turn_halves(k, turned)
            x = x + attend(q, k, v) @ w["attn.c_proj.weight"].T
            normed = rms_norm(x, w["ln_2.weight"], 1e-6)
            gated = (normed @ w["mlp.w1.weight"].T) * F.silu(normed @ w["mlp.w2.weight"].T)
            x = x + gated @ w["mlp.c_proj.weight"].T
        return rms_norm(x, weights["transformer.ln_f.weight"], 1e-6) @ weights["lm_head.weight"].T

    return logits
