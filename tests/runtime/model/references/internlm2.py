"""InternLM2: each key head's queries, key and value lie side by side in wqkv."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from tests.runtime.model.references.plain import angles, attend, rms_norm, save, turn_halves

HIDDEN, HEADS, KV_HEADS, DIM, INTER, VOCAB, LAYERS = 96, 6, 2, 16, 80, 120, 2
GROUP = HEADS // KV_HEADS


def make(directory: Path):
    shapes = {
        "model.tok_embeddings.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "output.weight": (VOCAB, HIDDEN),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}attention_norm.weight": (HIDDEN,),
            f"{prefix}ffn_norm.weight": (HIDDEN,),
            f"{prefix}attention.wqkv.weight": ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN),
            f"{prefix}attention.wo.weight": (HIDDEN, HEADS * DIM),
            f"{prefix}feed_forward.w1.weight": (INTER, HIDDEN),
            f"{prefix}feed_forward.w2.weight": (HIDDEN, INTER),
            f"{prefix}feed_forward.w3.weight": (INTER, HIDDEN),
        }
    config = {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "hidden_act": "silu",
        "bias": False,
        "rope_theta": 50000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.5},
        "max_position_embeddings": 160,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    weights = save(directory, config, shapes)

    def logits(tokens: list[int], num_prompt: int) -> torch.Tensor:
        # Nothing turns otherwise before max_position_embeddings, and nothing longer is served.
        turned = angles(len(tokens), DIM, 5e7)
        x = weights["model.tok_embeddings.weight"][tokens]
        for layer in range(LAYERS):

            def w(name: str, layer: int = layer) -> torch.Tensor:
                return weights[f"model.layers.{layer}.{name}.weight"]

            packed = rms_norm(x, w("attention_norm"), 1e-5) @ w("attention.wqkv").T
            packed = packed.unflatten(-1, (KV_HEADS, GROUP + 2, DIM))
            q = packed[:, :, :GROUP].flatten(1, 2)
            k, v = packed[:, :, GROUP], packed[:, :, GROUP + 1]
            x = x + attend(turn_halves(q, turned), turn_halves(k, turned), v) @ w("attention.wo").T
            normed = rms_norm(x, w("ffn_norm"), 1e-5)
            gated = F.silu(normed @ w("feed_forward.w1").T) * (normed @ w("feed_forward.w3").T)
            x = x + gated @ w("feed_forward.w2").T
        return rms_norm(x, weights["model.norm.weight"], 1e-5) @ weights["output.weight"].T

    return logits
