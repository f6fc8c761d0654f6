"""How much accuracy each width and each encoder costs: the table of the model's card.

    python models/nano/table.py BUNDLE [--count 1000] [--card README.md]

`make nano-card` puts it into models/nano/README.md, between the card's two marks. The pictures are the held-out
ones of models/nano/scenes.py. Core ML's row is the package, executed op by op with every op's output rounded to
float16 (fastvlm_convert.mil_check), unless Core ML itself is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from fastvlm_bench.accuracy import Score, ask_all, read_questions, score
from fastvlm_mlx.accelerate import prepare_cpu
from fastvlm_mlx.bundle import PACKAGE, Bundle
from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import write_text
from fastvlm_mlx.loading import assemble

MODELS = Path(__file__).resolve().parents[1]
if str(MODELS) not in sys.path:  # run as a script, Python looks in this folder, not in the one above
    sys.path.insert(0, str(MODELS))

from nano.scenes import KINDS, write_scenes  # noqa: E402

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM

DECODERS: dict[str, dict[str, object]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "8 bit": {"dtype": "float32", "quantize": 8},
    "6 bit": {"dtype": "float32", "quantize": 6},
    "4 bit": {"dtype": "float32", "quantize": 4},
}
BEGIN, END = "<!-- table -->", "<!-- end of table -->"  # the marks in the card


def models(bundle: Bundle) -> Iterator[tuple[str, FastVLM]]:
    """(name of the row, model), one in memory at a time."""
    for name, options in DECODERS.items():
        yield f"{name} decoder, MLX encoder (float32)", assemble(bundle, vision="mlx", **options)  # type: ignore[arg-type]
    if bundle.has(PACKAGE):
        from fastvlm_convert.gates import core_ml
        from fastvlm_convert.mil_check.runtime import CheckerRuntime

        runtime = core_ml()
        executor = "Core ML" if runtime else "checker, float16"
        model = assemble(bundle, vision="coreml", dtype="float32", runtime=runtime or CheckerRuntime())
        yield f"float32 decoder, Core ML package ({executor})", model


def markdown(rows: Sequence[tuple[str, dict[str, Score]]]) -> str:
    """A table: a row for each model, a column for each kind of question."""
    kinds = ["overall", *(kind for kind in KINDS if kind in rows[0][1])]
    lines = [f"| | {' | '.join(kinds)} |", f"|---|{'---|' * len(kinds)}"]
    lines += [f"| {name} | {' | '.join(f'{scores[kind].share:.1%}' for kind in kinds)} |" for name, scores in rows]
    counts = rows[0][1]
    lines += ["", f"Questions: {', '.join(f'{kind} {counts[kind].count}' for kind in kinds)}."]
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    parser.add_argument("--card", type=Path, help=f"put the table into this file, too, between {BEGIN} and {END}")
    add_common(parser)
    return run(parser, _tabulate, argv)


def _tabulate(args: argparse.Namespace) -> None:
    prepare_cpu()  # before anything below imports MLX
    from tqdm import tqdm

    if args.card:
        put(args.card, "")  # what is wrong with it is said now, not after an hour of questions
    rows = []
    with TemporaryDirectory() as folder:
        pictures = Path(folder) / "held-out"
        write_scenes(pictures, "held-out", args.count, args.seed)
        questions = read_questions(pictures)
        for name, model in models(Bundle.open(args.bundle)):
            with tqdm(total=len(questions), desc=name, unit="question", disable=None) as bar:
                rows.append((name, score(list(ask_all(model, questions, bar.update)))))
    text = markdown(rows) + f"Pictures: {args.count} of the held-out split, from seed {args.seed} on.\n"
    print(text, end="")
    if args.card:
        write_text(args.card, put(args.card, text))


if __name__ == "__main__":
    raise SystemExit(main())
