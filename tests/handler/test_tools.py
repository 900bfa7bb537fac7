"""Tools and reasoning over HTTP: what the model is told, and what clients get of what it says."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from tokenizers import AddedToken, Tokenizer

from handler.flags import SERVER_FLAGS
from handler.openai.reply.formats import CALL_FORMATS, REASONING_TAGS
from tests.conftest import write_tokenizer
from tests.handler.conftest import GREETING, MODEL, Server
from tests.handler.fake_engine import READY, FakeEngine
from tests.runtime.text.templates import CHATML, GEMMA

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Tells the {name}.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("weather", "time")
]
USER: list[Any] = [{"role": "user", "content": "What's it like in Berlin?"}]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Berlin"}}\n</tool_call>'
TWO_CALLS = f'I look.\n{CALL}\n<tool_call>\n{{"name": "time", "arguments": {{}}}}\n</tool_call>'
Make = Callable[..., Server]


def prepared(engine: FakeEngine) -> None:
    engine.info = msgspec.structs.replace(READY, max_model_len=4096)


@pytest.fixture
def make_server(make_server: Make) -> Make:
    """Servers with room for tools in their context."""
    return functools.partial(make_server, prepare=prepared)


@pytest.fixture
def hermes(make_server: Make) -> Server:
    """A model whose chat template knows tools, and which always calls two of them."""
    return make_server(TWO_CALLS, chat_template=CHATML)


def client_of(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0).chat.completions


def prompt(server: Server) -> str:
    ids = server.engine.submitted[-1].prompt_token_ids
    return server.engine.tokenizer.decode(ids, skip_special_tokens=False)


def summary(message: Any) -> tuple[str | None, list[tuple[str, Any]]]:
    calls = message.tool_calls or []
    return message.content, [(c.function.name, json.loads(c.function.arguments)) for c in calls]


SAID = ("I look.", [("weather", {"city": "Berlin"}), ("time", {})])


class TestCalls:
    def test_whole(self, hermes: Server) -> None:
        answer = client_of(hermes).create(model=MODEL, messages=USER, tools=TOOLS)
        (choice,) = answer.choices
        assert summary(choice.message) == SAID
        assert choice.finish_reason == "tool_calls"
        ids = [call.id for call in choice.message.tool_calls]
        assert len(set(ids)) == 2
        assert all(re.fullmatch(r"call_\w{20,}", call_id) for call_id in ids)

    def test_streamed(self, hermes: Server) -> None:
        with client_of(hermes).stream(model=MODEL, messages=USER, tools=TOOLS) as stream:
            events = list(stream)
            final = stream.get_final_completion().choices[0]
        assert summary(final.message) == SAID
        assert final.finish_reason == "tool_calls"
        deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
        assert len(deltas) > 5, "arguments are streamed as they come"
        assert "".join(event.delta for event in events if event.type == "content.delta") == "I look."

    def test_every_choice_has_its_own(self, hermes: Server) -> None:
        for stream in (False, True):
            reply = hermes.chat(tools=TOOLS, n=2, stream=stream)
            if stream:
                pieces = [e["choices"][0] for e in reply.events]
                ids = [c["id"] for p in pieces for c in p["delta"].get("tool_calls", []) if "id" in c]
                ends = [piece["finish_reason"] for piece in pieces if piece["finish_reason"]]
            else:
                choices = reply.json["choices"]
                ids = [call["id"] for choice in choices for call in choice["message"]["tool_calls"]]
                ends = [choice["finish_reason"] for choice in choices]
            assert len(set(ids)) == 4
            assert ends == ["tool_calls"] * 2

    def test_a_call_alone_has_no_content(self, make_server: Make) -> None:
        message = make_server(CALL, chat_template=CHATML).chat(tools=TOOLS).json["choices"][0]["message"]
        assert message["content"] is None
        assert message["tool_calls"][0]["type"] == "function"

    def test_one_that_is_cut_off_says_so(self, hermes: Server) -> None:
        choice = hermes.chat(tools=TOOLS, max_tokens=len("I look.\n") + 56).json["choices"][0]
        (call,) = choice["message"]["tool_calls"]
        assert '{"city": "Berlin"}'.startswith(call["function"]["arguments"])
        assert choice["finish_reason"] == "length"

    def test_not_in_parallel(self, hermes: Server) -> None:
        choice = hermes.chat(tools=TOOLS, parallel_tool_calls=False).json["choices"][0]
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["weather"]

    @pytest.mark.parametrize("fields", [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}])
    def test_without_tools_nothing_is_a_call(self, hermes: Server, fields: dict[str, Any]) -> None:
        choice = hermes.chat(**fields).json["choices"][0]
        assert choice["message"]["content"] == TWO_CALLS
        assert choice["finish_reason"] == "stop"
        assert "<tools>" not in prompt(hermes)

    def test_answers_in_words_stay_as_they_are(self, make_server: Make) -> None:
        server = make_server(chat_template=CHATML)
        choice = server.chat(tools=TOOLS).json["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (GREETING, "stop")


class TestTold:
    def test_a_template_that_knows_tools_gets_them(self, hermes: Server) -> None:
        hermes.chat(tools=TOOLS)
        shown = prompt(hermes).partition("<tools>")[2].partition("</tools>")[0]
        assert shown == "".join(f"\n{json.dumps(tool, indent=2)}" for tool in TOOLS)

    def test_calls_and_results_come_back(self, hermes: Server) -> None:
        message = client_of(hermes).create(model=MODEL, messages=USER, tools=TOOLS).choices[0].message
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": f"{call.function.name}: fine"}
            for call in message.tool_calls
        ]
        client_of(hermes).create(model=MODEL, messages=[*USER, message, *results], tools=TOOLS)
        text = prompt(hermes)
        assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Berlin"}}\n</tool_call>' in text
        assert "<|im_start|>tool\nweather: fine<|im_end|>" in text

    def test_any_other_gets_them_as_words(self, make_server: Make) -> None:
        server = make_server('{"name": "weather", "arguments": {"city": "Berlin"}}')
        choice = client_of(server).create(model=MODEL, messages=USER, tools=TOOLS).choices[0]
        assert summary(choice.message) == (None, SAID[1][:1])
        system, user = prompt(server).split("<|im_start|>")[1:3]
        assert system.startswith("system\n")
        assert json.dumps(TOOLS[0]["function"]) in system
        assert user == f"user\n{USER[0]['content']}<|im_end|>\n"
        result = {"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "Sunny."}
        server.post("/v1/chat/completions", {"messages": [*USER, choice.message.model_dump(), result]})
        assert (
            '<|im_start|>assistant\n{"name": "weather", "arguments": {"city": "Berlin"}}<|im_end|>'
            in prompt(server)
        )
        assert "<|im_start|>user\nThe function answered:\nSunny.<|im_end|>" in prompt(server)

    def test_a_system_turn_is_kept(self, make_server: Make) -> None:
        server = make_server()
        messages = [{"role": "system", "content": "Be brief."}, *USER]
        server.post("/v1/chat/completions", {"messages": messages, "tools": TOOLS})
        assert "<|im_start|>system\nBe brief.\n\nYou can call these functions:" in prompt(server)
        assert prompt(server).count("<|im_start|>system") == 1

    def test_a_template_that_refuses_system_turns(self, make_server: Make) -> None:
        server = make_server(chat_template=GEMMA.replace("{{ bos_token }}", ""))
        assert server.chat("Hello?", tools=TOOLS).status == 200
        first = prompt(server).partition("<end_of_turn>")[0]
        assert first.startswith("<start_of_turn>user\nYou can call these functions:")
        assert first.endswith("\n\nHello?")

    @pytest.mark.parametrize("mode", ["auto", "required"])
    def test_of_no_others_than_may_be_called(self, make_server: Make, mode: str) -> None:
        """In chats and in the Responses API, which spells it without a wrapping."""
        server = make_server(CALL, chat_template=CHATML)
        name = {"name": "weather"}
        allowed = {"mode": mode, "tools": [{"type": "function", "function": name}]}
        choice = {"type": "allowed_tools", "allowed_tools": allowed}
        assert server.chat("Hi", tools=TOOLS, tool_choice=choice).json["choices"][0]["message"]["tool_calls"]
        told = prompt(server)
        flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
        plain = {"type": "allowed_tools", "mode": mode, "tools": [{"type": "function", **name}]}
        body = {"input": "Hi", "tools": flat, "tool_choice": plain}
        reply = server.post("/v1/responses", body).json
        assert (reply["tool_choice"], prompt(server)) == (plain, told)
        assert told.count('"name": "') == 1
        assert (server.engine.submitted[-1].sampling.grammar is not None) == (mode == "required")

    def test_in_tokenize_too(self, hermes: Server) -> None:
        hermes.chat("Hi", tools=TOOLS)
        body = {"messages": [{"role": "user", "content": "Hi"}], "tools": TOOLS}
        assert hermes.post("/tokenize", body).json["tokens"] == hermes.engine.submitted[-1].prompt_token_ids


class TestRefused:
    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"tools": [], "tool_choice": "required"}, "tool_choice"),
            ({"tool_choice": {"type": "function", "function": {"name": "nothing"}}}, "tool_choice"),
            ({"tool_choice": "sometimes"}, "tool_choice"),
            ({"tool_choice": {"type": "custom", "custom": {"name": "weather"}}}, "tool_choice.type"),
            (
                {
                    "tool_choice": {
                        "type": "allowed_tools",
                        "allowed_tools": {
                            "mode": "auto",
                            "tools": [{"type": "function", "function": {"name": "nothing"}}],
                        },
                    }
                },
                "tool_choice",
            ),
            ({"tools": [*TOOLS, TOOLS[0]]}, "tools.2.function.name"),
            ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
            ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
            (
                {"tools": [{"type": "function", "function": {"name": f"f{n}"}} for n in range(129)]},
                "tools",
            ),
            (
                {
                    "tools": [
                        {"type": "function", "function": {"name": "f", "parameters": {"x": "y" * 70_000}}}
                    ]
                },
                "tools.0.function.parameters",
            ),
        ],
    )
    def test_by_name(self, server: Server, fields: dict[str, Any], param: str) -> None:
        reply = server.chat(**{"tools": TOOLS, **fields})
        assert (reply.status, reply.error["param"]) == (400, param)
        assert param in reply.error["message"]
        assert server.engine.submitted == []


class TestMistral:
    """A family whose mark is a special token, and whose template insists on ids of nine characters."""

    TEMPLATE = (
        "{% for m in messages %}{% if m.tool_calls is defined %}[TOOL_CALLS]{% for c in m.tool_calls %}"
        "{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}{{ c.id }}"
        "{% endfor %}{% else %}[INST]{{ m.tool_call_id }}{{ m.content }}[/INST]{% endif %}{% endfor %}"
        "{{ tools }}"
    )

    @pytest.fixture
    def mistral(self, tmp_path: Path, make_server: Make) -> Server:
        write_tokenizer(tmp_path)
        tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        tokenizer.add_special_tokens([AddedToken("[TOOL_CALLS]", special=True)])
        tokenizer.save(str(tmp_path / "tokenizer.json"))

        def other_words(engine: FakeEngine) -> None:
            prepared(engine)
            engine.directory = tmp_path
            engine.tokenizer = type(engine.tokenizer).load(tmp_path)

        text = '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Berlin"}}]'
        return make_server(text, prepare=other_words, chat_template=self.TEMPLATE)

    def test_the_mark_is_seen(self, mistral: Server) -> None:
        choice = client_of(mistral).create(model=MODEL, messages=USER, tools=TOOLS).choices[0]
        assert summary(choice.message) == (None, SAID[1][:1])
        assert re.fullmatch("[A-Za-z0-9]{9}", choice.message.tool_calls[0].id)

    def test_without_tools_it_is_as_hidden_as_any(self, mistral: Server) -> None:
        assert "TOOL_CALLS" not in mistral.chat().json["choices"][0]["message"]["content"]

    def test_ids_from_elsewhere_are_made_to_fit(self, mistral: Server) -> None:
        call = {"id": "call_0123456789abcdef", "function": {"name": "weather", "arguments": "{}"}}
        result = {"role": "tool", "tool_call_id": call["id"], "content": ""}
        messages = [*USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result]
        reply = mistral.post("/v1/chat/completions", {"messages": messages, "tools": TOOLS})
        assert reply.status == 200, reply.body
        (first, second) = re.search(
            r"\[TOOL_CALLS\](\w{9})\[INST\](\w{9})\[/INST\]", prompt(mistral)
        ).groups()
        assert first == second


class TestReasoning:
    SAID = f"<think>\nLet me see.\n</think>\n\n{TWO_CALLS}"

    def test_whole_and_streamed(self, make_server: Make) -> None:
        server = make_server(self.SAID, chat_template=CHATML)
        message = server.chat(tools=TOOLS).json["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Let me see.", "I look.")
        assert len(message["tool_calls"]) == 2
        deltas = [e["choices"][0]["delta"] for e in server.chat(tools=TOOLS, stream=True).events]
        reasoning = [delta["reasoning_content"] for delta in deltas if "reasoning_content" in delta]
        assert "".join(reasoning) == "Let me see."
        assert len(reasoning) > 3
        assert "".join(delta.get("content") or "" for delta in deltas) == "I look."

    def test_all_of_a_reply_that_is_cut_off(self, make_server: Make) -> None:
        server = make_server(self.SAID, chat_template=CHATML)
        message = server.chat(max_tokens=14).json["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("Let me", None)

    def test_it_may_begin_in_the_prompt(self, make_server: Make) -> None:
        template = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
        server = make_server("So.\n</think>\nYes.", chat_template=template)
        message = server.chat().json["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("So.", "Yes.")

    def test_it_can_be_left_out(self, make_server: Make) -> None:
        server = make_server(self.SAID, chat_template=CHATML)
        message = server.chat(include_reasoning=False).json["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == (None, TWO_CALLS)

    def test_by_flag(self, make_server: Make) -> None:
        server = make_server(
            self.SAID, chat_template=CHATML, reasoning_parser="none", tool_call_parser="none"
        )
        assert server.chat(tools=TOOLS).json["choices"][0]["message"]["content"] == self.SAID
        server = make_server("[THINK]So.[/THINK]Yes.", reasoning_parser="mistral")
        assert server.chat().json["choices"][0]["message"]["reasoning_content"] == "So."

    def test_a_model_without_it_shows_everything(self, make_server: Make) -> None:
        message = make_server(self.SAID).chat().json["choices"][0]["message"]
        assert message["content"] == self.SAID

    def test_how_much_of_it(self, make_server: Make) -> None:
        server = make_server(chat_template=CHATML)
        assert server.chat(reasoning_effort="none").status == 200
        assert prompt(server).endswith("<think>\n\n</think>\n\n")
        assert server.chat(reasoning_effort="high").error["param"] == "reasoning_effort"
        server = make_server(chat_template=CHATML + "{{ reasoning_effort }}")
        server.chat(reasoning_effort="high")
        assert prompt(server).endswith("high")


def test_the_flags_name_every_format() -> None:
    names = {flag.name: flag for flag in SERVER_FLAGS}
    for flag, formats in (("tool-call-parser", CALL_FORMATS), ("reasoning-parser", REASONING_TAGS)):
        for name in ("auto", "none", *formats):
            assert names[flag].parse(name) == name
            assert name in names[flag].help
