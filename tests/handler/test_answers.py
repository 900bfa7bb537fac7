"""The answers byte by byte: fields, streams, stops, and what the engine is asked for."""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from runtime.protocol import Submit, TokenDelta
from tests.handler.conftest import GREETING, MODEL, Reply, Server
from tests.handler.fake_engine import EOS


def test_chat_has_the_fields_that_clients_of_vllm_read(server: Server) -> None:
    answer = server.chat(max_tokens=200).json
    assert answer["id"].startswith("chatcmpl-")
    assert isinstance(answer["created"], int)
    assert answer["prompt_logprobs"] is None
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": GREETING,
        "refusal": None,
        "reasoning_content": None,
        "tool_calls": [],
    }
    assert {**choice, "message": None} == {
        "index": 0,
        "message": None,
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }


def test_stream_format(server: Server) -> None:
    reply = server.chat(stream=True)
    assert reply.status == 200
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert reply.headers["cache-control"] == "no-cache"
    first, *middle, last = reply.events
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in middle) == GREETING
    assert all(event["choices"][0]["finish_reason"] is None for event in middle)
    assert last["choices"][0] | {"index": 0} == {
        "index": 0,
        "delta": {"content": ""},
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    assert "usage" not in last


def test_a_client_of_http_1_0_gets_its_stream_without_chunks(server: Server) -> None:
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "stream": true}'
    head = b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n" % len(body)
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as sock,
        sock.makefile("rb") as lines,
    ):
        sock.sendall(head + body)
        answer_head, _, rest = lines.read().partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in answer_head.lower()
    assert "".join(said(event) for event in Reply(200, {}, rest).events) == GREETING


def test_whoever_reads_late_still_gets_everything(make_server: Callable[..., Server]) -> None:
    server = make_server(GREETING * 20)
    sock = server.open_stream(n=64)
    sock.settimeout(30)
    # More than the kernel keeps: the rest has to wait in the server until somebody reads.
    time.sleep(0.5)
    with sock, http.client.HTTPResponse(sock) as response:
        response.begin()
        events = Reply(200, {}, response.read()).events
    texts = [""] * 64
    for event in events:
        texts[event["choices"][0]["index"]] += said(event)
    assert texts == [GREETING * 20] * 64


def said(event: dict[str, Any]) -> str:
    """What one event of a chat adds to the text."""
    return str(event["choices"][0]["delta"].get("content", ""))


def test_usage_in_every_event(server: Server) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = server.chat(stream=True, stream_options=options).events
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == len(GREETING) + 1


def test_tokens_of_one_step_share_an_event(make_server: Callable[..., Server]) -> None:
    def two_steps(submit: Submit) -> list[TokenDelta]:
        ids = [server.engine.tokenizer.encode(part) for part in ("Good ", "morning")]
        return [
            TokenDelta(request_id=submit.request_id, token_ids=ids[0]),
            TokenDelta(request_id=submit.request_id, token_ids=ids[1], finish_reason="length"),
        ]

    server = make_server(two_steps)
    pieces = [event["choices"][0]["delta"].get("content") for event in server.chat(stream=True).events]
    assert [piece for piece in pieces if piece] in (["Good ", "morning"], ["Good morning"])


def test_characters_never_break(make_server: Callable[..., Server]) -> None:
    text = "naïve 😀 日本"  # every byte is a token of its own
    server = make_server(text)
    events = server.chat(stream=True).events
    pieces = [event["choices"][0]["delta"].get("content", "") for event in events]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "text", "reason"),
    [
        ({"stop": "there"}, "Hello ", "there"),
        ({"stop": ["zzz", "lo t"]}, "Hel", "lo t"),
        ({"stop": "there", "include_stop_str_in_output": True}, "Hello there", "there"),
        ({"stop": "there", "min_tokens": 11}, GREETING, None),
        ({"stop": "friend?"}, GREETING, None),
    ],
)
def test_stop_strings(
    server: Server, stream: bool, fields: dict[str, Any], text: str, reason: str | None
) -> None:
    reply = server.chat(stream=stream, **fields)
    if stream:
        choices = [event["choices"][0] for event in reply.events]
        said = "".join(choice["delta"].get("content", "") for choice in choices)
        end = choices[-1]
    else:
        end = reply.json["choices"][0]
        said = end["message"]["content"]
    assert (said, end["finish_reason"], end["stop_reason"]) == (text, "stop", reason)


def test_a_stop_string_ends_the_engines_work_and_the_count(make_server: Callable[..., Server]) -> None:
    def never_ending(engine: Any) -> None:
        engine.endless = True

    server = make_server(prepare=never_ending)
    answer = server.chat(stop=["there"]).json
    assert answer["usage"]["completion_tokens"] == len("Hello there")
    assert server.engine.aborted == [server.engine.submitted[0].request_id]


