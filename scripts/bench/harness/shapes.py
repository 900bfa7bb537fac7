"""What config.json says of the models that the catalogue lists, as far as their shapes go."""

from __future__ import annotations

from typing import Any

Config = dict[str, Any]


def _sized(base: Config, hidden: int, inner: int, layers: int, heads: int, kv: int, **more: Any) -> Config:
    return base | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        **more,
    }


def _gptq(bits: int) -> Config:
    return {
        "quantization_config": {
            "quant_method": "gptq", "bits": bits, "group_size": 128, "desc_act": False, "sym": True,
        },
        "torch_dtype": "float16",
    }  # fmt: skip


_BF16: Config = {"torch_dtype": "bfloat16", "tie_word_embeddings": False}
_LLAMA = _BF16 | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "head_dim": 128,
}
LLAMA_2 = _LLAMA | {"vocab_size": 32000, "rope_theta": 10000.0, "max_position_embeddings": 4096}
LLAMA_3 = _LLAMA | {"vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 8192}
QWEN_2 = _BF16 | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
_QWEN = _BF16 | {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 152064,
    "kv_channels": 128,
    "max_position_embeddings": 8192,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "layer_norm_epsilon": 1e-6,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "scale_attn_weights": True,
}
_BAICHUAN = _BF16 | {
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
}
_GEMMA_2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
_CHATGLM_3: Config = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "num_layers": 28,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 128,
    "ffn_hidden_size": 13696,
    "padded_vocab_size": 65024,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "original_rope": True,
    "post_layer_norm": True,
    "apply_residual_connection_post_layernorm": False,
    "torch_dtype": "float16",
}
_QWEN_7B = _sized(_QWEN, 4096, 22016, 32, 32, 32, vocab_size=151936, seq_length=8192)
_QWEN_32B = _sized(QWEN_2, 5120, 27648, 64, 40, 8)
_MISTRAL = LLAMA_2 | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
_INTERNLM_2 = _LLAMA | {
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "vocab_size": 92544,
    "bias": False,
    "rope_theta": 50000000,
    "rope_scaling": {"type": "dynamic", "factor": 2.5},
    "max_position_embeddings": 32768,
}

# By the ids of models.yaml.
SHAPES: dict[str, Config] = {
    "Qwen/Qwen-7B": _QWEN_7B,
    "Qwen/Qwen-7B-Chat": _QWEN_7B,
    "Qwen/Qwen-14B-Chat": _sized(_QWEN, 5120, 27392, 40, 40, 40, seq_length=2048),
    "Qwen/Qwen-72B-Chat": _sized(
        _QWEN, 8192, 49152, 80, 64, 64, seq_length=32768, max_position_embeddings=32768,
        rotary_emb_base=1000000, use_dynamic_ntk=False, use_logn_attn=False,
    ),
    "Qwen/Qwen1.5-7B-Chat-GPTQ-Int4": _sized(
        QWEN_2, 4096, 11008, 32, 32, 32, vocab_size=151936, **_gptq(4)
    ),
    "Qwen/Qwen2-72B-Instruct": _sized(QWEN_2, 8192, 29568, 80, 64, 8),
    "Qwen/Qwen2.5-32B-Instruct-GPTQ-Int8": _QWEN_32B | _gptq(8),
    "Qwen/Qwen2.5-32B-Instruct-GPTQ-Int4": _QWEN_32B | _gptq(4),
    "baichuan-inc/Baichuan-13B-Chat": _sized(
        _BAICHUAN, 5120, 13696, 40, 40, 40, vocab_size=64000, model_max_length=4096
    ),
    "baichuan-inc/Baichuan2-13B-Chat": _sized(
        _BAICHUAN, 5120, 13696, 40, 40, 40, vocab_size=125696, model_max_length=4096
    ),
    "baichuan-inc/Baichuan2-7B-Chat": _sized(
        _BAICHUAN, 4096, 11008, 32, 32, 32, vocab_size=125696, max_position_embeddings=4096
    ),
    "meta-llama/Llama-2-7b-chat-hf": _sized(LLAMA_2, 4096, 11008, 32, 32, 32),
    "meta-llama/Meta-Llama-3-8B-Instruct": _sized(LLAMA_3, 4096, 14336, 32, 32, 8),
    "meta-llama/Meta-Llama-3-70B-Instruct": _sized(LLAMA_3, 8192, 28672, 80, 64, 8),
    "01-ai/Yi-6B-Chat": _sized(
        LLAMA_2 | {"vocab_size": 64000, "rope_theta": 5000000.0}, 4096, 11008, 32, 32, 4
    ),
    "internlm/internlm2_5-20b-chat": _sized(_INTERNLM_2, 6144, 16384, 48, 48, 8),
    "google/gemma-2-27b-it": _sized(
        _GEMMA_2, 4608, 36864, 46, 32, 16, head_dim=128, query_pre_attn_scalar=144
    ),
    "google/gemma-2-9b-it": _sized(
        _GEMMA_2, 3584, 14336, 42, 16, 8, head_dim=256, query_pre_attn_scalar=256
    ),
    "THUDM/chatglm3-6b": _CHATGLM_3 | {"seq_length": 8192},
    "THUDM/chatglm3-6b-32k": _CHATGLM_3 | {"seq_length": 32768, "rope_ratio": 50},
    "mistralai/Mistral-7B-Instruct-v0.3": _sized(
        _MISTRAL | {"vocab_size": 32768, "rope_theta": 1000000.0, "max_position_embeddings": 32768},
        4096, 14336, 32, 32, 8, sliding_window=None,
    ),
}  # fmt: skip
