"""The default model's greedy tokens are those of transformers in float32, however they are computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from runtime.text.tokenizer import Tokenizer
from tests.runtime.engine.test_against_transformers import differences, make_engine, run, submit

TEXTS = (
    "<|im_start|>user\nExplain in two sentences what a hash table is.<|im_end|>\n<|im_start|>assistant\n",
    "The first ten prime numbers are 2, 3, 5,",
    "def fibonacci(n: int) -> int:\n",
    "Once upon a time, in a village by the sea, there lived a fisherman who",
)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers(default_model: Path) -> None:
    from transformers import LlamaForCausalLM

    tokenizer = Tokenizer.load(default_model)
    prompts = {f"r{n}": tokenizer.encode(text) for n, text in enumerate(TEXTS)}
    model = LlamaForCausalLM.from_pretrained(default_model, dtype=torch.float32).eval()
    engine = make_engine(
        default_model, max_model_len=512, max_num_batched_tokens=16, kv_cache_bytes=256 << 20
    )
    for name, prompt in prompts.items():
        submit(engine, name, prompt)
        assert differences(model, {name: prompt}, run(engine)[0]) == {}
    for name, prompt in prompts.items():
        submit(engine, name, prompt)
    assert differences(model, prompts, run(engine)[0]) == {}
    assert engine.stats.cached_tokens_total > 0
