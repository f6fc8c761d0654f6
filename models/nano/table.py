"""How much accuracy each width and each encoder costs: the table of the model's card.

    python models/nano/table.py BUNDLE [--count 1000] [--seed 1000] [--card README.md]

`make nano-card` puts it into models/nano/README.md, between the card's two marks. The pictures are the held-out
ones of models/nano/scenes.py. Core ML's row is the package, executed op by op with every op's output rounded to
float16 (fastvlm_convert.mil_check), unless Core ML itself is there. Two more rows part the first one's answers by
whether a scene shows anything that training never did.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from fastvlm_bench.accuracy import Answer, Question, Score, ask_all, read_questions, score
from fastvlm_mlx.accelerate import prepare_cpu
from fastvlm_mlx.bundle import MANIFEST, PACKAGE, Bundle
from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import sha256, write_text
from fastvlm_mlx.loading import assemble

MODELS = Path(__file__).resolve().parents[1]
if str(MODELS) not in sys.path:  # run as a script, Python looks in this folder, not in the one above
    sys.path.insert(0, str(MODELS))

from nano.dice import Dice  # noqa: E402
from nano.planning import plan_scene  # noqa: E402
from nano.questions import ask_all as ask_about  # noqa: E402
from nano.scenes import KINDS, SPLITS, write_scenes  # noqa: E402
from nano.settings import SIDE  # noqa: E402

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM

Row = tuple[str, dict[str, Score]]  # its name; scores by kind of question, and "overall"

SPLIT = "held-out"
# The curve of a training watches the first 192 held-out scenes, and may have had a say in when it was stopped.
SEED = 1000
DECODERS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},  # as the default is stored, which is what `load` keeps on a Mac's GPU
    "8 bit": {"dtype": "float32", "quantize": 8},
    "6 bit": {"dtype": "float32", "quantize": 6},
    "4 bit": {"dtype": "float32", "quantize": 4},
}
KNOWN = "of the first row, scenes that show nothing new"
NEW = "of the first row, scenes with new words, numbers, fonts, pairs or photographs"
BEGIN, END = "<!-- table -->", "<!-- end of table -->"  # the marks in the card


def rows_of(bundle: Bundle) -> dict[str, Callable[[], FastVLM]]:
    """Name of each row -> what loads its model; each can be measured alone, in a process of its own.

    Args:
        bundle: an open bundle; without a Core ML package it has no row for one.
    """
    found: dict[str, Callable[[], FastVLM]] = {}
    for name, options in DECODERS.items():
        # On a GPU the encoder would be bfloat16 by itself, and a row's name wouldn't be true.
        load = partial(assemble, bundle, vision="mlx", vision_dtype="float32", **options)
        found[f"{name} decoder, MLX encoder (float32)"] = load
    if bundle.has(PACKAGE):
        from fastvlm_convert.gates import core_ml
        from fastvlm_convert.mil_check.runtime import CheckerRuntime

        runtime = core_ml()
        executor = "Core ML" if runtime else "checker, float16"
        load = partial(assemble, bundle, vision="coreml", dtype="float32", runtime=runtime or CheckerRuntime())
        found[f"float32 decoder, Core ML package ({executor})"] = load
    return found


def questions_in(folder: Path, count: int, seed: int) -> list[Question]:
    """Write held-out pictures and read what is asked about them.

    Args:
        folder: for the pictures; one that is there is replaced.
        count: how many pictures.
        seed: of the first.
    """
    write_scenes(folder, SPLIT, count, seed)
    return read_questions(folder)


def by_novelty(answers: Sequence[Answer], seed: int) -> list[Row]:
    """Two rows of one model's answers: scenes without, and with, something that training never shows.

    Args:
        answers: to questions of `questions_in`.
        seed: of its first picture.

    Raises:
        InputError: a question isn't one about the held-out scene of that seed.
    """
    scenes = {image: _scene(seed + int(image.stem)) for image in {answer.question.image for answer in answers}}
    known: list[Answer] = []
    new: list[Answer] = []
    for answer in answers:
        question = answer.question
        shows_new, asked = scenes[question.image]
        if (question.prompt, question.answer) not in asked:
            number = seed + int(question.image.stem)
            raise InputError(f"{question.image.name} isn't {SPLIT} scene {number}; give the seed of the first picture")
        (new if shows_new else known).append(answer)
    return [(f"{name} ({len(part)} questions)", score(part)) for name, part in ((KNOWN, known), (NEW, new))]


def _scene(seed: int) -> tuple[bool, set[tuple[str, str]]]:
    """Whether a held-out scene shows anything new, and its questions with their answers."""
    dice = Dice(SPLITS.index(SPLIT), seed)
    plan = plan_scene(dice, held_out=True)
    return bool(plan.novelties), {(question.prompt, question.answer) for question in ask_about(plan, dice, True)}


def markdown(rows: Sequence[Row]) -> str:
    """A table: a row for each model, a column for each kind of question that the first was asked."""
    kinds = ["overall", *(kind for kind in KINDS if kind in rows[0][1])]
    lines = [f"| | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    lines += [f"| {name} | {' | '.join(_share(scores.get(kind)) for kind in kinds)} |" for name, scores in rows]
    counts = rows[0][1]
    lines += ["", f"Questions: {', '.join(f'{kind} {counts[kind].count}' for kind in kinds)}."]
    return "\n".join(lines) + "\n"


def _share(entry: Score | None) -> str:
    return f"{entry.share:.1%}" if entry and entry.count else "-"


def report(rows: Sequence[Row], bundle: Bundle, count: int, seed: int) -> str:
    """All that goes between the card's marks.

    Args:
        rows: those of `rows_of` in their order, then those of `by_novelty` for the first.
        bundle: what was measured.
        count: of pictures.
        seed: of the first picture.

    Returns:
        The table, how it was measured, and the hash that ties it to the bundle: its manifest has every file's.
    """
    pictures = f"Pictures: {count} of the {SPLIT} split, from seed {seed} on, drawn with {SIDE} px."
    return f"{markdown(rows)}{pictures}\nBundle: {MANIFEST} with SHA-256 {sha256(bundle.path / MANIFEST)}.\n"


def put(card: Path, table: str) -> str:
    """A card's text with the table between its marks, in place of what is there.

    Raises:
        InputError: it can't be read, or hasn't got each mark once and in order.
    """
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"can't read {card} ({exc}); give the model's card") from exc
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or BEGIN in rest or END in before + after:
        raise InputError(f"{card} needs one line {BEGIN} and, below it, one {END}; the table goes between them")
    return f"{before}{BEGIN}\n\n{table}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description="Accuracy of a bundle by width and encoder, on held-out pictures.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=1000, help="pictures (default: 1000)")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the first picture (default: {SEED})")
    parser.add_argument("--card", type=Path, help=f"put the table into this file, too, between {BEGIN} and {END}")
    add_common(parser)
    return run(parser, _tabulate, argv)


def _tabulate(args: argparse.Namespace) -> None:
    prepare_cpu()  # before anything below imports MLX
    from tqdm import tqdm

    if args.count < 1:
        raise InputError(f"--count must be 1 or more, got {args.count}")
    if args.seed < 0:
        raise InputError(f"--seed must be 0 or more, got {args.seed}")
    if args.card:
        put(args.card, "")  # what is wrong with it is said now, not after an hour of questions
    bundle = Bundle.open(args.bundle)
    rows: list[Row] = []
    parts: list[Row] = []
    with TemporaryDirectory() as folder:
        questions = questions_in(Path(folder) / SPLIT, args.count, args.seed)
        for name, load in rows_of(bundle).items():
            with tqdm(total=len(questions), desc=name, unit="question", disable=None) as bar:
                answers = list(ask_all(load(), questions, bar.update))
            rows.append((name, score(answers)))
            parts = parts or by_novelty(answers, args.seed)
    text = report([*rows, *parts], bundle, args.count, args.seed)
    print(text, end="")
    if args.card:
        write_text(args.card, put(args.card, text))


if __name__ == "__main__":
    raise SystemExit(main())
