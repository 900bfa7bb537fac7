"""A tiny random checkpoint of each family and kind, with an independent reference for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.runtime.model.references import baichuan, chatglm, internlm2, qwen

# (tokens, how many of them are the prompt) -> the logits after each token [T, vocab_size].
Reference = Callable[[list[int], int], torch.Tensor]

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 160,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def of_transformers(name: str, directory: Path, **settings: Any) -> Reference:
    """Saved and computed by transformers' own classes."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**(SIZES | settings))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in parameter_name:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    model.eval().save_pretrained(directory)

    def logits(tokens: list[int], num_prompt: int) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([tokens]), use_cache=False).logits[0]

    return logits


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}
GEMMA: dict[str, Any] = {"query_pre_attn_scalar": 24, "sliding_window": 9}
CASES: dict[str, Callable[[Path], Reference]] = {
    "Mistral with windows": lambda d: of_transformers("Mistral", d, sliding_window=9),
    "Mistral without": lambda d: of_transformers("Mistral", d, sliding_window=None),
    "Llama with YaRN": lambda d: of_transformers(
        "Llama", d, head_dim=32, rope_parameters=YARN | {"rope_theta": 500.0}
    ),
    "Qwen": qwen.make,
    "Qwen2": lambda d: of_transformers("Qwen2", d),
    "Qwen2, tied head and windows from the second layer on": lambda d: of_transformers(
        "Qwen2", d, tie_word_embeddings=True, use_sliding_window=True, sliding_window=9, max_window_layers=1
    ),
    "Qwen3": lambda d: of_transformers("Qwen3", d),
    "Baichuan 13B": partial(baichuan.make, vocab=120, alibi=True, unit_head=False),
    "Baichuan 7B": partial(
        baichuan.make, vocab=120, alibi=False, unit_head=False, architecture="BaiChuanForCausalLM"
    ),
    "Baichuan2 13B": partial(baichuan.make, vocab=125696, alibi=True, unit_head=True),
    "InternLM2": internlm2.make,
    "ChatGLM3": partial(chatglm.make, rope_ratio=None),
    "ChatGLM3 32k": partial(chatglm.make, rope_ratio=50),
    "Gemma 2": lambda d: of_transformers("Gemma2", d, **GEMMA, attn_logit_softcapping=5.0),
    "Gemma 3": lambda d: of_transformers(
        "Gemma3Text",
        d,
        **GEMMA,
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
