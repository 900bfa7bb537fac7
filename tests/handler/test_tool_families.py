"""Each family's calls: the format is recognised from its files, and what its template shows is read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from handler.openai.reply.formats import CALL_FORMATS, call_format
from handler.openai.reply.reader import ReplyReader
from runtime.text.model_text import ModelText, TextFiles
from runtime.text.template import ChatTemplate, read_template
from tests.conftest import write_tokenizer
from tests.handler.test_reply import read
from tests.runtime.text.templates import CHATML, TOOLS
from tests.runtime.text.vocabularies import VOCABULARIES, write

MISTRAL = (
    "{% for m in messages %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}"
    "{% if not loop.last %}, {% endif %}{% endfor %}]{% endfor %}{{ tools }}"
)
LLAMA3 = (
    "{% for m in messages %}<|python_tag|>{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% if not loop.last %}; {% endif %}{% endfor %}{% endfor %}{{ tools }}"
)
# Format, template, what stands before and behind the turn's own text, whether several calls make one turn.
SHOWN = {
    "hermes": (CHATML, "<|im_start|>assistant", "<|im_end|>", True),
    "internlm": (read_template("internlm2"), "<|im_start|>assistant\n", "<|im_end|>", True),
    "chatglm3": (read_template("chatglm3"), "<|assistant|>", "", False),
    "mistral": (MISTRAL, "", "None", True),
    "llama3_json": (LLAMA3, "", "None", True),
}
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20), st.lists, max_leaves=5
)
arguments = st.dictionaries(st.from_regex(r"[a-z]{1,8}", fullmatch=True), values, max_size=3)


def text_of(directory: Path, template: str | None = None) -> ModelText:
    return TextFiles.read(directory, template).with_limits(512, 300)


class TestRecognised:
    @pytest.mark.parametrize(
        ("family", "name"),
        [("internlm2", "internlm"), ("chatglm3", "chatglm3"), ("qwen", "json"), ("baichuan2", "json")],
    )
    def test_by_the_families_files(self, tmp_path: Path, family: str, name: str) -> None:
        text = text_of(write(VOCABULARIES[family](), tmp_path))
        assert call_format("auto", text) is CALL_FORMATS[name]

    @pytest.mark.parametrize("name", ["hermes", "internlm", "mistral", "llama3_json"])
    def test_by_the_template(self, tmp_path: Path, name: str) -> None:
        write_tokenizer(tmp_path)
        assert call_format("auto", text_of(tmp_path, SHOWN[name][0])) is CALL_FORMATS[name]

    def test_a_template_without_tools_is_asked_for_json(self, tmp_path: Path) -> None:
        write_tokenizer(tmp_path)
        assert call_format("auto", text_of(tmp_path)) is CALL_FORMATS["json"]
        assert call_format("none", text_of(tmp_path)) is None
        assert call_format("hermes", text_of(tmp_path)) is CALL_FORMATS["hermes"]


class TestReadBack:
    @pytest.mark.parametrize("name", SHOWN)
    @given(calls=st.lists(st.tuples(st.sampled_from(["weather", "add"]), arguments), min_size=1, max_size=2))
    @example(calls=[("weather", {"from": "Rome", "if": None})])
    @settings(max_examples=25, deadline=None)
    def test_what_the_template_shows(self, name: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
        source, before, behind, several = SHOWN[name]
        calls = calls if several else calls[:1]
        shown = [
            {"id": f"call{n}", "type": "function", "function": {"name": called, "arguments": given}}
            for n, (called, given) in enumerate(calls)
        ]
        turn = {"role": "assistant", "content": "", "tool_calls": shown}
        question = [{"role": "user", "content": "?"}] if name not in ("mistral", "llama3_json") else []
        text = ChatTemplate(source).render([*question, turn], add_generation_prompt=False)
        said = text[text.index(before) + len(before) :].strip()
        said = said.removesuffix(behind) if behind else said
        if name == "hermes":
            said = said.partition("<tools>")[0]
        reader = CALL_FORMATS[name].reader({"weather", "add"})
        _, content, found = read(ReplyReader(None, reader), [said])
        assert content == ""
        assert [(called, json.loads(given)) for called, given in found] == calls


class TestInternLm:
    def test_tools_and_results(self) -> None:
        call = {"id": "1", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "I look.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "Sunny."},
        ]
        told = json.dumps([TOOLS[0]["function"]], ensure_ascii=False)
        template = ChatTemplate(read_template("internlm2"), special_tokens={"bos_token": "<s>"})
        assert template.render(messages, tools=TOOLS) == (
            "<s><|im_start|>system\nBe brief.<|im_end|>\n"
            f"<|im_start|>system name=<|plugin|>\n{told}<|im_end|>\n"
            "<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\nI look.<|action_start|><|plugin|>\n"
            '{"name": "weather", "parameters": {"city": "Köln"}}<|action_end|><|im_end|>\n'
            "<|im_start|>environment name=<|plugin|>\nSunny.<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert template.render(messages[1:2], tools=TOOLS).startswith(
            "<s><|im_start|>system name=<|plugin|>\n["
        )
