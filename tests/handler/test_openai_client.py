"""What a program sees that talks to the server through OpenAI's own client."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import openai
import pytest

from tests.handler.conftest import GREETING, MODEL, Server

MESSAGES = [{"role": "user", "content": "Hi"}]


def client_of(server: Server, **options: object) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, **options})


def test_chat(server: Server) -> None:
    answer = client_of(server).chat.completions.create(model=MODEL, messages=MESSAGES)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        GREETING,
        "stop",
    )
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    usage = answer.usage
    assert usage is not None
    # One id for each byte of the rendered prompt but its three special tokens, one for each of the answer
    # and one for its end.
    rendered = "user\nHi\nassistant\n"
    assert usage.prompt_tokens == len(rendered) + 3
    assert usage.completion_tokens == len(GREETING) + 1
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 16


def test_chat_streamed(server: Server) -> None:
    stream = client_of(server).chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == GREETING
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(GREETING) + 1
    assert len({chunk.id for chunk in chunks}) == 1


def test_streaming_helper_accumulates(server: Server) -> None:
    with client_of(server).chat.completions.stream(model=MODEL, messages=MESSAGES) as stream:
        deltas = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(deltas) == GREETING
    assert final.choices[0].message.content == GREETING


def test_many_at_once_through_the_async_client(make_server: Callable[..., Server]) -> None:
    server = make_server(lambda submit: f"{len(submit.prompt_token_ids)}")

    async def ask(client: openai.AsyncOpenAI, length: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x" * length}], stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, length) for length in range(1, 17)))

    assert asyncio.run(all_of_them()) == [str(len("user\n\nassistant\n") + 3 + n) for n in range(1, 17)]


def test_several_choices_are_told_apart_and_seeded_apart(make_server: Callable[..., Server]) -> None:
    server = make_server(lambda submit: f"seed {submit.sampling.seed}")
    answer = client_of(server).chat.completions.create(model=MODEL, messages=MESSAGES, n=3, seed=7)
    assert [c.message.content for c in answer.choices] == ["seed 7", "seed 8", "seed 9"]
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(server.engine.submitted[0].prompt_token_ids)

    texts = ["", "", ""]
    for chunk in client_of(server).chat.completions.create(
        model=MODEL, messages=MESSAGES, n=3, seed=7, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["seed 7", "seed 8", "seed 9"]


def test_log_probabilities(server: Server) -> None:
    answer = client_of(server).chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=3
    )
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert [entry.token for entry in content] == ["H", "e", "l"]
    assert [entry.bytes for entry in content] == [[72], [101], [108]]
    assert all(math.isclose(entry.logprob, -0.5) for entry in content)
    assert [len(entry.top_logprobs) for entry in content] == [2, 2, 2]


def test_text_completion(server: Server) -> None:
    answer = client_of(server).completions.create(model=MODEL, prompt="Say hello:", max_tokens=5)
    assert answer.choices[0].text == "Hello"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (10, 5)


def test_text_completion_of_several_prompts_streamed(make_server: Callable[..., Server]) -> None:
    server = make_server(lambda submit: f"{submit.prompt_token_ids}")
    texts = ["", "", "", ""]
    for chunk in client_of(server).completions.create(
        model=MODEL, prompt=[[1, 2], [3]], n=2, max_tokens=50, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == ["[1, 2]", "[1, 2]", "[3]", "[3]"]


def test_models(server: Server) -> None:
    client = client_of(server)
    assert [model.id for model in client.models.list()] == [MODEL, "alias"]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError, match="tiny, alias"):
        client.models.retrieve("gpt-5")


def test_errors_arrive_as_the_clients_own_exceptions(make_server: Callable[..., Server]) -> None:
    server = make_server(api_keys=("right",))
    with pytest.raises(openai.AuthenticationError):
        client_of(server).models.list()
    client = client_of(server, api_key="right")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=9)
    assert bad.value.param == "temperature"


def test_a_crash_before_the_first_token_is_a_503_to_retry(make_server: Callable[..., Server]) -> None:
    server = make_server(lambda submit: [])
    with pytest.raises(openai.InternalServerError) as failed:
        stream_and_crash(server)
    assert failed.value.status_code == 503
    assert failed.value.response.headers["retry-after"] == "2"


def test_a_crash_in_the_middle_raises_from_the_stream(make_server: Callable[..., Server]) -> None:
    def never_ending(engine: object) -> None:
        engine.endless = True  # type: ignore[attr-defined]

    server = make_server(prepare=never_ending)
    stream = client_of(server).chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    pieces = []

    def read_and_crash() -> None:
        for chunk in stream:
            pieces.append(chunk.choices[0].delta.content or "")
            if "".join(pieces) == GREETING:
                server.engine.die()

    with pytest.raises(openai.APIError, match="being restarted"):
        read_and_crash()
    assert "".join(pieces) == GREETING


def stream_and_crash(server: Server) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            asking = asyncio.create_task(
                client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            )
            await asyncio.to_thread(server.engine.submit_seen.wait)
            server.engine.die()
            await asking

    asyncio.run(ask())
