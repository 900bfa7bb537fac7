"""Texts that are hard on tokenizers, and a strategy that makes more of them."""

from __future__ import annotations

from hypothesis import strategies as st

ORDINARY = [
    "",
    " ",
    "\n\n\n",
    "Hello, world!",
    "  42 and 123456",
    "tabs\t\tand\r\nlines\n\n  indented",
    "Grüße, naïve café, e\u0301 combined",
    "東京は日本の首都です。你好，世界！",
    "👩‍👩‍👧‍👦🎉🇩🇪 family",
    "a < b > c | d [x] {y} <|almost",
    "<b>bold</b> <think>hm</think>",
    "ends with <",
    "ends with <|im",
    "[INS",
    "\ufffd is a character too",
    "\x00\x01\x7f",
]

FRAGMENTS = st.sampled_from(
    [
        *ORDINARY,
        "<|im_end|>",
        "<|im_",
        "end|>",
        "<|eot_id|>",
        "[INST]",
        "</s>",
        "<s>",
        "<",
        "|",
        ">",
        " ",
        "\n",
    ]
)

TEXTS = st.lists(FRAGMENTS | st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=6).map(
    "".join
)
