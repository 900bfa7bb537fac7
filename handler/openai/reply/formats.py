"""The formats of replies by name, and how a model's own is recognised."""

from __future__ import annotations

import hashlib
import secrets
import string
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from handler.openai.reply import call_grammar, mistral
from handler.openai.reply.bare_json import BareJsonCalls
from handler.openai.reply.call_grammar import CallGrammar, CallRules
from handler.openai.reply.chatglm3 import ChatGlm3Calls
from handler.openai.reply.mistral import MistralCalls
from handler.openai.reply.said import CallReader
from handler.openai.reply.tagged import TaggedCalls

if TYPE_CHECKING:
    from runtime.text.model_text import ModelText

_ALPHANUMERIC = string.ascii_letters + string.digits


@dataclass(frozen=True)
class CallFormat:
    """How a family writes tool calls. `tags` are the tokens that must be seen to find them.

    `grammar` says what may be written. `id_length` is set where the family's chat template takes only ids
    of that length.
    """

    reader: Callable[[Collection[str]], CallReader]
    grammar: Callable[[CallRules], CallGrammar]
    tags: tuple[str, ...] = ()
    id_length: int | None = None
    always: bool = False  # also needed for replies to requests without tools

    def new_id(self) -> str:
        """An id for a call."""
        if self.id_length is None:
            return f"call_{secrets.token_hex(12)}"
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(self.id_length))

    def fitting_id(self, given: str) -> str:
        """The id as the template takes it: itself where it may, else one that always stands for it."""
        if self.id_length is None or (len(given) == self.id_length and given.isascii() and given.isalnum()):
            return given
        return hashlib.sha256(given.encode()).hexdigest()[: self.id_length]


CALL_FORMATS = {
    "hermes": CallFormat(
        lambda names: TaggedCalls("<tool_call>", "</tool_call>"),
        call_grammar.hermes,
        ("<tool_call>", "</tool_call>"),
    ),
    "llama3_json": CallFormat(BareJsonCalls, call_grammar.llama3_json, ("<|python_tag|>",)),
    "mistral": CallFormat(
        lambda names: MistralCalls(),
        call_grammar.mistral,
        (mistral.BEGIN, mistral.ARGUMENTS, mistral.CALL_ID),
        id_length=9,
    ),
    "internlm": CallFormat(
        lambda names: TaggedCalls("<|action_start|><|plugin|>", "<|action_end|>"),
        call_grammar.internlm,
        ("<|action_start|>", "<|plugin|>", "<|action_end|>"),
    ),
    "chatglm3": CallFormat(ChatGlm3Calls, call_grammar.chatglm3, always=True),
    "json": CallFormat(BareJsonCalls, call_grammar.bare_json),
}
# What a template or a vocabulary holds only where the family writes its calls so.
_SIGNS = (
    ("internlm", "<|action_start|>"),
    ("mistral", mistral.BEGIN),
    ("hermes", "<tool_call>"),
    ("llama3_json", "<|python_tag|>"),
)

REASONING_TAGS = {
    "deepseek_r1": ("<think>", "</think>"),
    "qwen3": ("<think>", "</think>"),
    "mistral": ("[THINK]", "[/THINK]"),
}


def call_format(name: str, text: ModelText) -> CallFormat | None:
    """The format of this name; "auto" finds the model's own, "none" is none."""
    if name == "none":
        return None
    return CALL_FORMATS[_own_call_format(text) if name == "auto" else name]


def reasoning_tags(name: str, text: ModelText) -> tuple[str, str] | None:
    """The tags around reasoning; "auto" finds the model's own, None for a model that has none."""
    if name == "none":
        return None
    if name != "auto":
        return REASONING_TAGS[name]
    for begin, end in dict.fromkeys(REASONING_TAGS.values()):
        if _knows(text, end):
            return begin, end
    return None


def _own_call_format(text: ModelText) -> str:
    tokenizer = text.tokenizer
    if tokenizer.id_of("<|observation|>") is not None and tokenizer.id_of("sop") is not None:
        return "chatglm3"
    if text.template is None or "tools" not in text.template.variables:
        return "json"  # what a model is asked for whose template cannot show tools
    for name, sign in _SIGNS:
        if text.template.mentions(sign):
            return name
    return next((name for name, sign in _SIGNS if tokenizer.id_of(sign) is not None), "json")


def _knows(text: ModelText, tag: str) -> bool:
    in_template = text.template is not None and text.template.mentions(tag)
    return in_template or text.tokenizer.id_of(tag) is not None
