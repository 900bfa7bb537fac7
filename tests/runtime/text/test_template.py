"""Chat templates: rendered as transformers renders them, and within bounds whatever they do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from runtime.errors import RequestError
from runtime.text.template import ChatTemplate, ChatTemplateError
from runtime.text.tokenizer import Tokenizer
from tests.runtime.text.templates import TEMPLATES, TOOLS, turns
from tests.runtime.text.texts import ORDINARY

CONVERSATIONS = [
    turns("Hi"),
    turns("  padded \n", "an answer ", "naïve <b> & 'quotes' \"too\" {{ not a template }}"),
    turns(*(text or "empty" for text in ORDINARY), "and?"),
]


def both(folders: dict[str, Path], name: str) -> tuple[ChatTemplate, Any]:
    source, kind = TEMPLATES[name]
    tokenizer = Tokenizer.load(folders[kind])
    reference = AutoTokenizer.from_pretrained(folders[kind])
    reference.chat_template = source
    return ChatTemplate(source, special_tokens=tokenizer.special_tokens), reference


@pytest.mark.parametrize("name", TEMPLATES)
class TestAgainstTransformers:
    def test_conversations(self, folders: dict[str, Path], name: str) -> None:
        ours, theirs = both(folders, name)
        for messages in CONVERSATIONS:
            for prompt in (True, False):
                expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
                assert ours.render(messages, add_generation_prompt=prompt) == expected

    def test_tools(self, folders: dict[str, Path], name: str) -> None:
        ours, theirs = both(folders, name)
        expected = theirs.apply_chat_template(
            turns("Hi"), tools=TOOLS, tokenize=False, add_generation_prompt=True
        )
        assert ours.render(turns("Hi"), tools=TOOLS) == expected


SOURCES = """\
{{ messages | tojson }}|{{ messages | tojson(indent=4, sort_keys=true) }}
{{ messages | tojson(ensure_ascii=true, separators=(',', ':')) }}
{% for i in range(9) %}{% if i == 3 %}{% continue %}{% endif %}{{ i ~ loop.index0 ~ loop.first }}{% endfor %}
{% for i in range(9) %}{% if i > 5 %}{% break %}{% endif %}{{ loop.previtem }}{% else %}none{% endfor %}
  {% set x = ['a'] + ['b', 'c'] %}  {{ x[::-1] | join(', ') }}  {# note #} {{ 'ab' * 3 }}{{ x[0] }}{{ x[1:] }}
{{ '%s is %05.1f%%' % ('x', 2.5) }}{{ '{:>6}'.format(1) }}{{ '%d'|format(7) }}{{ 2 ** 10 }}{{ 7 * 6 + 1 }}
{{ messages | map(attribute='role') | list | length }}{{ messages[0].content.split('i')[0] }}
{{ 'aXb' | indent(2) }}{{ 'x'.center(9) }}{{ 'aXb'.replace('X', '--') }}{{ undefined_name }}
{% set ns = namespace(self=1, n=2) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}
{% for m in [1, [2, 3]] recursive %}{{ m if m is number else loop(m) }},{% endfor %}
{% macro f(x, y='d') %}[{{ x ~ y }}{{ caller() if caller }}]{% endmacro %}{{ f(2, y=none) }}
{% macro f(x) %}[{{ x }}{{ caller('z') }}]{% endmacro %}{% call(z) f(1) %}in{{ z }}{% endcall %}
{% set text %}{% for m in messages %}{{ m.content }}{% endfor %}{% endset %}{{ text | upper | trim | length }}
{{ strftime_now('%Y') | length }}{{ bos_token }}{{ eos_token }}{{ tools is none }}{{ documents is none }}
{% filter upper %}{{ 'a' ~ 1 ~ none ~ true ~ 1.5 }}{% endfilter %}{{ (1, 2) + (3,) }}
{{ {'a': [1]} }}{{ dict(b=2) }}{{ namespace(self=3).self }}
{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}{% set a, b = 1, (2, 3) %}{{ b }}
{% generation %}{{ messages[-1].content }}{% endgeneration %}{{ messages[0]['role'] in ['user', 'tool'] }}
{{ messages | selectattr('role', 'equalto', 'user') | list }}
{{ messages | rejectattr('role') | first | default('-') }}{{ messages is iterable }}{{ tools is defined }}
{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.last }}{% endfor %}{{ 'x' if false }}
""".splitlines()


class TestVariants:
    def test_tool_calls_and_variables(self, folders: dict[str, Path]) -> None:
        ours, theirs = both(folders, "chatml")
        calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <"}}}]
        messages = [
            {"role": "system", "content": "Be brief."},
            *turns("Weather?"),
            {"role": "assistant", "tool_calls": calls},
            {"role": "tool", "content": '{"sky": "blue"}'},
        ]
        expected = theirs.apply_chat_template(
            messages, tools=TOOLS, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        assert "<think>" in expected
        assert ours.render(messages, tools=TOOLS, enable_thinking=False) == expected

    def test_content_in_parts(self, folders: dict[str, Path]) -> None:
        ours, theirs = both(folders, "llama3")
        parts = [{"type": "text", "text": "a "}, {"type": "image"}, {"type": "text", "text": " b"}]
        messages = [{"role": "user", "content": parts}, {"role": "ignored", "content": "x"}]
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert ours.render(messages) == expected

    @pytest.mark.parametrize("source", SOURCES)
    def test_what_templates_can_use(self, folders: dict[str, Path], source: str) -> None:
        folder = folders["chatml"]
        reference = AutoTokenizer.from_pretrained(folder)
        expected = reference.apply_chat_template(turns("Hi é <b>"), chat_template=source, tokenize=False)
        ours = ChatTemplate(source, special_tokens=Tokenizer.load(folder).special_tokens)
        assert ours.render(turns("Hi é <b>"), add_generation_prompt=False) == expected

    def test_template_for_tools(self) -> None:
        template = ChatTemplate({"default": "plain", "tool_use": "tools"})
        assert template.render(turns("Hi")) == "plain"
        assert template.render(turns("Hi"), tools=TOOLS) == "tools"
        assert ChatTemplate({"default": "plain"}).render(turns("Hi"), tools=TOOLS) == "plain"

    def test_template_of_a_folder(self, folders: dict[str, Path], tmp_path: Path) -> None:
        shutil.copy(folders["chatml"] / "tokenizer.json", tmp_path)
        assert ChatTemplate.of(Tokenizer.load(tmp_path)) is None
        config = {"chat_template": "{{ bos_token }}!", "bos_token": "<|im_start|>"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        template = ChatTemplate.of(Tokenizer.load(tmp_path))
        assert template is not None
        assert template.render([]) == "<|im_start|>!"


class TestErrors:
    def test_the_templates_own_words(self, folders: dict[str, Path]) -> None:
        template, _ = both(folders, "mistral")
        with pytest.raises(RequestError, match="Roles must take turns") as caught:
            template.render([{"role": "assistant", "content": "Hi"}])
        assert caught.value.param == "messages"

    def test_messages_that_do_not_fit(self, folders: dict[str, Path]) -> None:
        template, _ = both(folders, "chatml")
        with pytest.raises(RequestError, match="refuses these messages"):
            template.render([{"role": "user", "content": None}])

    def test_no_template_at_all(self) -> None:
        with pytest.raises(ChatTemplateError, match="line 2"):
            ChatTemplate("{{ 1 }}\n{% if %}")
        with pytest.raises(ChatTemplateError, match="nested too deeply"):
            ChatTemplate("{{" + "(" * 5000 + ")" * 5000 + "}}")
        with pytest.raises(ChatTemplateError, match=r"'default'.*rag"):
            ChatTemplate({"rag": "x"})


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self.__init__.__globals__.__builtins__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ namespace.__init__.__globals__['json'] }}",
        "{{ ('{0.__class__.__init__.__globals__}').format(raise_exception) }}",
        "{{ ('{0.__class__}' | attr('format'))(raise_exception) }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
    ],
)
def test_nothing_can_be_reached(source: str) -> None:
    try:
        text = ChatTemplate(source).render(turns("Hi"))
    except RequestError:
        return
    # Jinja shows what is out of reach as undefined, which is empty.
    assert text == ""


def loop(body: str, variable: str = "a", over: str = "range(99999)") -> str:
    return f"{{% for {variable} in {over} %}}{body}{{% endfor %}}"


def repeat(expression: str, start: str) -> str:
    """Put the expression, of ns.x, into ns.x sixty times."""
    body = "{% set ns.x = " + expression + " %}"
    return f"{{% set ns = namespace(x={start}) %}}" + loop(body, over="range(60)")


def macro(body: str, call: str) -> str:
    return "{% macro f(n) %}" + body + "{% endmacro %}" + call


ENDLESS = {
    "loops in loops": loop(loop(loop("", "c"), "b")),
    "a range beyond the sandbox": loop(loop("", over="range(10**6)"), over="range(10**6)"),
    "a macro that calls itself twice": macro(
        "{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}", "{{ f(80) }}"
    ),
    "a macro that calls itself for ever": macro("{{ f(n) }}", "{{ f(1) }}"),
    "a recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "loops in filters": loop(loop("{{ [1] | map('string') | list | length }}", "b")),
    "a loop whose test loops": macro(loop(""), loop("", over="range(99999) if f(1)")),
    "a call block": macro(loop("{{ caller() }}"), "{% call f(1) %}" + loop("", "b") + "{% endcall %}"),
}
TOO_LARGE = {
    "output": loop("{{ 'abc' * 10000 }}"),
    "output of a block": "{% set x %}" + loop("{{ 'abc' * 10000 }}") + "{% endset %}",
    "slices in a block": "{% set x = 'a' * 10**7 %}{% set y %}" + loop("{{ x[1:] }}") + "{% endset %}",
    "repetition": "{{ 'a' * 10**9 }}",
    "repetition from the right": "{{ 10**9 * 'a' }}",
    "a list": "{{ ([1] * 10**9) | length }}",
    "doubling with ~": repeat("ns.x ~ ns.x", "'aa'"),
    "doubling with +": repeat("ns.x + ns.x", "'aa'"),
    "doubling a list": repeat("ns.x + ns.x", "[1]"),
    "a list of lists": repeat("[ns.x, ns.x]", "[]") + "{{ ns.x }}",
    "a tuple of tuples": repeat("(ns.x, ns.x)", "[]") + "{{ ns.x | tojson }}",
    "a dict of dicts": repeat("{'a': ns.x, 'b': ns.x}", "[]") + "{{ ns.x == 1 }}",
    "a dict that is called": repeat("dict(a=ns.x, b=ns.x)", "[]") + "{{ ns.x }}",
    "batches of lists": repeat("(ns.x + ns.x) | batch(9) | list", "[1]") + "{{ ns.x }}",
    "a power": "{{ (10 ** (10 ** 10)) | length }}",
    "repeated squares": repeat("ns.x * ns.x", "9"),
    "a padding filter": "{{ 'x' | center(10**10) }}",
    "a padding method": "{{ 'x'.ljust(10**10) }}",
    "an indent": "{{ ('\n' * 10**5) | indent(10**5) }}",
    "replacing": "{{ ('x' * 10**6).replace('x', 'y' * 10**6) }}",
    "joining": "{{ range(99999) | map('string') | join('x' * 10**6) }}",
    "joining the same": "{{ (['x' * 10**6] * 10**5) | join }}",
    "a printf width": "{{ '%9999999999d' % 1 }}",
    "a printf width from an argument": "{{ '%*d' % (10**10, 1) }}",
    "a format width": "{{ '{:9999999999}'.format(1) }}",
    "a format width from an argument": "{{ '{:{}}'.format(1, 10**10) }}",
    "a format filter": "{{ '%9999999999d' | format(1) }}",
    "an indent of json": "{{ messages | tojson(indent=10**9) }}",
    "batches": "{{ [1] | batch(10**9, 'x') | list | length }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_endless_templates_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.text.template._TIME_LIMIT_S", 0.2)
    with pytest.raises(RequestError, match=r"too long|without end|Range too big"):
        ChatTemplate(ENDLESS[name]).render(turns("Hi"))


@pytest.mark.parametrize("name", TOO_LARGE)
def test_nothing_grows_too_large(name: str) -> None:
    with pytest.raises(RequestError, match=r"too large|too wide"):
        ChatTemplate(TOO_LARGE[name]).render(turns("Hi"))


def test_a_long_conversation_is_no_trouble() -> None:
    source, _ = TEMPLATES["chatml"]
    messages = turns(*["word " * 2000] * 401)
    assert ChatTemplate(source).render(messages).count("word") == 2000 * 401
