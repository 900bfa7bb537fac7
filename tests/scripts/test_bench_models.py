"""Checkpoints of random weights are what transformers and tokenizers take for a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from harness import BenchError, random_tokenizer
from harness.answers import find
from harness.random_weights import bfloat16_block, write_checkpoint
from make_model import SHAPES, make, shards, tensor_shapes
from tokenizers import Tokenizer, pre_tokenizers


def test_transformers_loads_it_and_nothing_is_missing(small_model: Path) -> None:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(small_model, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert float(model.model.layers[0].mlp.up_proj.weight.detach().float().std()) == pytest.approx(
        0.02, rel=0.02
    )
    weights = model.lm_head.weight.detach().float()
    assert len(torch.unique(weights, dim=0)) == len(weights), "equal rows would be ties"


def test_every_id_is_text_and_every_text_has_ids(small_model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(small_model / "tokenizer.json"))
    size = SHAPES["small"]["vocab_size"]
    assert tokenizer.get_vocab_size() == size
    text = "Any text at all: äöü €, 12 34\n\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    # Beyond the single bytes every token is readable by itself.
    assert all(tokenizer.decode([index]).isascii() for index in range(256, size - 2))
    assert tokenizer.encode("the thing").ids != tokenizer.encode("the think").ids


def test_byte_symbols_are_gpt2s() -> None:
    symbols = random_tokenizer.byte_symbols()
    assert sorted(symbols) == sorted(pre_tokenizers.ByteLevel.alphabet())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(map(chr, range(0x7FF)))
    assert whole.pre_tokenize_str(text)[0][0] == "".join(symbols[byte] for byte in text.encode())


def test_references_are_what_transformers_generates(small_model: Path) -> None:
    found = find(small_model)
    model = transformers.AutoModelForCausalLM.from_pretrained(small_model, dtype=torch.float32)
    for known in (found.explain, found.count):
        prompt = torch.tensor([known.prompt_token_ids])
        certain = known.certain()
        generated = model.generate(
            prompt, do_sample=False, max_new_tokens=certain, eos_token_id=None, pad_token_id=0
        )
        assert certain >= 4, "an answer full of ties would prove nothing"
        assert generated[0, prompt.shape[1] :].tolist() == known.token_ids[:certain]
        text = Tokenizer.from_file(str(small_model / "tokenizer.json")).decode(known.token_ids[:certain])
        assert "".join(known.pieces[:certain]) == text
    assert len(found.count.prompt_token_ids) == 128


def test_a_folder_that_holds_something_is_left_alone(small_model: Path) -> None:
    with pytest.raises(BenchError, match="not empty"):
        make("small", small_model, None)


def test_names_of_qwens_biases(tmp_path: Path) -> None:
    config = SHAPES["qwen2.5-7b"] | {"num_hidden_layers": 1, "vocab_size": 300, "intermediate_size": 64}
    config |= {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen2Config(**config))
    shapes = {name: shape for group in tensor_shapes(config) for name, shape in group.items()}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def test_the_real_sizes() -> None:
    sizes = {
        name: sum(int(np.prod(shape)) for group in tensor_shapes(config) for shape in group.values())
        for name, config in SHAPES.items()
    }
    assert sizes["llama-3-8b"] == 8_030_261_248
    assert sizes["llama-3-70b"] == 70_553_706_496
    assert sizes["qwen2.5-32b"] == 32_763_876_352


def test_files_hold_all_tensors_once() -> None:
    groups = tensor_shapes(SHAPES["llama-3-8b"])
    files = shards(groups)
    assert sum(map(len, files)) == sum(map(len, groups))
    assert len({name for file in files for name in file}) == sum(map(len, files))
    assert all(sum(2 * int(np.prod(shape)) for shape in file.values()) <= 4 << 30 for file in files)


def test_rounded_as_torch_rounds() -> None:
    numbers = np.random.default_rng(0).standard_normal(16_777_213, dtype=np.float32) * 0.02
    reference = torch.from_numpy(numbers).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(bfloat16_block(), reference)


def test_tensors_larger_than_the_block(tmp_path: Path) -> None:
    size = write_checkpoint(tmp_path, [{"a.weight": (16_777_213 * 2 + 5,)}])
    assert size == 2 * (16_777_213 * 2 + 5)
    with open(tmp_path / "model-00001-of-00001.safetensors", "rb") as file:
        header = int.from_bytes(file.read(8), "little")
        assert file.seek(0, 2) == 8 + header + size
