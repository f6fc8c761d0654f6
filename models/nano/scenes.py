#!/usr/bin/env python3
"""Pictures with questions and answers, for training a small vision-language model and for judging one.

    scenes.py OUT --split held-out --count 1000

A scene is made from its split and seed alone, so a data set is two numbers. Held-out scenes come from other
seeds, and three in four of them show what training never does: a font, a word or number, a shape in a colour,
a photograph.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MODELS = Path(__file__).resolve().parents[1]
if str(MODELS) not in sys.path:  # run as a script, Python looks in this folder, not in the one above
    sys.path.insert(0, str(MODELS))

from fastvlm_mlx.commands import add_common, run  # noqa: E402
from fastvlm_mlx.errors import InputError  # noqa: E402
from nano.backdrops import draw_backdrop  # noqa: E402
from nano.charts import draw_chart  # noqa: E402
from nano.dense import dense_of, spots_of  # noqa: E402
from nano.dice import Dice  # noqa: E402
from nano.lettering import draw_lettering, inks_of, letters_of  # noqa: E402
from nano.pages import letters_on  # noqa: E402
from nano.phrases import Question  # noqa: E402
from nano.planning import plan_scene  # noqa: E402
from nano.questions import ask_all  # noqa: E402
from nano.settings import SIDE  # noqa: E402
from nano.shapes import cells_of, draw_thing  # noqa: E402
from nano.vocabulary import (  # noqa: E402
    ALPHABET,
    BACKGROUNDS,
    COLOURS,
    FAMILIES,
    KINDS,
    LETTERS_PER_CELL,
    PAGE,
    SHAPES,
    SPLITS,
)

__all__ = [
    "ALPHABET",
    "BACKGROUNDS",
    "COLOURS",
    "FAMILIES",
    "KINDS",
    "LETTERS_PER_CELL",
    "PAGE",
    "SHAPES",
    "SPLITS",
    "Question",
    "Scene",
    "make_scene",
    "write_scenes",
]


LEAST_SIDE = 32  # pixels


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and what is asked about it.

    Attributes:
        image: (side, side, 3) uint8, RGB.
        questions: four to eight, of several kinds; none about a page.
        background: index into BACKGROUNDS.
        cells: (4, 4, 3) int64: shape, colour and ninth of what has its centre in the cell, indices + 1; 0 for none.
        inks: (4, 4) int64: colour of the characters whose centres lie in the cell, index into COLOURS + 1; 0 for
            none, -1 where it isn't one colour, or one that is asked for.
        letters: (4, 4, LETTERS_PER_CELL) int64: characters whose centres lie in the cell, from left to right,
            indices into ALPHABET + 1, then zeros; -1 in cells that several texts of a page share.
        dense: (side // 16, side // 16, 3) int64: what lies at the middle of each position of a finer grid, by
            row and column: shape, its colour or that of a chart's bar or a text, and letter, indices + 1; 0 for none. A
            shape fills its disc. A character fills its box, turned with the text; one whose box covers no
            middle is where its own centre lies, unless another's box or a nearer centre is there.
        spots: (side // 16, side // 16) int64: the character whose centre lies at each position of that grid, index into
            ALPHABET + 1, of several the last; 0 for none.
    """

    image: np.ndarray
    questions: tuple[Question, ...]
    background: int
    cells: np.ndarray
    inks: np.ndarray
    letters: np.ndarray
    dense: np.ndarray
    spots: np.ndarray


def make_scene(seed: int, split: str = "train", side: int = SIDE, family: str | None = None) -> Scene:
    """Make one scene: the same one for the same arguments and library versions.

    Args:
        seed: its number, 0 or more.
        split: one of SPLITS.
        side: of the picture, in pixels; what is in it doesn't depend on this, only the grid of `dense` does.
        family: one of FAMILIES, None for all in fixed shares, or PAGE, which is for training only.

    Raises:
        ValueError: there is no such split or family, or the seed or side is too small.
    """
    if split not in SPLITS or family not in (*FAMILIES, PAGE, None):
        raise ValueError(f"no split {split!r} or no family {family!r}: {SPLITS}, {(*FAMILIES, PAGE)}")
    if family == PAGE and split != "train":
        raise ValueError(f"a {PAGE} has no questions and is for training; choose the split 'train'")
    if seed < 0 or side < LEAST_SIDE:
        raise ValueError(f"seed {seed} is below 0 or side {side} below {LEAST_SIDE}")
    held_out = split == "held-out"
    dice = Dice(SPLITS.index(split), seed)
    plan = plan_scene(dice, held_out, family)
    questions = () if plan.page.lines else ask_all(plan, dice, held_out)
    picture = draw_backdrop(plan.backdrop, side)
    if plan.chart:
        draw_chart(picture, plan.chart)
    for lettering in (plan.lettering, *plan.page.lines):
        if lettering:
            draw_lettering(picture, lettering)
    for thing in plan.things:
        draw_thing(picture, thing)
    cells = cells_of(plan.things)
    letters = letters_on(plan.page.words) if plan.page.lines else letters_of(plan.letterings)
    inks = inks_of(plan.letterings)
    grids = dense_of(plan, side), spots_of(plan.letterings, side)
    return Scene(np.array(picture), questions, plan.backdrop.index, cells, inks, letters, *grids)


def write_scenes(target: Path, split: str, count: int, seed: int = 0, side: int = SIDE, wide: bool = False) -> int:
    """Write scenes as files.

    Args:
        target: folder for NNNN.png and questions.jsonl; one that is there is replaced.
        split: one of SPLITS.
        count: how many scenes.
        seed: of the first; the others follow.
        side: of the pictures, in pixels; of wide ones the longer side.
        wide: make pictures of two to one; see `nano.wide`.

    Returns:
        How many questions were written.

    Raises:
        InputError: the count, the seed or the side is too small, or that isn't a side of wide pictures.
    """
    from fastvlm_mlx.files import replaced_folder
    from nano.wide import wide_scenes

    for name, value, least in (("count", count, 1), ("seed", seed, 0), ("side", side, LEAST_SIDE)):
        if value < least:
            raise InputError(f"{name} needs a number from {least} on, not {value}")
    square = ((scene.image, scene.questions) for scene in (make_scene(seed + i, split, side) for i in range(count)))
    lines = []
    with replaced_folder(target) as folder:
        for index, (image, questions) in enumerate(wide_scenes(split, count, seed, side) if wide else square):
            name = f"{index:04}.png"
            Image.fromarray(image).save(folder / name)
            for question in questions:
                line = {"image": name, "kind": question.kind, "prompt": question.prompt, "answer": question.answer}
                lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    return len(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Write pictures with questions and answers.")
    parser.add_argument("out", type=Path, help="folder to write; an older one is replaced")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--count", type=int, default=1000, help="scenes (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene (default 0)")
    parser.add_argument("--side", type=int, default=SIDE, help=f"pixels (default {SIDE}); of wide ones the longer side")
    parser.add_argument("--wide", action="store_true", help="half as high as wide")
    add_common(parser)
    return run(parser, _write, argv)


def _write(args: argparse.Namespace) -> None:
    questions = write_scenes(args.out, args.split, args.count, args.seed, args.side, args.wide)
    print(f"{args.out}: {args.count} pictures, {questions} questions")


if __name__ == "__main__":
    raise SystemExit(main())
