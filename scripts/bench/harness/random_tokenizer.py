"""A byte-level BPE tokenizer of any size whose every token is readable text.

Real in what it costs: as many entries and merges to read as the model that it stands for has, and tokens
about as long as a language's, which begin as others do. Each merge joins two tokens that exist already, so
that every text can be tokenized and every id be shown.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

BEGIN, END = "<|begin|>", "<|end|>"
# How many tokens of 2, 3, 4 ... characters SmolLM2's vocabulary has, in thousandths.
_LENGTHS = (37, 87, 127, 135, 126, 116, 103, 85, 67, 47, 29, 18, 10, 4)
_LONGEST_TAIL = 4
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def byte_symbols() -> list[str]:
    """The printable characters that stand for the 256 bytes, in GPT-2's order of bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def vocabulary(size: int) -> tuple[dict[str, int], list[list[str]]]:
    """`size` tokens with their ids, and the merges that make the longer ones. Two more are special."""
    draw = random.Random(0)
    tokens = {symbol: index for index, symbol in enumerate(byte_symbols())}
    space = byte_symbols()[ord(" ")]
    by_length = {1: [space, *"abcdefghijklmnopqrstuvwxyz"]}
    merges: list[list[str]] = []
    while len(tokens) < size:
        (length,) = draw.choices(range(2, 2 + len(_LENGTHS)), _LENGTHS)
        tail = draw.randint(1, min(_LONGEST_TAIL, length - 1))
        if length - tail not in by_length or tail not in by_length:
            continue
        left, right = draw.choice(by_length[length - tail]), draw.choice(by_length[tail])
        whole = left + right
        if whole in tokens or right.startswith(space):
            continue
        tokens[whole] = len(tokens)
        merges.append([left, right])
        by_length.setdefault(length, []).append(whole)
    return tokens, merges


def write(folder: Path, vocab_size: int) -> tuple[int, int]:
    """tokenizer.json and tokenizer_config.json for a model of `vocab_size` ids (258 at least).

    Returns the ids of the tokens that begin and end a text: the last two.
    """
    tokens, merges = vocabulary(vocab_size - 2)
    begin, end = vocab_size - 2, vocab_size - 1
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(begin, BEGIN), _special(end, END)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": tokens,
            "merges": merges,
        },
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return begin, end


def _special(index: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": content, "special": True, **flags}
