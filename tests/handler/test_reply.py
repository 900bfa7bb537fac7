"""Replies in every format: the same calls, content and reasoning, however the text is cut into pieces."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from handler.openai.reply.formats import CALL_FORMATS
from handler.openai.reply.reader import ReplyReader
from handler.openai.reply.reasoning import Reasoning

NAMES = {"weather", "add"}
ARGUMENTS = '{"city": "Berlin \\"}]{ \\\\", "days": [1, {"unit": null}], "é": "\\ud83d\\ude00"}'
Call = tuple[str, str]
Outcome = tuple[str, str, list[Call]]


def read(reader: ReplyReader, pieces: Iterable[str]) -> Outcome:
    """Reasoning, content and calls that the pieces amount to."""
    reasoning = content = ""
    calls: list[list[str]] = []
    for said in [*[reader.push(piece) for piece in pieces], reader.flush()]:
        reasoning += said.reasoning
        content += said.content
        for delta in said.calls:
            if delta.name is not None:
                assert delta.index == len(calls)
                calls.append([delta.name, ""])
            calls[delta.index][1] += delta.arguments
    return reasoning, content, [(name, arguments) for name, arguments in calls]


def reader_of(name: str, **options: Any) -> ReplyReader:
    return ReplyReader(None, CALL_FORMATS[name].reader(NAMES), **options)


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


HERMES = f"<tool_call>\n{call('weather', ARGUMENTS)}\n</tool_call>"
INTERN = f"<|action_start|><|plugin|>\n{call('weather', ARGUMENTS, 'parameters')}<|action_end|>"
# Format, text, content, calls.
REPLIES: list[tuple[str, str, str, list[Call]]] = [
    ("hermes", HERMES, "", [("weather", ARGUMENTS)]),
    ("hermes", f"I'll look.\n\n{HERMES}\n", "I'll look.", [("weather", ARGUMENTS)]),
    (
        "hermes",
        f"{HERMES}\n<tool_call>{call('add', '{}')}</tool_call>",
        "",
        [("weather", ARGUMENTS), ("add", "{}")],
    ),
    # The name behind the arguments, arguments as text, none at all, other keys, an end that is forgotten.
    ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', "", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}', "", [("add", '{"a": 1}')]),
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", "{}")]),
    ("hermes", '<tool_call>{"name": "add", "arguments": null}</tool_call>', "", [("add", "{}")]),
    (
        "hermes",
        f'<tool_call>{{"id": [1, "]"], "name": "add", "arguments": {{}}, "x": -1.5e3}} {HERMES}',
        "",
        [("add", "{}"), ("weather", ARGUMENTS)],
    ),
    # Cut off in the middle; content with something like a tag; a tag without a call behind it.
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": "on', "", [("add", '{"a": "on')]),
    ("hermes", "a < b, <tool, <tool_call", "a < b, <tool, <tool_call", []),
    ("hermes", "<tool_call>none</tool_call> ", "<tool_call>none</tool_call> ", []),
    ("hermes", '<tool_call>{"name": 7, "arguments": {}}', '<tool_call>{"name": 7, "arguments": {}}', []),
    ("hermes", f"<tool_call>{HERMES}", "<tool_call>", [("weather", ARGUMENTS)]),
    ("hermes", '{"name": "add", "arguments": {}}', '{"name": "add", "arguments": {}}', []),
    ("hermes", "  plain \n", "  plain \n", []),
    ("internlm", f"Let me see.{INTERN}", "Let me see.", [("weather", ARGUMENTS)]),
    ("mistral", f"[TOOL_CALLS] [{call('weather', ARGUMENTS)}]", "", [("weather", ARGUMENTS)]),
    (
        "mistral",
        f"Yes. [TOOL_CALLS][{call('add', '{}')}, {call('weather', ARGUMENTS)}]",
        "Yes.",
        [("add", "{}"), ("weather", ARGUMENTS)],
    ),
    (
        "mistral",
        f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]add{{}}",
        "",
        [("weather", ARGUMENTS), ("add", "{}")],
    ),
    ("mistral", '[TOOL_CALLS]add[CALL_ID]a1B2c3D4e[ARGS]{"a": 1}', "", [("add", '{"a": 1}')]),
    ("mistral", f"[TOOL_CALLS]{call('add', '{}')}", "", [("add", "{}")]),
    ("mistral", '[TOOL_CALLS][{"name": "add", "arguments": {"a"', "", [("add", '{"a"')]),
    ("mistral", "[TOOL_CALLS] not today", "[TOOL_CALLS] not today", []),
    ("mistral", "[TOOL_CALLS][1, 2]", "[TOOL_CALLS][1, 2]", []),
    ("mistral", "a [TOOL_", "a [TOOL_", []),
    ("llama3_json", call("weather", ARGUMENTS, "parameters"), "", [("weather", ARGUMENTS)]),
    (
        "llama3_json",
        f"<|python_tag|>{call('add', '{}', 'parameters')}; {call('weather', ARGUMENTS, 'parameters')}",
        "",
        [("add", "{}"), ("weather", ARGUMENTS)],
    ),
    ("llama3_json", "It is warm.", "It is warm.", []),
    ("json", f"\n {call('weather', ARGUMENTS)}\n", "", [("weather", ARGUMENTS)]),
    ("json", f"```json\n{call('weather', ARGUMENTS)}\n```", "", [("weather", ARGUMENTS)]),
    (
        "json",
        f"[{call('add', '{}')},\n{call('weather', ARGUMENTS)}]",
        "",
        [("add", "{}"), ("weather", ARGUMENTS)],
    ),
    ("json", f"{call('add', '{}')} There.", "There.", [("add", "{}")]),
    # JSON that is an answer and no call; a function that was not offered; code.
    ("json", '{"answer": 42} so', '{"answer": 42} so', []),
    ("json", call("remove", "{}"), call("remove", "{}"), []),
    ("json", '{"name": "add"}', '{"name": "add"}', []),
    ("json", '{"x": 1, "name": "add", "arguments": {}}', '{"x": 1, "name": "add", "arguments": {}}', []),
    ("json", '{"type": "function", "name": "add", "arguments": {}, "x": 1}', "", [("add", "{}")]),
    ("json", "[1, 2, 3]\n", "[1, 2, 3]\n", []),
    ("json", "```\nls\n```", "```\nls\n```", []),
    ("json", "``", "``", []),
    (
        "chatglm3",
        "weather\n ```python\ntool_call(city='Berlin', days=[1, None])\n```",
        "",
        [("weather", '{"city": "Berlin", "days": [1, null]}')],
    ),
    ("chatglm3", "\n It is warm.\nVery.", "It is warm.\nVery.", []),
    ("chatglm3", "weather is nice\nhere", "weather is nice\nhere", []),
    ("chatglm3", "weather\nI cannot tell.", "weather\nI cannot tell.", []),
    ("chatglm3", "weather\n```python\nimport os\n```", "weather\n```python\nimport os\n```", []),
    ("chatglm3", "add", "add", []),
]


@pytest.mark.parametrize(("name", "text", "content", "calls"), REPLIES)
def test_replies_are_read_and_in_two_pieces_just_so(
    name: str, text: str, content: str, calls: list[Call]
) -> None:
    expected = ("", content, calls)
    assert read(reader_of(name), [text]) == expected
    assert read(reader_of(name), text) == expected
    for at in range(len(text)):
        assert read(reader_of(name), [text[:at], text[at:]]) == expected


# What is put together from these has everything that can go wrong, in any order.
FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|action_start|><|plugin|>", "```json\n"),
    *(
        "<|python_tag|>",
        "```",
        "{",
        "}",
        "[",
        "]",
        ",",
        ":",
        ";",
        '"',
        "\\",
        " ",
        "\n",
        "x",
        "add",
        "weather",
    ),
    *('{"name": "add", "arguments": ', '"parameters"', "{}", "null", "tool_call(a=1)", "<think>", "</think>"),
    call("add", '{"a": 1}'),
]
texts = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)


@st.composite
def cut(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[str, list[str]]:
    text = draw(texts)
    ends = sorted(draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=2)))
    return text, [text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]]


@pytest.mark.parametrize("name", CALL_FORMATS)
@given(cut())
@settings(max_examples=100, deadline=None)
def test_any_text_in_three_pieces(name: str, cut: tuple[str, list[str]]) -> None:
    text, pieces = cut
    whole = read(reader_of(name), [text])
    assert read(reader_of(name), pieces) == whole
    assert read(reader_of(name), text) == whole
    if not whole[2]:
        assert whole[1] == text or name == "chatglm3"


@pytest.mark.parametrize("name", CALL_FORMATS)
@given(st.dictionaries(st.text(), st.recursive(st.none() | st.text() | st.integers(), st.lists)))
@example({"```": "```\n```"})
@settings(max_examples=25, deadline=None)
def test_any_arguments_arrive(name: str, arguments: dict[str, Any]) -> None:
    said = json.dumps(arguments)
    wrapped = {
        "hermes": f"<tool_call>{call('add', said)}</tool_call>",
        "internlm": f"<|action_start|><|plugin|>{call('add', said)}<|action_end|>",
        "mistral": f"[TOOL_CALLS][{call('add', said)}]",
        "chatglm3": f"add\n```python\ntool_call(**{arguments!r})\n```",
    }.get(name, call("add", said))
    if name == "chatglm3":
        wrapped = f"add\n```python\ntool_call(given={arguments!r})\n```"
        arguments = {"given": arguments}
    _, content, [(called, text)] = read(reader_of(name), wrapped)
    assert (content, called, json.loads(text)) == ("", "add", arguments)


class TestReasoning:
    @pytest.mark.parametrize(
        ("text", "inside", "reasoning", "content"),
        [
            ("<think>\nSo.\n</think>\n\nYes.", False, "So.", "Yes."),
            ("\n<think>a < b\n\nc</think>Yes. ", False, "a < b\n\nc", "Yes. "),
            ("So.</think>\nYes.", True, "So.", "Yes."),
            ("<think></think>Yes.", False, "", "Yes."),
            ("<think>never done </thi", False, "never done </thi", ""),
            (" Yes <think>no</think>", False, "", " Yes <think>no</think>"),
            ("<thin", False, "", "<thin"),
            ("", False, "", ""),
        ],
    )
    def test_is_parted_from_the_content(self, text: str, inside: bool, reasoning: str, content: str) -> None:
        def reader() -> ReplyReader:
            return ReplyReader(Reasoning("<think>", "</think>", inside=inside), None)

        assert read(reader(), [text]) == (reasoning, content, [])
        assert read(reader(), text) == (reasoning, content, [])
        for at in range(len(text)):
            assert read(reader(), [text[:at], text[at:]]) == (reasoning, content, [])

    @given(cut(), st.booleans())
    @settings(max_examples=100, deadline=None)
    def test_any_text_with_calls_behind_it(self, cut: tuple[str, list[str]], inside: bool) -> None:
        def reader() -> ReplyReader:
            reasoning = Reasoning("<think>", "</think>", inside=inside)
            return ReplyReader(reasoning, CALL_FORMATS["hermes"].reader(NAMES))

        assert read(reader(), cut[1]) == read(reader(), [cut[0]])

    def test_calls_are_looked_for_behind_it_only(self) -> None:
        reader = ReplyReader(
            Reasoning("<think>", "</think>", inside=False), CALL_FORMATS["hermes"].reader(NAMES)
        )
        text = f"<think>Perhaps {HERMES}</think>\nNo. {HERMES}"
        assert read(reader, text) == (f"Perhaps {HERMES}", "No.", [("weather", ARGUMENTS)])


def test_json_that_is_an_answer_is_not_held_back() -> None:
    reader = reader_of("json")
    assert reader.push('{"answer": [4').content == '{"answer": [4'
    assert reader.push("2]}").content == "2]}"


def test_one_call_at_a_time() -> None:
    text = f"{HERMES}{HERMES}"
    assert read(reader_of("hermes", parallel=False), text)[2] == [("weather", ARGUMENTS)]
