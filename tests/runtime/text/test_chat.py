"""Conversations as token ids: ordinary ones as transformers has them, forged ones harmless."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from transformers import AutoTokenizer

from runtime.text.chat import encode_chat
from runtime.text.template import ChatTemplate
from runtime.text.tokenizer import Tokenizer
from tests.runtime.text.templates import TEMPLATES, TOOLS, turns
from tests.runtime.text.texts import ORDINARY, TEXTS

SPECIAL = {
    "chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"],
    "pieces": ["<s>", "</s>", "[INST]", "[/INST]", "<unk>"],
}
Pair = tuple[Tokenizer, ChatTemplate, Any]


@pytest.fixture(scope="module")
def pairs(folders: dict[str, Path]) -> dict[str, Pair]:
    """Template name -> our tokenizer and template, and transformers' tokenizer with the same template."""
    found = {}
    for name, (source, kind) in TEMPLATES.items():
        tokenizer = Tokenizer.load(folders[kind])
        reference = AutoTokenizer.from_pretrained(folders[kind])
        reference.chat_template = source
        found[name] = (tokenizer, ChatTemplate(source, special_tokens=tokenizer.special_tokens), reference)
    return found


def reference_ids(reference: Any, messages: list[dict[str, Any]], **kwargs: Any) -> list[int]:
    encoding = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **kwargs)
    return encoding["input_ids"]  # type: ignore[no-any-return]


def special_ids(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    return [index for index in ids if index in tokenizer.special_ids]


@pytest.mark.parametrize("name", TEMPLATES)
class TestOrdinary:
    @pytest.mark.parametrize("text", ORDINARY)
    def test_ids_equal_transformers(self, pairs: dict[str, Pair], name: str, text: str) -> None:
        tokenizer, template, reference = pairs[name]
        messages = turns(text, "well", text + " " + text)
        assert encode_chat(tokenizer, template, messages) == reference_ids(reference, messages)

    def test_tools(self, pairs: dict[str, Pair], name: str) -> None:
        tokenizer, template, reference = pairs[name]
        expected = reference_ids(reference, turns("Hi"), tools=TOOLS)
        assert encode_chat(tokenizer, template, turns("Hi"), tools=TOOLS) == expected


@pytest.mark.parametrize("name", TEMPLATES)
class TestForged:
    def test_typed_special_tokens_stay_text(self, pairs: dict[str, Pair], name: str) -> None:
        tokenizer, template, _ = pairs[name]
        honest = special_ids(tokenizer, encode_chat(tokenizer, template, turns("Hi", "Ho", "Hey")))
        for token in SPECIAL[TEMPLATES[name][1]]:
            messages = turns(f"a{token}b", f"{token}{token}", f"x {token}")
            ids = encode_chat(tokenizer, template, messages)
            assert special_ids(tokenizer, ids) == honest
            assert tokenizer.decode(ids, skip_special_tokens=False) == tokenizer.decode(
                tokenizer.encode(template.render(messages), add_special_tokens=False),
                skip_special_tokens=False,
            )

    def test_also_in_tools(self, pairs: dict[str, Pair], name: str) -> None:
        tokenizer, template, _ = pairs[name]
        token = SPECIAL[TEMPLATES[name][1]][-1]
        forged: list[dict[str, Any]] = [
            {
                "type": "function",
                "function": {"name": f"f{token}", "description": token, "x": {token: [token]}},
            }
        ]
        honest = encode_chat(tokenizer, template, turns("Hi"), tools=TOOLS)
        ids = encode_chat(tokenizer, template, turns("Hi"), tools=forged)
        assert special_ids(tokenizer, ids) == special_ids(tokenizer, honest)

    @settings(max_examples=100, deadline=None)
    @given(text=TEXTS)
    def test_any_text(self, pairs: dict[str, Pair], name: str, text: str) -> None:
        tokenizer, template, reference = pairs[name]
        messages = turns(text, "well", text)
        ids = encode_chat(tokenizer, template, messages)
        honest = encode_chat(tokenizer, template, turns("Hi", "well", "Hi"))
        assert special_ids(tokenizer, ids) == special_ids(tokenizer, honest)
        typed = [index for index in tokenizer.special_ids if tokenizer.token_text(index) in text]
        if not typed:
            assert ids == reference_ids(reference, messages)


def test_a_token_in_two_parts_stays_text(pairs: dict[str, Pair]) -> None:
    tokenizer, template, _ = pairs["llama3"]
    halves = [{"type": "text", "text": "a <|eot"}, {"type": "text", "text": "_id|> b"}]
    whole = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    ids = encode_chat(tokenizer, template, [{"role": "user", "content": halves}])
    honest = encode_chat(tokenizer, template, [{"role": "user", "content": whole}])
    assert "<|eot_id|> b" in tokenizer.decode(ids)
    assert special_ids(tokenizer, ids) == special_ids(tokenizer, honest)


def test_the_templates_own_text_may_hold_special_tokens(pairs: dict[str, Pair]) -> None:
    tokenizer, _, _ = pairs["chatml"]
    template = ChatTemplate(
        "{{ eos_token }}{{ messages[0].content }}<|im_start|>", special_tokens=tokenizer.special_tokens
    )
    ids = encode_chat(tokenizer, template, turns("<|im_end|>"))
    assert ids[0] == tokenizer.id_of("<|im_end|>")
    assert ids[-1] == tokenizer.id_of("<|im_start|>")
    assert special_ids(tokenizer, ids) == [ids[0], ids[-1]]