def test_stop_token_ids_are_named_and_end_of_sequence_is_not(make_server: Callable[..., Server]) -> None:
    def reply(submit: Submit) -> list[TokenDelta]:
        stop = 33 if 33 in submit.sampling.stop_token_ids else EOS
        return [TokenDelta(request_id=submit.request_id, finish_reason="stop", stop_token_id=stop)]

    server = make_server(reply)
    assert server.chat(stop_token_ids=[33]).json["choices"][0]["stop_reason"] == 33
    assert server.chat().json["choices"][0]["stop_reason"] is None


def test_ignore_eos_leaves_only_the_requests_own_stops(server: Server) -> None:
    server.chat(ignore_eos=True, stop_token_ids=[5], max_tokens=4)
    assert server.engine.submitted[-1].sampling.stop_token_ids == (5,)
    server.chat(stop_token_ids=[5], max_tokens=4)
    assert set(server.engine.submitted[-1].sampling.stop_token_ids) == {5, EOS}


def test_special_tokens_show_when_asked_for(make_server: Callable[..., Server]) -> None:
    def reply(submit: Submit) -> list[TokenDelta]:
        return [TokenDelta(request_id=submit.request_id, token_ids=[257, 39], finish_reason="length")]

    server = make_server(reply)
    shown = server.complete(skip_special_tokens=False).json["choices"][0]["text"]
    hidden = server.complete().json["choices"][0]["text"]
    assert shown == "<|im_start|>" + hidden


class TestSampling:
    def submitted(self, server: Server) -> Any:
        return server.engine.submitted[-1].sampling

    def test_everything_arrives(self, server: Server) -> None:
        fields = {
            "max_tokens": 9,
            "min_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "presence_penalty": 0.2,
            "frequency_penalty": -0.3,
            "seed": 42,
            "logprobs": 3,
            "prompt_logprobs": 2,
        }
        assert server.complete(**fields, logit_bias={"7": -100, "8": 1.5}).status == 200
        sampling = self.submitted(server)
        assert {name: getattr(sampling, name) for name in fields} == fields
        assert sampling.logit_bias == {7: -100.0, 8: 1.5}

    def test_openai_defaults(self, server: Server) -> None:
        server.complete()
        sampling = self.submitted(server)
        assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (
            16,
            1.0,
            1.0,
            0,
        )
        server.chat()
        used = len(server.engine.submitted[-1].prompt_token_ids)
        assert self.submitted(server).max_tokens == 512 - used

    def test_the_models_defaults_stand_between(self, make_server: Callable[..., Server]) -> None:
        spec = {"generation": {"temperature": 0.6, "top_k": 20, "max_tokens": 33}}
        server = make_server(spec=spec)
        server.chat(top_k=-1)
        sampling = self.submitted(server)
        assert (sampling.temperature, sampling.top_k, sampling.max_tokens) == (0.6, 0, 33)

    def test_max_completion_tokens_goes_before_max_tokens(self, server: Server) -> None:
        server.chat(max_completion_tokens=5, max_tokens=6)
        assert self.submitted(server).max_tokens == 5

    def test_cache_salt_is_passed_on(self, server: Server) -> None:
        server.chat(cache_salt="tenant-1")
        assert server.engine.submitted[-1].cache_salt == "tenant-1"


class TestPrompts:
    def text(self, server: Server) -> str:
        ids = server.engine.submitted[-1].prompt_token_ids
        return server.engine.tokenizer.decode(ids, skip_special_tokens=False)

    def ask(self, server: Server, messages: list[dict[str, Any]], **fields: Any) -> str:
        reply = server.post("/v1/chat/completions", {"messages": messages, **fields})
        assert reply.status == 200, reply.body
        return self.text(server)

    def test_parts_and_roles(self, server: Server) -> None:
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
        assert self.ask(server, messages) == (
            "<|im_start|>system\nBe brief.<|im_end|>\n"
            "<|im_start|>user\none\ntwo<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def test_marks_of_other_vendors_caches_change_nothing(self, server: Server) -> None:
        part = {"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}}
        plain = self.ask(server, [{"role": "user", "content": "one"}])
        assert self.ask(server, [{"role": "user", "content": [part]}]) == plain

    def test_reasoning_by_either_name_is_sent_back(self, make_server: Callable[..., Server]) -> None:
        server = make_server(chat_template="{% for m in messages %}{{ m.reasoning_content }}{% endfor %}")
        for name in ("reasoning", "reasoning_content"):
            message = {"role": "assistant", "content": "So.", name: "Because."}
            assert self.ask(server, [message]) == "Because."

    def test_without_a_turn_to_answer_in(self, server: Server) -> None:
        messages = [{"role": "user", "content": "a"}]
        assert self.ask(server, messages, add_generation_prompt=False).endswith("a<|im_end|>\n")

    def test_an_answer_is_continued(self, server: Server) -> None:
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "Dear Sir, "}]
        assert self.ask(server, messages, continue_final_message=True).endswith("assistant\nDear Sir, ")

    def test_nobody_can_type_a_special_token(self, server: Server) -> None:
        self.ask(server, [{"role": "user", "content": "<|im_end|>"}])
        assert server.engine.submitted[-1].prompt_token_ids.count(258) == 1

    def test_what_the_client_got_can_be_sent_back(self, server: Server) -> None:
        message = server.chat().json["choices"][0]["message"]
        again = [{"role": "user", "content": "Hi"}, message, {"role": "user", "content": "And?"}]
        assert GREETING in self.ask(server, again)

    def test_long_prompts_arrive_whole(self, server: Server) -> None:
        words = "word " * 80
        server.complete(words, max_tokens=1)
        assert self.text(server) == words


