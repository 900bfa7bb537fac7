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
    "    four\n\n\n\n        eight\t \t mixed \n \r\n\r\n end   ",
    "\u3000全角\u3000空格\u00a0nbsp\u2009thin\u200bzero\ufeffbom",
    "한국어 문장과 \u1112\u1161\u11ab\u1100\u1173\u11af \u304b\u3099 が",
    "שלום עולם مرحبا بالعالم \u202eabc\u202c كِتَاب",
    "नमस्ते สวัสดีครับ ខ្មែរ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 Ａ１",
    "1234567890 3.14159 ٣٤٥ ½ Ⅷ 1,000,000 0x1F v1.2.3",
    "I'm IT'S they'LL we’ve don't 'tis rock'n'roll 'ſ",
    "🏳️‍🌈🏴󠁧󠁢󠁥󠁮󠁧󠁿👨🏽‍💻🤦🏻‍♂️ #️⃣ ☺️☺",
    "def f(x: int) -> list[str]:\n    return [f'{x!r}' for _ in range(10)]  # ok\n",
    "ﬁne ﬀ Å \u212b K \u212a \u03a9 \u2126 e\u0323\u0302 \u1ec7",
    "_under▁score _ <0x41>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa=================!!!!!!!!",
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
