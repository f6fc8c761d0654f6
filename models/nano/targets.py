"""Batches: pictures, what their cells hold, and all of a picture's questions packed into one sequence.

A packed sequence is the common beginning (system prompt and image) once, then every question with its answer.
A question sees the beginning and itself, at the positions that it would have alone, so one pass computes what
a pass per question would.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nano.phrases import Question
from nano.tokenizer import Prompts
from nano.vocabulary import PAGE, SHAPED, SIGN

IGNORE = -100  # cross_entropy's own
BEGINNING, PADDING = 0, -1  # in `segment`; questions count from 1
Batch = dict[str, Tensor]


class Scene(Protocol):
    """A picture and what is known about it; see nano.scenes."""

    image: np.ndarray
    questions: tuple[Question, ...]
    background: int
    cells: np.ndarray
    inks: np.ndarray
    letters: np.ndarray
    dense: np.ndarray
    spots: np.ndarray


SceneMaker = Callable[..., Any]  # makes a Scene, or a frozen one, which isn't a Scene to a type checker


def stack(scenes: Sequence[Scene]) -> Batch:
    """Pictures (B, 3, S, S) uint8 and the targets of all linear heads."""
    letters, inks = (torch.from_numpy(np.stack([getattr(s, n) for s in scenes])).long() for n in ("letters", "inks"))
    return {
        "pixels": torch.from_numpy(np.stack([s.image.transpose(2, 0, 1) for s in scenes])),
        "background": torch.tensor([int(s.background) for s in scenes]),
        "cells": torch.from_numpy(np.stack([s.cells for s in scenes])).long(),
        "inks": torch.where(inks < 0, IGNORE, inks),
        "letters": torch.where(letters < 0, IGNORE, letters),
        "dense": torch.from_numpy(np.stack([s.dense for s in scenes])).long(),
        "spots": torch.from_numpy(np.stack([s.spots for s in scenes])).long(),
    }


def pack(questions: Sequence[Sequence[Question]], prompts: Prompts, image_tokens: int, kinds: Sequence[str]) -> Batch:
    """Pack the questions of each picture.

    Returns:
        All (B, T): ids (0 where the image stands), position, segment, label (the token that follows, IGNORE
        where none is to be learnt) and owner (the number of the question a label belongs to); image_start, a
        number; kind (Q,), the kind of each question.
    """
    rows = [_row(asked, prompts, image_tokens) for asked in questions]
    length = max(len(row[0]) for row in rows)
    fill = {"ids": prompts.pad, "position": 0, "segment": PADDING, "label": IGNORE, "owner": 0}
    out = {name: torch.full((len(rows), length), value) for name, value in fill.items()}
    first = 0
    for b, (row, asked) in enumerate(zip(rows, questions, strict=True)):
        for name, values in zip(fill, row, strict=True):
            out[name][b, : len(values)] = torch.tensor(values)
        out["owner"][b] += first
        first += len(asked)
    before, _ = prompts.question("")
    out["image_start"] = torch.tensor(len(before))
    out["kind"] = torch.tensor([kinds.index(q.kind) for asked in questions for q in asked])
    return out


def _row(asked: Sequence[Question], prompts: Prompts, image_tokens: int) -> tuple[list[int], ...]:
    before, _ = prompts.question("")
    start = len(before) + image_tokens
    ids, position, segment = [*before, *[0] * image_tokens], list(range(start)), [BEGINNING] * start
    label, owner = [IGNORE] * start, [0] * start
    for number, question in enumerate(asked):
        _, after = prompts.question(question.prompt)
        answer = prompts.answer(question.answer)
        read = [*after, *answer[:-1]]
        ids += read
        position += range(start, start + len(read))
        segment += [number + 1] * len(read)
        label += [IGNORE] * (len(after) - 1) + answer
        owner += [number] * len(read)
    return ids, position, segment, label, owner


def attention_mask(segment: Tensor) -> Tensor:
    """(B, T) -> (B, 1, T, T), True where a row may look."""
    length = segment.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment.device).tril()
    own = segment[:, :, None] == segment[:, None, :]
    return ((own | (segment == BEGINNING)[:, None, :]) & causal)[:, None]


class Batches(Dataset[Batch]):
    """Batch number i of a stage, made from seeds: the same for whoever asks, so that resuming changes nothing.

    Args:
        make_scene: see nano.scenes.
        kinds: names of the kinds of questions.
        first_seed: of the stage; batch i takes the `size` seeds from first_seed + i * size on.
        size: pictures.
        side: of the pictures, pixels.
        tokenizer: tokenizer.json; None leaves the questions out.
        most: questions of a picture, drawn by its seed.
        split: "train", or the name of the held-out one.
        pages: part of a batch's pictures that are pages, for which there are no questions.
        signs: part of them that are scenes with a sign; there are some among the others, too.
        shapes: part of them that are scenes of shapes, likewise.
    """

    def __init__(
        self,
        make_scene: SceneMaker,
        kinds: Sequence[str],
        first_seed: int,
        size: int,
        side: int,
        tokenizer: Path | None = None,
        most: int = 8,
        split: str = "train",
        pages: float = 0.0,
        signs: float = 0.0,
        shapes: float = 0.0,
    ) -> None:
        self.make_scene, self.kinds, self.first_seed, self.size, self.side = make_scene, kinds, first_seed, size, side
        self.tokenizer, self.most, self.split = tokenizer, most, split
        shares = ((PAGE, pages), (SIGN, signs), (SHAPED, shapes))
        self.families: list[str | None] = [family for family, share in shares for _ in range(round(share * size))]
        self.families += [None] * (size - len(self.families))
        self._prompts: Prompts | None = None

    def __getitem__(self, index: int) -> Batch:
        """Make a batch."""
        seeds = range(self.first_seed + index * self.size, self.first_seed + (index + 1) * self.size)
        scenes = [
            self.make_scene(seed, split=self.split, side=self.side, family=family)
            for seed, family in zip(seeds, self.families, strict=True)
        ]
        batch = stack(scenes)
        if self.tokenizer:
            self._prompts = self._prompts or Prompts(self.tokenizer)  # in the worker: it can't be pickled
            asked = [self._choose(s.questions, seed) for s, seed in zip(scenes, seeds, strict=True)]
            batch |= pack(asked, self._prompts, (self.side // 64) ** 2, self.kinds)
        return batch

    def _choose(self, questions: Sequence[Question], seed: int) -> Sequence[Question]:
        if len(questions) <= self.most:
            return questions
        return random.Random(seed).sample(list(questions), self.most)
