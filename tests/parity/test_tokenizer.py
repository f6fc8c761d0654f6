"""The converter's tokenizer.json against transformers' Qwen2 tokenizer, from the same published files."""
# ruff: noqa: RUF001 (letters that look like others are the point)

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fastvlm_convert.tokenizer import read_tokenizer
from fastvlm_mlx import prompt
from fastvlm_mlx.tokenizer import Tokenizer
from support.qwen_files import ADDED, write_qwen_files

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # their warnings are none of ours

# "Describe the image." under apple/ml-fastvlm 592b4ad with Qwen2's tokenizer; -200 is the image.
DESCRIBE_THE_IMAGE = [
    *[151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198],
    *[151644, 872, 198, -200, 198, 74785, 279, 2168, 13, 151645, 198],
    *[151644, 77091, 198],
]  # fmt: skip
WRITTEN = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\n\n\n",
    "\t\t x",
    "a  b   c    d",
    " leading",
    "trailing   ",
    "x \n y",
    "x\n  \n y",
    "Hello, world!",
    "don't DON'T I'm we'll he'd they've you're it's 'S 'LL",
    "3.14159 1,000,000 12345678901234567890",
    "²³¹ ½ Ⅷ ٣٤٥ 一二三",
    "e\u0301 é \u1e9b\u0323 \ufb01 \u212b \u2126",
    "Ａ Ｂ ﬁ ㎏",
    "naïve façade coöperate",
    "中文测试：你好，世界！",
    "日本語のテキスト、カタカナ",
    "한국어 텍스트",
    "\u1112\u1161\u11ab",
    "Привет, мир",
    "עברית",
    "العربية ١٢",
    "हिन्दी क्षत्रिय",
    "ไทย ภาษา",
    "👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷",
    "❤️❤",
    "\u200b\u200d\ufeff\u00a0\u3000\u2003x",
    "\x00\x01\x7f",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    '{"key": [1, 2.5e-3, null], "s": "\\n"}',
    "<html>\r\n\t<p class='x'>&amp;</p>\r\n</html>",
    "a_b-c.d/e\\f@g:h;i",
    "https://example.org/a?b=c&d=%20#e",
    "$x^2 + \\frac{1}{2}$",
    "--- === ***  ///  !!!???",
    "...\n\n...",
    "…—–“”‘’",
    "<image>",
    "<image>\nWhat is this?",
    "<|im_start|>",
    "a<|im_end|>b",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_",
    "|>",
    "\U0001d54f\U0001f600\U00020000",
    "\ud7ff\ue000",
    "ǅ ß ẞ İ ı ſ",
    "a\u0300\u0316b\u0316\u0300",
    "z" * 300,
    " " * 130,
]
ALPHABETS = [
    "abcdefghijklmnopqrstuvwxyz",
    "ABCXYZ",
    "0123456789",
    "     ",
    "\n\r\t \u00a0\u3000",
    ".,;:!?'\"()[]{}<>|/\\@#$%^&*-_=+~`",
    "éàüñçßøåœ",
    "e\u0301\u0300\u0323\u0327o",
    "абвгдеж",
    "的一是不了人我在有他这",
    "あいうえおカキクケコ",
    "가나다라마\u1100\u1161\u11a8",
    "אבגדه١٢",
    "😀🎉👩🏽\u200d❤️",
    "'s't're've'm'll'd",
]


def varied_strings() -> list[str]:
    """Written ones, and 400 mixed from the alphabets; the same in every run."""
    draw = random.Random(0)
    mixed = [
        "".join("".join(draw.choices(draw.choice(ALPHABETS), k=draw.randint(1, 6))) for _ in range(draw.randint(1, 12)))
        for _ in range(400)
    ]
    return WRITTEN + mixed


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_qwen_files(tmp_path_factory.mktemp("qwen"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(i): {"content": text, "special": True} for text, i in ADDED.items()},
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def theirs(timm_ready: None, files: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files)


@pytest.fixture(scope="module")
def converted(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = read_tokenizer(files)
    assert tokenizer
    path = tmp_path_factory.mktemp("bundle") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_ids_with_special_tokens(converted: Path, theirs: Any) -> None:
    from tokenizers import Tokenizer as Backend

    ours = Backend.from_file(str(converted))
    for text in varied_strings():
        assert ours.encode(text).ids == theirs.encode(text), repr(text)


def test_ids_of_plain_text(converted: Path, theirs: Any) -> None:
    """The spelling of a special token is text: a user's words can't end the user's turn."""
    ours = Tokenizer(converted)
    for text in varied_strings():
        assert ours.encode(text) == theirs.encode(text, split_special_tokens=True), repr(text)


def test_text_of_ids(converted: Path, theirs: Any) -> None:
    ours = Tokenizer(converted)
    for text in varied_strings():
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)


def test_streamed_text_of_ids(converted: Path, theirs: Any) -> None:
    ours = Tokenizer(converted)
    for text in varied_strings():
        stream, ids = ours.stream(), theirs.encode(text)
        shown = "".join([stream.add(token) for token in ids]) + stream.finish()
        assert shown == theirs.decode(ids, skip_special_tokens=True), repr(text)


def test_vocabulary(converted: Path, theirs: Any) -> None:
    from tokenizers import Tokenizer as Backend

    assert Backend.from_file(str(converted)).get_vocab() == theirs.get_vocab()
    assert Tokenizer(converted).size == len(theirs)


def test_template(converted: Path) -> None:
    ours = Tokenizer(converted)
    assert prompt.tokenize(prompt.ask("Describe the image.", 1), ours) == DESCRIBE_THE_IMAGE
