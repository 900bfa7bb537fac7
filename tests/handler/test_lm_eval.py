"""The client of lm-evaluation-harness gets the numbers that transformers computes with the same weights.

Its wheel is fetched without what it depends on: the tasks, which are not run here, need half a gigabyte of
packages, the client two small ones.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.handler.serving import Served, served

HARNESS = "lm-eval==0.4.13"
PAIRS = [
    ("The capital of France is", " Paris."),
    ("The capital of France is", " a city"),
    ("2 + 2 =", " 4"),
    ("Über allen Gipfeln", " ist Ruh 🌙"),
    ("x", "y" * 40),
    ("", "Nothing came before this."),
]


@pytest.fixture(scope="module")
def client_class(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("lm-eval")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
        HARNESS,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if done.returncode != 0:
        pytest.skip(f"{HARNESS} cannot be fetched here: {done.stderr.strip()}")
    sys.path.append(str(folder))
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Served]:
    with served("--model", str(tiny_model), "--device", "cpu", "--served-model-name", "tiny") as server:
        yield server


@pytest.fixture(scope="module", params=["huggingface", "auto"])
def harness(request: pytest.FixtureRequest, client_class: Any, server: Served, tiny_model: Path) -> Any:
    """With a tokenizer of its own, or with the server's, which it finds out about."""
    client = client_class(
        model="tiny",
        tokenizer=str(tiny_model) if request.param == "huggingface" else None,
        base_url=f"{server.url}/v1/completions",
        tokenizer_backend=request.param,
        batch_size=4,
        num_concurrent=2,
        max_length=512,
        max_retries=1,
    )
    assert client.tokenizer_backend == ("huggingface" if request.param == "huggingface" else "remote")
    return client


class Reference:
    """The same with transformers, one sequence at a time, in float32."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """The log-likelihood of a continuation, and whether it is what greedy decoding gives."""
        with torch.inference_mode():
            logits = self.model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        scores = torch.log_softmax(logits.double(), -1)
        wanted = torch.tensor(continuation)
        total = scores.gather(1, wanted[:, None]).sum().item()
        return total, bool((logits.argmax(-1) == wanted).all())


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Reference:
    return Reference(tiny_model)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    """What the harness hands to a model, as far as the model looks at it."""
    return [
        SimpleNamespace(args=args, task_name="test", doc_id=place) for place, args in enumerate(arguments)
    ]


def test_log_likelihoods(harness: Any, reference: Reference) -> None:
    found = harness.loglikelihood(requests(*PAIRS))
    for (context, continuation), (total, greedy) in zip(PAIRS, found, strict=True):
        ids = reference.tokenizer(context)["input_ids"] or [harness.prefix_token_id]
        expected, expected_greedy = reference.score(ids, reference.tokenizer(continuation)["input_ids"])
        assert total == pytest.approx(expected, rel=1e-3)
        assert greedy == expected_greedy


def test_what_greedy_decoding_gives_is_told_apart(harness: Any, reference: Reference) -> None:
    context = reference.tokenizer("Once upon a time")["input_ids"]
    with torch.inference_mode():
        best = reference.model(torch.tensor([context])).logits[0, -1].topk(2).indices.tolist()
    tokenized = [(("Once upon a time", ""), context, [token]) for token in best]
    found = harness._loglikelihood_tokens(tokenized)
    assert [greedy for _, greedy in found] == [True, False]


def test_rolling_log_likelihood(harness: Any, reference: Reference) -> None:
    text = "All happy families are alike; each unhappy family is unhappy in its own way."
    (total,) = harness.loglikelihood_rolling(requests((text,)))
    expected, _ = reference.score([harness.prefix_token_id], reference.tokenizer(text)["input_ids"])
    assert total == pytest.approx(expected, rel=1e-3)


def test_greedy_texts(harness: Any, reference: Reference) -> None:
    context = "Once upon a time"
    (text,) = harness.generate_until(requests((context, {"until": [], "max_gen_toks": 12})))
    ids = torch.tensor([reference.tokenizer(context)["input_ids"]])
    made = reference.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert text == reference.tokenizer.decode(made, skip_special_tokens=True)
