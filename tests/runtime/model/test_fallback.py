"""Models without a family: transformers' own class computes, over the paged cache, what it computes alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime.errors import FirstlightError
from tests.runtime.engine.test_against_transformers import make_engine
from tests.runtime.model.checkpoints import of_transformers
from tests.runtime.model.test_families import PROMPTS, answers_of, check

SERVED: dict[str, dict[str, Any]] = {
    # Learned positions, and other names for everything.
    "GPT2": {"n_positions": 160, "n_embd": 48, "n_layer": 2, "n_head": 4},
    "Starcoder2": {"sliding_window": 9},
    "Cohere": {"logit_scale": 0.5},
    # Experts.
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    # Values narrower than keys.
    "DeepseekV3": {
        "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
        "v_head_dim": 12, "num_key_value_heads": 6, "head_dim": None, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SERVED)
def test_answers_are_those_of_the_class_alone(name: str, tmp_path: Path) -> None:
    reference = of_transformers(name, tmp_path, **SERVED[name])
    engine = make_engine(tmp_path, max_num_batched_tokens=11)
    for _ in range(2):
        answers = answers_of(engine, *PROMPTS)
        assert answers[0].keys() == PROMPTS.keys()
        check(reference, answers)
    assert engine.stats.cached_tokens_total > 0


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("GptOss", {"num_local_experts": 4}, "attends in a way that the paged cache does not know"),
        ("Bert", {"is_decoder": False}, "attends in a way that the paged cache does not know"),
        ("Mamba", {"state_size": 8}, "it keeps a state beside keys and values (linear_attention)"),
        ("Bloom", {"n_layer": 2, "n_head": 4}, "does not let attention be plugged in"),
        ("Bart", {"d_model": 48}, "does not let attention be plugged in"),
    ],
)
def test_what_the_paged_cache_cannot_serve_is_refused(
    name: str, settings: dict[str, Any], says: str, tmp_path: Path
) -> None:
    of_transformers(name, tmp_path, **settings)
    with pytest.raises(FirstlightError) as caught:
        make_engine(tmp_path)
    assert says in str(caught.value)
    assert f"{tmp_path}/config.json" in str(caught.value)


def test_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    of_transformers("Llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for architecture in ("GrandioseForCausalLM", "T5ForConditionalGeneration"):
        (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
        with pytest.raises(
            FirstlightError, match=f"'{architecture}' is neither one of this runtime's own nor"
        ):
            make_engine(tmp_path)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    """An architecture's name may be known, and its config still ask for code of its own."""
    of_transformers("GPT2", tmp_path, **SERVED["GPT2"])
    config = json.loads((tmp_path / "config.json").read_text())
    ran = tmp_path / "ran"
    (tmp_path / "modeling_own.py").write_text(
        f"open({str(ran)!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    make_engine(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": own, "model_type": "own"}))
    with pytest.raises(FirstlightError, match="code that comes with a model is never run"):
        make_engine(tmp_path)
    assert not ran.exists()


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    of_transformers("GPT2", tmp_path, **SERVED["GPT2"])
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.ln_2.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FirstlightError, match=r"lacks weights .* transformer\.h\.1\.ln_2\.weight"):
        make_engine(tmp_path)
