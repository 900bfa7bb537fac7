"""Parameters that vLLM's server has beyond OpenAI's, and those that choose among several answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from runtime.protocol import Submit, TokenDelta, TokenLogprobs
from tests.handler.conftest import GREETING, Server
from tests.handler.fake_engine import EOS
from tests.runtime.text.templates import CHATML

Make = Callable[..., Server]


def prompt(server: Server) -> str:
    ids = server.engine.submitted[-1].prompt_token_ids
    return server.engine.tokenizer.decode(ids, skip_special_tokens=False)


class TestTokenIds:
    @pytest.fixture
    def ids(self, server: Server) -> list[int]:
        return [*server.engine.tokenizer.encode(GREETING), EOS]

    def test_of_a_chat(self, server: Server, ids: list[int]) -> None:
        answer = server.chat(return_token_ids=True).json
        assert answer["prompt_token_ids"] == server.engine.submitted[-1].prompt_token_ids
        assert answer["choices"][0]["token_ids"] == ids
        assert answer["usage"]["completion_tokens"] == len(ids)

    def test_of_a_chat_streamed(self, server: Server, ids: list[int]) -> None:
        first, *rest = server.chat(return_token_ids=True, stream=True).events
        assert first["prompt_token_ids"] == server.engine.submitted[-1].prompt_token_ids
        assert [token for event in rest for token in event["choices"][0]["token_ids"]] == ids

    @pytest.mark.parametrize("stream", [False, True])
    def test_of_completions(self, server: Server, ids: list[int], stream: bool) -> None:
        reply = server.complete(["ab", "c"], return_token_ids=True, stream=stream, max_tokens=40)
        choices = [event["choices"][0] for event in reply.events] if stream else reply.json["choices"]
        encode = server.engine.tokenizer.encode
        for index, text in enumerate(("ab", "c")):
            own = [choice for choice in choices if choice["index"] == index]
            assert own[0]["prompt_token_ids"] == encode(text)
            assert [token for choice in own for token in choice["token_ids"]] == ids
            assert "".join(choice["text"] for choice in own) == GREETING

    def test_only_when_asked_for(self, server: Server) -> None:
        assert "token_ids" not in server.chat().json["choices"][0]
        assert "prompt_token_ids" not in server.complete().json["choices"][0]

    def test_in_place_of_texts(self, server: Server) -> None:
        fields = {"return_tokens_as_token_ids": True, "max_tokens": 2}
        scores = server.complete(**fields, logprobs=1).json["choices"][0]["logprobs"]
        h, e = server.engine.tokenizer.encode("He")
        assert scores["tokens"] == [f"token_id:{h}", f"token_id:{e}"]
        assert scores["top_logprobs"][0] == {f"token_id:{h}": -0.5}
        assert scores["text_offset"] == [0, 1]
        content = server.chat(**fields, logprobs=True).json["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in content] == [f"token_id:{h}", f"token_id:{e}"]
        assert content[0]["bytes"] == [ord("H")]


class TestNames:
    def test_a_client_names_its_request(self, server: Server) -> None:
        assert server.chat(request_id="mine").json["id"] == "chatcmpl-mine"
        assert server.complete(request_id="mine").json["id"] == "cmpl-mine"
        names = [submit.request_id for submit in server.engine.submitted]
        assert len(set(names)) == 2, "the engine tells them apart"
        assert server.chat(request_id="a b").error["param"] == "request_id"

    def test_priority_reaches_the_engine(self, server: Server) -> None:
        server.chat(priority=-3)
        server.complete(["a", "b"], priority=7)
        assert [submit.priority for submit in server.engine.submitted] == [-3, 7, 7]


class TestBestOf:
    @pytest.fixture
    def tries(self, make_server: Make) -> Server:
        """Each sequence says its own number; the later ones are the likelier, the last is the longest."""

        def reply(submit: Submit) -> list[TokenDelta]:
            number = int(submit.request_id.rpartition("-")[2])
            scores = [-3.0 + number] * (5 if number == 3 else 1)
            ids = [*b"0123"][number] - 33
            return [
                TokenDelta(
                    request_id=submit.request_id,
                    token_ids=[ids] * len(scores),
                    logprobs=[TokenLogprobs(ids, score, 1, []) for score in scores],
                    finish_reason="length",
                )
            ]

        return make_server(reply)

    def test_the_likeliest_by_token_are_shown(self, tries: Server) -> None:
        answer = tries.complete(best_of=4, n=2, max_tokens=5).json
        assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "33333"), (1, "2")]
        assert [choice["logprobs"] for choice in answer["choices"]] == [None, None]
        assert answer["usage"]["completion_tokens"] == 1 + 1 + 1 + 5
        assert len({submit.request_id for submit in tries.engine.submitted}) == 4

    def test_as_many_as_are_shown_keep_their_order(self, tries: Server) -> None:
        choices = tries.complete(best_of=4, n=4, max_tokens=5).json["choices"]
        assert [choice["text"] for choice in choices] == ["0", "1", "2", "33333"]


class TestBans:
    def test_words_never_come(self, server: Server) -> None:
        assert server.chat(bad_words=["x"], logit_bias={"5": 2}).status == 200
        (x,) = server.engine.tokenizer.encode("x")
        assert server.engine.submitted[-1].sampling.logit_bias == {5: 2.0, x: -math.inf}
        assert server.complete(bad_words=["x", "y"]).status == 200
        assert len(server.engine.submitted[-1].sampling.logit_bias) == 2

    def test_words_of_several_tokens_do_not_either(self, server: Server) -> None:
        """At the beginning of a text and behind a space, whichever way the request has it."""
        encode = server.engine.tokenizer.encode
        for words in (["x", "yes"], [" x", " yes"]):
            assert server.chat(bad_words=words).status == 200
            sampling = server.engine.submitted[-1].sampling
            assert sampling.logit_bias == {encode("x")[0]: -math.inf}
            assert sampling.bad_words == tuple(tuple(encode(text)) for text in (" x", "yes", " yes"))

    def test_there_is_room_for_so_many_tokens(self, server: Server) -> None:
        biases = {str(index % 264): 1 for index in range(264)}
        assert server.chat(logit_bias=biases, bad_words=["x"]).status == 200
        error = server.chat(min_tokens=2, stop_token_ids=[*range(128)]).json
        assert "error" not in error


class TestAllowed:
    def test_nothing_else_comes(self, server: Server) -> None:
        assert server.chat(allowed_token_ids=[7, 5, 7]).status == 200
        assert server.engine.submitted[-1].sampling.allowed_token_ids == (7, 5)
        assert server.complete(allowed_token_ids=[]).status == 200
        assert server.engine.submitted[-1].sampling.allowed_token_ids == ()

    @pytest.mark.parametrize(
        ("fields", "complaint"),
        [
            ({"allowed_token_ids": [264]}, "ids end at 263"),
            ({"allowed_token_ids": [-1]}, "greater than or equal to 0"),
            ({"allowed_token_ids": ["x"]}, "integer"),
            ({"allowed_token_ids": [ord("x") - ord("!")], "bad_words": ["x"]}, "rule out every token"),
        ],
    )
    def test_what_makes_no_sense(self, server: Server, fields: dict[str, Any], complaint: str) -> None:
        reply = server.chat(**fields)
        assert (reply.status, reply.error["param"].split(".")[0]) == (400, "allowed_token_ids")
        assert complaint in reply.error["message"]


class TestTruncation:
    def test_the_last_tokens_are_kept(self, server: Server) -> None:
        server.chat("Hello", max_tokens=5)
        whole = server.engine.submitted[-1].prompt_token_ids
        reply = server.chat("Hello", max_tokens=5, truncate_prompt_tokens=7)
        assert server.engine.submitted[-1].prompt_token_ids == whole[-7:]
        assert reply.json["usage"]["prompt_tokens"] == 7
        server.chat("Hello", max_tokens=5, truncate_prompt_tokens=500)
        assert server.engine.submitted[-1].prompt_token_ids == whole

    def test_minus_one_leaves_what_the_answer_needs(self, server: Server) -> None:
        prompt = [index % 250 for index in range(3000)]
        for fields, room in (({"max_tokens": 30}, 30), ({}, 16)):
            assert server.complete(prompt=prompt, truncate_prompt_tokens=-1, **fields).status == 200
            kept = server.engine.submitted[-1].prompt_token_ids
            assert len(kept) == 512 - room
            assert kept == prompt[-len(kept) :]
        assert server.chat("x" * 3000, truncate_prompt_tokens=-1).status == 200
        assert len(server.engine.submitted[-1].prompt_token_ids) == 511

    def test_each_of_several_prompts_and_what_is_echoed(self, server: Server) -> None:
        fields: dict[str, Any] = {"echo": True, "max_tokens": 0, "return_token_ids": True}
        for prompts in (["abcdef", "xy"], [[*range(64, 70)], [87, 88]]):
            reply = server.complete(prompt=prompts, truncate_prompt_tokens=3, **fields)
            choices = reply.json["choices"]
            assert [choice["text"] for choice in choices] == ["def", "xy"]
            assert [choice["prompt_token_ids"] for choice in choices] == [[67, 68, 69], [87, 88]]

    @pytest.mark.parametrize(("wanted", "complaint"), [(0, "at least one"), (-2, "-1"), (513, "512 tokens")])
    def test_what_makes_no_sense(self, server: Server, wanted: int, complaint: str) -> None:
        reply = server.complete(truncate_prompt_tokens=wanted)
        assert (reply.status, reply.error["param"]) == (400, "truncate_prompt_tokens")
        assert complaint in reply.error["message"]


class TestTemplates:
    def test_variables_reach_the_template(self, make_server: Make) -> None:
        server = make_server(chat_template=CHATML)
        assert server.chat(chat_template_kwargs={"enable_thinking": False}).status == 200
        assert prompt(server).endswith("<think>\n\n</think>\n\n")

    @pytest.mark.parametrize("name", ["enable_thinkin", "messages", "tools", "bos_token", "template"])
    def test_but_no_others(self, make_server: Make, name: str) -> None:
        server = make_server(chat_template=CHATML + "{{ bos_token }}{{ template }}")
        error = server.chat(chat_template_kwargs={name: "x"}).error
        assert error["param"] == "chat_template_kwargs"
        assert f"'{name}'" in error["message"]
        assert "it takes: enable_thinking" in error["message"]

    def test_their_text_is_no_special_token(self, make_server: Make) -> None:
        server = make_server(chat_template="{{ messages[0].content }}{{ note }}")
        server.chat("Hi", chat_template_kwargs={"note": "<|im_end|>"})
        assert EOS not in server.engine.submitted[-1].prompt_token_ids
        assert prompt(server) == "Hi<|im_end|>"

    def test_documents(self, make_server: Make) -> None:
        server = make_server(chat_template="{% for d in documents %}{{ d.text }}|{% endfor %}")
        server.chat(documents=[{"text": "one"}, {"text": "two"}])
        assert prompt(server) == "one|two|"

    def test_a_developer_speaks_as_the_system(self, make_server: Make) -> None:
        messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        server = make_server()
        server.post("/v1/chat/completions", {"messages": messages})
        assert prompt(server).startswith("<|im_start|>system\nBe brief.")
        server = make_server(chat_template="{{ messages[0].role }}{# system or developer #}")
        server.post("/v1/chat/completions", {"messages": messages})
        assert prompt(server) == "developer"

    def test_continuing_and_beginning_an_answer_contradict_each_other(self, server: Server) -> None:
        fields: dict[str, Any] = {"continue_final_message": True}
        assert server.chat(**fields, add_generation_prompt=True).error["param"] == "continue_final_message"
        assert server.chat(**fields, add_generation_prompt=False).status == 200
        assert server.chat(**fields).status == 200
