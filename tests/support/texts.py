"""Texts that a tokenizer may stumble over, and random ones of letters that do."""
# ruff: noqa: RUF001 (letters that look like others are the point)

from __future__ import annotations

import random

TRICKY = [
    "", " ", "  ", "   ", " " * 17, "\n", "\n\n", "\r\n", "\t", " \n ", "a", " a", "a ", "  a  b   c    d     ",
    "\nDescribe the image.", "What is in this picture?", "USER: hi ASSISTANT:", "don't", "3.14159 1,000,000",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n", '{"key": [1, 2.5e-3, null]}',
    "naïve façade", "Grüße aus Köln", "e\u0301 é \u212b", "Ａ Ｂ ﬁ ㎏", "中文测试：你好，世界！",
    "Привет, мир", "עברית", "ไทย ภาษา",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈", "\u200b\u200d\ufeff\u00a0\u3000", "\x00\x01\x7f", "\ud7ff\ue000\U0010ffff",
    "▁", "▁a", " ▁ ▁▁", "<s>", "</s>", "a</s>b", "<unk>", "<0x0A>", "<0x41> and more", "<image>", "----========....",
    "-" * 33, "=" * 20, "aaaaaaaaaaa", "abababababab", " " * 64 + "end", "the the  the   the",
]  # fmt: skip
ALPHABETS = [
    "the an is of",
    "USER:ASSISTANT: ",
    "     ",
    "-=.*#",
    "\n\t ",
    "0123456789 ",
    "éàüß",
    "你好世界",
    "👍🏽\u200d",
    "▁<>/s",
]


def mixed(count: int, seed: int = 0) -> list[str]:
    """Random texts, the same in every run."""
    draw = random.Random(seed)

    def part() -> str:
        return "".join(draw.choices(draw.choice(ALPHABETS), k=draw.randint(1, 8)))

    return ["".join(part() for _ in range(draw.randint(1, 10))) for _ in range(count)]
