"""Base URLs as people configure them: what can be meant is served, and what cannot is told what was meant."""

from __future__ import annotations

import openai
import pytest

from tests.handler.conftest import GREETING, MODEL, Server

HI = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    "path", ["/v1/chat/completions/", "//v1/chat/completions", "/v1//chat/completions//"]
)
def test_a_slash_too_many_changes_nothing(server: Server, path: str) -> None:
    reply = server.post(path, HI)
    assert reply.status == 200
    assert reply.json["choices"][0]["message"]["content"] == GREETING


def test_the_list_of_models_with_a_slash_behind_it(server: Server) -> None:
    assert server.get("/v1/models/").json == server.get("/v1/models").json
    assert server.get(f"/v1/models/{MODEL}/").json["id"] == MODEL


def test_the_openai_client_with_a_slash_behind_its_base(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1/", api_key="x") as client:
        assert MODEL in [model.id for model in client.models.list()]


@pytest.mark.parametrize("base", ["", "/v1/v1", "/openai", "/v1/engines/x"])
def test_another_base_is_told_the_right_one(server: Server, base: str) -> None:
    with openai.OpenAI(base_url=f"{server.url}{base}", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match=r"did you mean /v1/chat/completions\?.*ends with /v1"):
            client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Hi"}])
        with pytest.raises(openai.NotFoundError, match=r"did you mean /v1/completions\?"):
            client.completions.create(model=MODEL, prompt="Hi")


def test_another_api_is_told_where_this_one_is(server: Server) -> None:
    error = server.post("/api/chat", HI).error
    assert "nothing at /api/chat; OpenAI's API is below /v1" in error["message"]


def test_keys_are_asked_for_on_such_paths_as_on_the_plain_ones(make_server: object) -> None:
    server: Server = make_server(api_keys=("k",))  # type: ignore[operator]
    assert server.get("/v1/models/").status == 401
    assert server.get("//v1/models").status == 401
    assert server.get("/health/live/").status == 401
    assert server.get("/v1/models/", {"Authorization": "Bearer k"}).status == 200
