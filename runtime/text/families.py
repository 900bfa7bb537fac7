"""What a family's own code says about its text, for models whose files leave it unsaid.

Sources: each family's published tokenizer and generation code; `model_type` as in config.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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


def text_family(config: dict[str, Any]) -> TextFamily:
    """The family of a model by its config.json."""
    return _FAMILIES.get(str(config.get("model_type")), _OTHER)
