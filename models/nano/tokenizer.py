"""A small byte-level tokenizer of whole words with ChatML's tokens, and prompts as the run time tokenises them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from fastvlm_mlx.prompt import ask, tokenize
from fastvlm_mlx.template import CHATML, END, START
from fastvlm_mlx.tokenizer import Tokenizer
from fastvlm_mlx.types import IMAGE_TOKEN_ID
from nano.phrases import Question

PAD = "<|endoftext|>"
SPECIAL = (PAD, START, END)  # ids 0, 1, 2
MOST = 1024  # entries of the vocabulary
RAREST = 3  # times that a word must have been seen
SHOWN = ("reading", "describe")  # kinds of questions whose answers spell what a picture shows
TEMPLATE = f"system\n{CHATML.system}\nuser\nassistant\n"


def make_tokenizer(questions: Iterable[Question]) -> Backend:
    """Byte-level BPE whose vocabulary is the bytes and the phrases' whole words, without any merges.

    Everything that is no word of the phrases, such as a word or a number in a picture, is spelled letter by
    letter: a model that knew such words as a whole could only read those that it has seen.

    Args:
        questions: of many scenes; the same ones give the same ids.
    """
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    words = _words(questions, splitter)
    entries = dict.fromkeys([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words])
    vocabulary = {text: index for index, text in enumerate(list(entries)[:MOST])}
    tokenizer = Backend(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return tokenizer


def _words(questions: Iterable[Question], splitter: pre_tokenizers.PreTokenizer) -> list[str]:
    """Words of prompts and of answers that don't spell what a picture shows, the most frequent first."""

    def split(text: str) -> list[str]:
        return [piece for piece, _ in splitter.pre_tokenize_str(text)]

    known, described, shown = Counter(split(TEMPLATE) * RAREST), Counter[str](), set[str]()
    for question in questions:
        known.update(split(question.prompt))
        if question.kind == "reading":
            shown.update(split(question.answer))
        else:
            (described if question.kind in SHOWN else known).update(split(question.answer))
    for word, times in described.items():
        if word not in shown and word.removeprefix("Ġ") not in shown:
            known[word] += times
    return [w for w, times in sorted(known.items(), key=lambda item: (-item[1], item[0])) if times >= RAREST]


class Prompts:
    """Ids of questions and answers, by the run time's own functions."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = Tokenizer(path)
        self.end = self.tokenizer.special_id(END)
        self.pad = self.tokenizer.special_id(PAD)
        self.size = self.tokenizer.size
        self.question = lru_cache(maxsize=65536)(self._question)

    def _question(self, prompt: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids before and after the image."""
        ids = tokenize(ask(prompt, images=1), self.tokenizer)
        place = ids.index(IMAGE_TOKEN_ID)
        return tuple(ids[:place]), tuple(ids[place + 1 :])

    def answer(self, text: str) -> list[int]:
        """Ids of an answer and of its end."""
        return [*self.tokenizer.encode(text), self.end]
