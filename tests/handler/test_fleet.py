"""Several models in one server: the genuine engines, told apart by what they say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.conftest import write_llama
from tests.handler.serving import Served, served, until

NAMES = ("first", "second", "third")


@pytest.fixture(scope="module")
def catalogue(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet")
    for seed, name in enumerate(NAMES):
        shutil.copytree(tiny_model, folder / name)
        write_llama(folder / name, seed=seed + 1)
    shutil.copytree(tiny_model, folder / "late")
    (folder / "late" / "model.safetensors").unlink()
    entries: dict[str, Any] = {name: {"source": f"./{name}"} for name in (*NAMES, "late")}
    file = folder / "models.yaml"
    file.write_text(yaml.safe_dump({"default": "first", "models": entries}, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def server(catalogue: Path) -> Iterator[Served]:
    flags = ("--catalogue", str(catalogue), "--models", "all", "--device", "cpu", "--max-loaded-models", "2")
    with served(*flags) as running:
        until(lambda: running.get("/status")["state"] == "warm")
        yield running


@pytest.fixture(scope="module")
def answers(server: Served) -> dict[str, str]:
    """What each model says; they are asked one after the other."""
    found = {name: complete(server, name) for name in NAMES}
    assert len(set(found.values())) == len(NAMES)
    return found


def complete(server: Served, model: str | None, **fields: Any) -> str:
    body = {"prompt": "There was", "max_tokens": 12, "temperature": 0, **fields}
    if model is not None:
        body["model"] = model
    status, answer = call(server, "/v1/completions", **body)
    assert status == 200, answer
    assert answer["model"] == (model or "first")
    text: str = answer["choices"][0]["text"]
    return text


def call(server: Served, path: str, **body: Any) -> tuple[int, Any]:
    connection = server.post(path, **body)
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def states(server: Served) -> dict[str, str]:
    models = server.get("/status")["models"]
    return {name: models[name]["state"] for name in NAMES}


def test_each_is_loaded_when_it_is_asked_for_and_the_longest_unused_makes_room(
    server: Served, answers: dict[str, str]
) -> None:
    assert states(server) == {"first": "cold", "second": "asleep", "third": "warm"}
    until(lambda: len(psutil.Process(server.process.pid).children()) == 2)
    assert complete(server, "second") == answers["second"]
    assert states(server) == {"first": "cold", "second": "warm", "third": "asleep"}
    assert complete(server, None) == answers["first"]
    assert states(server) == {"first": "warm", "second": "asleep", "third": "cold"}


def test_all_at_once_each_gets_its_own_answer(server: Served, answers: dict[str, str]) -> None:
    order = [NAMES[number % 3] for number in range(24)]
    with ThreadPoolExecutor(24) as pool:
        told = list(pool.map(lambda name: complete(server, name), order))
    assert told == [answers[name] for name in order]
    assert list(states(server).values()).count("warm") == 1


def test_they_are_listed_and_no_others_are_known(server: Served) -> None:
    listed = server.get("/v1/models")["data"]
    assert [model["id"] for model in listed] == [*NAMES, "late"]
    assert server.get("/v1/models/third")["id"] == "third"
    for path in ("/v1/completions", "/tokenize", "/v1/chat/completions", "/sleep"):
        status, answer = call(server, path, model="fourth", prompt="x", messages=[])
        assert status in (400, 404)
        if path != "/sleep":
            assert "first, second, third" in answer["error"]["message"]


def test_one_can_be_sent_to_sleep_and_woken_by_name(server: Served, answers: dict[str, str]) -> None:
    assert complete(server, "second") == answers["second"]
    assert call(server, "/sleep", model="second", level=2)[1]["state"] == "asleep"
    assert call(server, "/wake", model="third")[1]["state"] == "warm"
    assert states(server)["second"] == "asleep"
    assert complete(server, "second") == answers["second"]
    assert call(server, "/sleep")[0] == 200
    assert "warm" not in states(server).values()
    assert complete(server, "second") == answers["second"]


def test_one_that_cannot_start_costs_nobody_else_anything_and_may_be_mended(
    server: Served, catalogue: Path, answers: dict[str, str]
) -> None:
    for _ in range(2):
        status, answer = call(server, "/v1/completions", model="late", prompt="There was")
        assert (status, "safetensors" in answer["error"]["message"]) == (503, True)
    assert complete(server, "first") == answers["first"]
    write_llama(catalogue.parent / "late", seed=9)
    assert complete(server, "late") not in answers.values()


def test_what_is_counted_is_told_by_model(server: Served, answers: dict[str, str]) -> None:
    connection = server.connect()
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    for name in NAMES:
        assert f'firstlight_state{{model_name="{name}",state="failed"}} 0.0' in text
        assert f'vllm:generation_tokens_total{{engine="0",model_name="{name}"}}' in text
    assert text.count("# TYPE firstlight_state ") == 1


def test_a_mistaken_body_is_told_as_by_one_model(server: Served) -> None:
    connection = server.connect()
    connection.request("POST", "/v1/completions", b"{nonsense")
    response = connection.getresponse()
    assert (response.status, json.loads(response.read())["error"]["code"]) == (400, "invalid_json")
    connection.close()
    assert call(server, "/v1/completions", model=7, prompt="x")[0] == 400


def test_names_that_two_models_would_have_are_refused(catalogue: Path) -> None:
    flags = ("--catalogue", str(catalogue), "--models", "second", "--served-model-name", "second")
    with served(*flags) as server:
        assert server.wait() == 1
        assert "two models are named second" in server.log
