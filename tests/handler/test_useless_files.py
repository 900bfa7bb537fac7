"""A model whose small files are no use ends the start with the reason; there is no server without answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.handler.serving import served, until


@pytest.mark.parametrize(
    ("missing", "flags", "said"),
    [
        ("tokenizer.json", (), "no tokenizer in a supported format"),
        (None, ("--chat-template", "{{ messages"), "line 1: unexpected end of template"),
    ],
)
def test_the_server_ends_and_says_why(
    tiny_model: Path, tmp_path: Path, missing: str | None, flags: tuple[str, ...], said: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    if missing is not None:
        (model / missing).unlink()
    with served("--model", str(model), "--device", "cpu", *flags) as server:
        assert server.wait() == 1
    assert said in server.log
    assert "Traceback" not in server.log


def test_a_stop_token_that_the_model_does_not_have_is_a_mistake_of_the_catalogue(
    tiny_model: Path, tmp_path: Path
) -> None:
    entry = f"models: {{m: {{source: {tiny_model}, stop_token_ids: [264]}}}}"
    (tmp_path / "models.yaml").write_text(entry)
    with served("--catalogue", str(tmp_path / "models.yaml"), "--model", "m", "--device", "cpu") as server:
        assert server.wait() == 1
    assert "stop_token_ids holds 264; this model's ids end at 263" in server.log


def test_an_end_that_the_model_cannot_generate_is_none(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [258, 50256]}))
    with served("--model", str(model), "--device", "cpu") as server:
        connection = server.post("/v1/completions", prompt="Hi", max_tokens=1)
        assert connection.getresponse().status == 200
        connection.close()


def test_of_several_models_only_its_own_requests_are_told(tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    (model / "tokenizer.json").unlink()
    flags = ("--model", str(tiny_model), "--models", str(model), "--device", "cpu")
    with served(*flags) as server:
        until(lambda: server.get("/status")["state"] == "warm")

        def ask(name: Path) -> tuple[int, str]:
            connection = server.post("/v1/completions", model=str(name), prompt="Hi", max_tokens=1)
            response = connection.getresponse()
            answer = response.status, json.dumps(json.loads(response.read()))
            connection.close()
            return answer

        for _ in range(2):
            status, answer = ask(model)
            assert status == 503
            assert "no tokenizer in a supported format" in answer
            assert ask(tiny_model)[0] == 200
