"""What a family's own code says about its text, for models whose files leave it unsaid.

Sources: each family's published tokenizer and generation code; `model_type` as in config.json.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from runtime.text.templates import shipped_template
from runtime.text.tokenizer_files import TokenizerFiles
from runtime.text.tokenizer_tiktoken import LLAMA3, QWEN, TiktokenRules


@dataclass(frozen=True, kw_only=True)
class TextFamily:
    """One family's text side.

    Attributes:
        tiktoken: the rules of its vocabulary where that is in tiktoken's format.
        special: tokens that mark structure, as far as the vocabulary has them.
        appended: special tokens that follow a sentencepiece vocabulary.
        begin: what begins a text unless tokenizer_config.json says otherwise; None is the bos token.
        stops: tokens that end an answer besides those that the model's files name.
        template: the name of our chat template for models that bring none.
    """

    tiktoken: TiktokenRules | None = None
    special: tuple[str, ...] = ()
    appended: tuple[str, ...] = ()
    begin: tuple[str | None, ...] = (None,)
    stops: tuple[str, ...] = ()
    template: str | None = None


_GEMMA = TextFamily(special=("<start_of_turn>", "<end_of_turn>"), stops=("<end_of_turn>",))
_FAMILIES = {
    "baichuan": TextFamily(begin=(), template="baichuan"),
    "chatglm": TextFamily(
        appended=(
            *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
            *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        ),
        begin=("[gMASK]", "sop"),
        stops=("<|user|>", "<|observation|>"),
        template="chatglm3",
    ),
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "internlm2": TextFamily(stops=("<|im_end|>",), template="internlm2"),
    "llama": TextFamily(tiktoken=LLAMA3),
    "qwen": TextFamily(
        tiktoken=QWEN, begin=(), stops=("<|im_end|>", "<|im_start|>", "<|endoftext|>"), template="qwen"
    ),
}
_OTHER = TextFamily()
_LLAMA2_CHAT = re.compile(r"llama-?2.*chat", re.IGNORECASE)


def text_family(config: dict[str, Any]) -> TextFamily:
    """The family of a model by its config.json."""
    return _FAMILIES.get(str(config.get("model_type")), _OTHER)


def own_templates(files: TokenizerFiles) -> dict[str, str]:
    """Our chat template for a model that brings none, as `default`; nothing for what is no chat model.

    Base models share an architecture with chat models, and are told apart by what else their files say.
    """
    model_type, generation = files.config.get("model_type"), files.generation_config
    name = text_family(files.config).template
    if model_type == "qwen" and generation.get("chat_format") == "raw":
        name = None
    if model_type == "baichuan" and not files.role_ids:
        name = None
    if model_type == "llama" and _LLAMA2_CHAT.search(str(files.config.get("_name_or_path"))):
        name = "llama2"
    return {} if name is None else {"default": shipped_template(name)}
