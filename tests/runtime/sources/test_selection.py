"""Which files of the families' repositories are fetched: all that is read, and no model twice."""

from __future__ import annotations

import json

import pytest

from runtime.weights.sources.selection import is_small, is_weight_candidate, weight_files

_CODE = ["README.md", "LICENSE", ".gitattributes", "modeling_x.py", "tokenization_x.py", "configuration_x.py"]
_CONFIG = ["config.json", "generation_config.json", "tokenizer_config.json"]


def shards(stem: str, count: int, suffix: str) -> list[str]:
    return [f"{stem}-{place:05}-of-{count:05}.{suffix}" for place in range(1, count + 1)]


# What lies in each repository: (small files to fetch, weights to fetch, what is left there).
REPOSITORIES = {
    "Qwen-14B-Chat": (
        [*_CONFIG, "qwen.tiktoken", "model.safetensors.index.json"],
        shards("model", 15, "safetensors"),
        [*_CODE, "cache_autogptq_cuda_kernel_256.cu", "assets/logo.jpg", "examples/react_prompt.md"],
    ),
    "Baichuan-13B-Chat": (
        [*_CONFIG, "tokenizer.model", "special_tokens_map.json"],
        shards("pytorch_model", 3, "bin"),
        [*_CODE, "handler.py", "requirements.txt", "pytorch_model.bin.index.json"],
    ),
    "Meta-Llama-3-8B-Instruct": (
        [*_CONFIG, "tokenizer.json", "special_tokens_map.json", "model.safetensors.index.json"],
        shards("model", 4, "safetensors"),
        [*_CODE, "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model"],
    ),
    "Llama-2-7b-chat-hf": (
        [*_CONFIG, "tokenizer.json", "tokenizer.model", "model.safetensors.index.json"],
        shards("model", 2, "safetensors"),
        [*_CODE, *shards("pytorch_model", 2, "bin"), "pytorch_model.bin.index.json"],
    ),
    "Mistral-7B-Instruct-v0.3": (
        [*_CONFIG, "tokenizer.json", "tokenizer.model", "tokenizer.model.v3", "model.safetensors.index.json"],
        shards("model", 3, "safetensors"),
        [*_CODE, "consolidated.safetensors", "params.json"],
    ),
    "chatglm3-6b": (
        [*_CONFIG, "tokenizer.model", "special_tokens_map.json", "model.safetensors.index.json"],
        shards("model", 7, "safetensors"),
        [*_CODE, *shards("pytorch_model", 7, "bin"), "pytorch_model.bin.index.json", "MODEL_LICENSE"],
    ),
    "Qwen1.5-7B-Chat-GPTQ-Int4": (
        [*_CONFIG, "tokenizer.json", "vocab.json", "merges.txt", "quantize_config.json"],
        ["model.safetensors"],
        _CODE,
    ),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_what_is_fetched(name: str) -> None:
    small, weights, left = REPOSITORIES[name]
    files = [*small, *weights, *left]
    assert {file for file in files if is_small(file)} == set(small)
    index = None
    if "model.safetensors.index.json" in small:
        index = json.dumps({"weight_map": {f"tensor.{shard}": shard for shard in weights}}).encode()
    in_folder = [file for file in files if is_small(file) or is_weight_candidate(file)]
    assert set(weight_files(in_folder, index, name)) == set(weights)
