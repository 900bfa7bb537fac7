"""From nothing to a streamed answer: the default model, served as it comes, asked by OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.handler.serving import Served, served, until

pytestmark = pytest.mark.slow
QUESTION: list[Any] = [{"role": "user", "content": "Explain in two sentences what a hash table is."}]
MARKS = {"listen", "plan", "torch", "first_byte", "last_byte", "ready", "first_token"}


@pytest.fixture(scope="module")
def server(default_model: Path) -> Iterator[Served]:
    with served() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_the_answer_makes_sense_whole_and_streamed(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    whole = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=120)
    text = whole.choices[0].message.content
    assert text is not None
    assert "data structure" in text
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(
        client.chat.completions.create(
            model=model,
            messages=QUESTION,
            temperature=0,
            max_tokens=120,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert len(chunks) > 20
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_start_left_its_marks(client: openai.OpenAI, server: Served) -> None:
    client.completions.create(model=client.models.list().data[0].id, prompt="Once", max_tokens=1)
    status = until(lambda: (s := server.get("/status"))["marks"].keys() >= MARKS and s)
    marks = status["marks"]
    assert marks["listen"] < marks["plan"] < marks["ready"] <= marks["first_token"]
    assert marks["first_byte"] <= marks["last_byte"] <= marks["ready"]
    assert status["counters"]["bytes_read"] >= status["memory"]["weight_bytes"] > 200_000_000
    assert '{"event": "start", "marks": {"listen": ' in server.log
