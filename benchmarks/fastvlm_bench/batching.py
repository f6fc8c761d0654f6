"""`fastvlm-bench batch`: answers decoded together beside the same ones after each other."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_bench.arguments import add_model
from fastvlm_bench.machine import describe_machine
from fastvlm_bench.runner import prompt_ids
from fastvlm_bench.stats import spread
from fastvlm_mlx.commands import add_common, run
from fastvlm_mlx.errors import FastVLMError, InputError
from fastvlm_mlx.files import write_text

if TYPE_CHECKING:
    import numpy as np

    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.types import GenerationResult

_SHORTEST = 12  # text tokens of the first prompt; each later one has 3 more, so that the batch is ragged


@dataclass(frozen=True, slots=True)
class Round:
    """The same questions, both ways.

    Attributes:
        alone_s, together_s: from the first call to the last token.
        alone_decode_s, together_decode_s: without preprocessing, vision, projector and prefill.
        tokens: of all answers.
    """

    alone_s: float
    together_s: float
    alone_decode_s: float
    together_decode_s: float
    tokens: int

    @property
    def gain(self) -> float:
        """Tokens per second together by those one by one, whole calls."""
        return self.alone_s / self.together_s

    @property
    def decode_gain(self) -> float:
        """The same of decoding alone."""
        return self.alone_decode_s / self.together_decode_s


def measure(
    model: FastVLM, size: int, max_tokens: int, runs: int, progress: Callable[[], object] = lambda: None
) -> list[Round]:
    """Ask `size` questions about as many pictures one by one and together, in turn, after a round that isn't kept.

    Args:
        model: without caches: what one way computed would help the other.
        size: questions, and how many are decoded together.
        max_tokens: of each answer; end-of-sequence is ignored.
        runs: rounds.
        progress: called after each way of each round.

    Raises:
        FastVLMError: the answers differ; then their times can't be compared.
    """
    side, vocabulary = model.resolution, model.config.decoder.vocab_size
    pictures = [_picture(side, number) for number in range(size)]
    prompts = [prompt_ids(_SHORTEST + 3 * number, vocabulary) for number in range(size)]

    def alone() -> list[GenerationResult]:
        asked = zip(pictures, prompts, strict=True)
        return [model.generate(p, ids, max_tokens=max_tokens, ignore_eos=True) for p, ids in asked]

    def together() -> list[GenerationResult]:
        return model.batch(pictures, prompts, batch_size=size, max_tokens=max_tokens, ignore_eos=True)

    rounds = []
    for index in range(runs + 1):
        ways = (alone, together) if index % 2 else (together, alone)
        timed = {}
        for way in ways:
            timed[way] = _timed(way)
            progress()
        (first, alone_s), (second, together_s) = timed[alone], timed[together]
        if [r.token_ids for r in first] != [r.token_ids for r in second]:
            raise FastVLMError("answers decoded together differ from those one by one; their times can't be compared")
        decoding = (alone_s - _before_decoding(first), together_s - _before_decoding(second))
        rounds.append(Round(alone_s, together_s, *decoding, sum(len(r.token_ids) for r in first)))
    return rounds[1:]


def _picture(side: int, number: int) -> np.ndarray:
    import numpy as np

    return np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)


def _timed(way: Callable[[], list[GenerationResult]]) -> tuple[list[GenerationResult], float]:
    start = time.perf_counter()
    return way(), time.perf_counter() - start


def _before_decoding(results: Sequence[GenerationResult]) -> float:
    """Seconds that are the same work both ways: nobody shares an image or a prompt."""
    return sum(r.timings.preprocess + r.timings.vision + r.timings.projector + r.timings.prefill for r in results)


def format_rounds(rounds: Sequence[Round], size: int) -> str:
    """Tokens per second and their ratios, medians and ends."""
    lines = [f"{size} questions, {rounds[0].tokens // size} tokens each; tokens per second"]
    for name, alone, together, gain in (
        ("whole", "alone_s", "together_s", "gain"),
        ("decode", "alone_decode_s", "together_decode_s", "decode_gain"),
    ):
        rates = [spread([r.tokens / getattr(r, way) for r in rounds]).median for way in (alone, together)]
        ratio = spread([getattr(r, gain) for r in rounds])
        lines.append(
            f"{name:<7} one by one {rates[0]:8.1f}  together {rates[1]:8.1f}  "
            f"ratio {ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="fastvlm-bench batch",
        description="Decode several answers together and one by one, in turn, and compare tokens per second.",
    )
    add_model(parser)
    parser.add_argument("--resolution", type=int, metavar="PX", help="image side (default: the model's own)")
    for name, count, text in (
        ("--batch-size", 8, "answers that are decoded together"),
        ("--max-tokens", 64, "tokens of each answer"),
        ("--runs", 3, "measured rounds"),
    ):
        parser.add_argument(name, type=int, default=count, metavar="N", help=f"{text} (default: {count})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds and the machine there")
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

    for option, least in (("batch_size", 1), ("max_tokens", 2), ("runs", 1)):
        if getattr(args, option) < least:
            raise InputError(f"--{option.replace('_', '-')} must be at least {least}, got {getattr(args, option)}")
    model = load(
        args.model,
        vision=args.vision,
        quantize=args.quantize,
        resolution=args.resolution,
        prefix_cache_bytes=0,
        feature_cache_bytes=0,
    )
    with tqdm(total=2 * (args.runs + 1), unit="way", leave=False, disable=None) as bar:
        rounds = measure(model, args.batch_size, args.max_tokens, args.runs, bar.update)
    print(format_rounds(rounds, args.batch_size))
    if args.json:
        data = {
            "model": model.config.name,
            "device": model.device,
            "machine": asdict(describe_machine()),
            "batch_size": args.batch_size,
            "rounds": [asdict(r) | {"gain": r.gain, "decode_gain": r.decode_gain} for r in rounds],
        }
        write_text(args.json, json.dumps(data, indent=2) + "\n")