class TestEchoAndScores:
    def test_echo(self, server: Server) -> None:
        assert server.complete("Once", echo=True, max_tokens=5).json["choices"][0]["text"] == "OnceHello"
        ids = server.engine.tokenizer.encode("Once")
        assert server.complete(ids, echo=True, max_tokens=5).json["choices"][0]["text"] == "OnceHello"

    def test_scores_of_a_prompt_as_evaluation_harnesses_ask_for_them(self, server: Server) -> None:
        ids = server.engine.tokenizer.encode("abc")
        fields = {"echo": True, "max_tokens": 1, "logprobs": 1, "temperature": 0, "seed": 1234}
        answer = server.complete([ids, ids], **fields).json
        assert len(answer["choices"]) == 2
        scores = answer["choices"][1]["logprobs"]
        assert scores["tokens"] == ["a", "b", "c", "H"]
        assert scores["token_logprobs"] == [None, -0.5, -0.5, -0.5]
        assert scores["top_logprobs"] == [None, {"b": -0.5}, {"c": -0.5}, {"H": -0.5}]
        assert scores["text_offset"] == [0, 1, 2, 3]

    def test_scores_of_a_prompt_alone(self, server: Server) -> None:
        answer = server.complete("abc", echo=True, max_tokens=0, logprobs=0).json
        choice = answer["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
        assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
        assert answer["usage"]["completion_tokens"] == 0

    def test_echo_streamed(self, server: Server) -> None:
        events = server.complete("Once", echo=True, max_tokens=5, logprobs=0, stream=True).events
        assert "".join(event["choices"][0]["text"] for event in events) == "OnceHello"
        tokens = [t for e in events for t in (e["choices"][0]["logprobs"] or {"tokens": []})["tokens"]]
        assert "".join(tokens) == "OnceHello"

    def test_prompt_logprobs(self, server: Server) -> None:
        answer = server.chat(prompt_logprobs=1).json
        first, second = answer["prompt_logprobs"][:2]
        assert first is None
        ((token_id, entry),) = second.items()
        assert int(token_id) == server.engine.submitted[0].prompt_token_ids[1]
        assert entry == {"logprob": -0.5, "rank": 1, "decoded_token": "u"}

    def test_minus_infinity_stays_json(self, make_server: Callable[..., Server]) -> None:
        def reply(submit: Submit) -> list[TokenDelta]:
            (delta,) = server.engine.spell(submit, "A")[:1]
            delta.logprobs[0].top = [(66, float("-inf"))]
            delta.finish_reason = "length"
            return [delta]

        server = make_server(reply)
        scores = server.complete(logprobs=1).json["choices"][0]["logprobs"]
        assert min(scores["top_logprobs"][0].values()) == -9999.0


def test_tokenize_and_back(server: Server) -> None:
    answer = server.post("/tokenize", {"model": MODEL, "prompt": "héllo", "return_token_strs": True}).json
    assert answer["count"] == len("héllo".encode()) == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert server.post("/detokenize", {"tokens": answer["tokens"]}).json == {"prompt": "héllo"}


def test_tokenize_a_conversation(server: Server) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    tokens = server.post("/tokenize", {"messages": messages}).json["tokens"]
    server.chat("Hi")
    assert tokens == server.engine.submitted[-1].prompt_token_ids


def test_a_sequence_that_the_engine_gives_up_is_an_error(make_server: Callable[..., Server]) -> None:
    def reply(submit: Submit) -> list[TokenDelta]:
        return [TokenDelta(request_id=submit.request_id, finish_reason="error", error="Out of blocks.")]

    server = make_server(reply)
    reply_ = server.chat()
    assert (reply_.status, reply_.error["message"]) == (500, "Out of blocks.")
