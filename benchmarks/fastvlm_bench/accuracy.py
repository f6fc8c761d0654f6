"""`fastvlm-bench accuracy QUESTIONS`: how often a model's answer is exactly the right one, by kind of question."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_bench.arguments import add_model
from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import write_text
from fastvlm_mlx.types import ASPECTS

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM

QUESTIONS = "questions.jsonl"
_FIELDS = ("image", "kind", "prompt", "answer")
_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Question:
    """One line of questions.jsonl: an image file beside it, what is asked, and the only right answer."""

    image: Path
    kind: str
    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A question with what the model said."""

    question: Question
    said: str

    @property
    def right(self) -> bool:
        """Equal, but for blanks around it."""
        return self.said.strip() == self.question.answer.strip()


@dataclass(frozen=True, slots=True)
class Score:
    """Right answers of how many."""

    right: int
    count: int

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.right / self.count


def read_questions(folder: Path) -> list[Question]:
    """Read a folder with images and a questions.jsonl: an object with image, kind, prompt and answer on each line.

    Raises:
        InputError: missing, empty, or a line that isn't so; says which.
    """
    path = folder / QUESTIONS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"can't read {path} ({exc}); give a folder of images with a {QUESTIONS}") from exc
    questions = [_question(folder, line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise InputError(f"{path} has no question; give one JSON object a line with {', '.join(_FIELDS)}")
    return questions


def _question(folder: Path, line: str, where: str) -> Question:
    try:
        data = json.loads(line)
        values = [data[name] for name in _FIELDS]
    except (ValueError, KeyError, TypeError) as exc:
        raise InputError(f"{where}: expected an object with {', '.join(_FIELDS)}, found {line[:80]!r}") from exc
    if not all(isinstance(value, str) for value in values):
        raise InputError(f"{where}: {', '.join(_FIELDS)} must be texts, found {line[:80]!r}")
    image, kind, prompt, answer = values
    if not (folder / image).is_file():
        raise InputError(f"{where}: there is no image {folder / image}; images lie beside {QUESTIONS}")
    return Question(folder / image, kind, prompt, answer)


def ask_all(
    model: FastVLM,
    questions: Sequence[Question],
    progress: Callable[[int], object] = lambda _: None,
    resolution: int | None = None,
    aspect: str | None = None,
    grid: str | None = None,
) -> Iterator[Answer]:
    """Answer greedily; an image that several questions in a row are about is encoded once, by the model's caches.

    Args:
        model: a loaded model with a tokenizer.
        questions: those about one image together.
        progress: called with 1 after each answer.
        resolution: of the images, as in `FastVLM.generate`; default the model's.
        aspect: likewise.
        grid: likewise.
    """
    for question in questions:
        result = model.generate(
            question.image, question.prompt, resolution=resolution, aspect=aspect, grid=grid, max_tokens=_MAX_TOKENS
        )
        progress(1)
        yield Answer(question, result.text)


def score(answers: Sequence[Answer]) -> dict[str, Score]:
    """By kind of question, in the order of their first appearance; "overall" last."""
    kinds = dict.fromkeys(answer.question.kind for answer in answers)
    found = {kind: [a.right for a in answers if a.question.kind == kind] for kind in kinds}
    found["overall"] = [answer.right for answer in answers]
    return {kind: Score(sum(right), len(right)) for kind, right in found.items()}


def format_scores(scores: dict[str, Score]) -> str:
    """A table for people."""
    width = max(map(len, scores))
    return "\n".join(
        f"{kind:<{width}}  {entry.share:6.1%}  {entry.right} of {entry.count}" for kind, entry in scores.items()
    )


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-bench accuracy",
        description="Ask a model questions with known answers and count exact matches, by kind of question.",
    )
    parser.add_argument("questions", type=Path, help=f"folder with images and {QUESTIONS}")
    add_model(parser, ("auto", "coreml", "mlx"))
    parser.add_argument("--resolution", type=int, metavar="PX", help="image side (default: the model's)")
    parser.add_argument("--aspect", choices=ASPECTS, help="shape of the images (default: the model's)")
    parser.add_argument("--grid", metavar="CxR", help="columns and rows of anyres' tiles (default: the model's)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every answer and the scores there")
    add_common(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(build_parser(), _measure, argv)


def _measure(args: argparse.Namespace) -> None:
    from fastvlm_mlx.accelerate import prepare_cpu

    prepare_cpu()  # before anything below imports MLX
    from tqdm import tqdm

    from fastvlm_mlx.loading import load

    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit must be 1 or more, got {args.limit}")
    questions = read_questions(args.questions)[: args.limit]
    model = load(args.model, vision=args.vision, quantize=args.quantize)
    with tqdm(total=len(questions), unit="question", leave=False, disable=None) as bar:
        answers = list(ask_all(model, questions, bar.update, args.resolution, args.aspect, args.grid))
    scores = score(answers)
    print(format_scores(scores))
    if args.json:
        said = [{**asdict(a.question), "image": a.question.image.name, "said": a.said} for a in answers]
        data: dict[str, object] = {
            "model": model.config.name,
            "device": model.device,
            "resolution": args.resolution or model.resolution,
            "aspect": args.aspect or model.config.aspect,
            "grid": args.grid,
            "scores": {kind: asdict(entry) for kind, entry in scores.items()},
        }
        write_text(args.json, json.dumps(data | {"answers": said}, indent=2, ensure_ascii=False) + "\n")
