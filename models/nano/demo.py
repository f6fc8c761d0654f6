#!/usr/bin/env python3
"""`make demo`: ask the embedded default about three pictures, and show where the time to the first token goes.

The pictures are held-out scenes, which training never showed. It needs the run time alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx import load

if TYPE_CHECKING:
    from fastvlm_mlx import FastVLM
    from fastvlm_mlx.types import Timings

FOLDER = Path(__file__).resolve().parent / "pictures"
MOST_TOKENS = 64  # an answer is a word or a sentence


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture and what is asked about it.

    Attributes:
        file: in FOLDER.
        seed: of the held-out scene that it is: `scenes.py OUT --split held-out --count 1 --seed SEED`.
        questions: in the order of asking.
    """

    file: str
    seed: int
    questions: tuple[str, ...]


PICTURES = (
    Shown(
        "shapes.png",
        5283,
        ("What colour is the star?", "How many crosses are there?", "Where is the circle?", "Describe the picture."),
    ),
    Shown("sign.png", 5657, ("What does the sign say?", "What colour is the text?", "Name the white shape.")),
    Shown(
        "chart.png", 5124, ("Which bar is highest?", "What is the value of the brown bar?", "How many bars are there?")
    ),
)


def split(timings: Timings) -> str:
    """The time to the first token and its parts, in milliseconds."""
    names = ("preprocess", "vision", "projector", "tokenize", "prefill", "first_token", "ttft")
    parts = [f"{name.replace('_', ' ')} {1e3 * getattr(timings, name):.1f}" for name in names]
    return f"{' + '.join(parts[:-1])} = {parts[-1]} ms"


def ask(model: FastVLM, picture: Path, question: str) -> None:
    """Print a question, its answer as it comes, and the times."""
    print(f"  {question} ", end="", flush=True)
    for piece in model.stream(picture, question, max_tokens=MOST_TOKENS):
        print(piece.text, end="", flush=True)
        if piece.result:
            print(f"\n      {split(piece.result.timings)}")


def main() -> None:
    """Ask everything."""
    model = load()
    # Weights are read, and kernels made, when they are first needed; what is shown is what every later question takes.
    model.generate(FOLDER / PICTURES[0].file, PICTURES[0].questions[0], max_tokens=1)
    print(f"{model.config.name}, {model.device}")
    for shown in PICTURES:
        print(f"\nmodels/nano/pictures/{shown.file}")
        for question in shown.questions:
            ask(model, FOLDER / shown.file, question)


if __name__ == "__main__":
    main()
