"""`fastvlm caption FOLDER`: one answer for each image of a folder, in one process or in several."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvlm_mlx.bundle import CONFIG, QUANTIZED_BITS
from fastvlm_mlx.caption import AnswerFile, Job, answer_images, files_digest, find_images, merge_parts, part_of
from fastvlm_mlx.config import DecoderConfig, ModelConfig, check_side
from fastvlm_mlx.errors import FastVLMError, InputError
from fastvlm_mlx.template import CHATML, Template, find_template

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.types import GenerationOptions

# Arguments of `load` that decide what the model computes, besides its files and the resolution.
_LOADING = ("vision", "compute_units", "quantize", "dtype", "vision_dtype")
_TEMPLATE = 32  # positions that a prompt has around its texts, at most


class UnreadableError(FastVLMError):
    """Some images could not be read; all others were answered."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that `mlx.launch` started; alone without it."""

    rank: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> Ranks:
        """Find the others."""
        if "MLX_RANK" not in os.environ:
            return cls()
        import mlx.core as mx

        group = mx.distributed.init()
        return cls(group.rank(), group.size())

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            import mlx.core as mx

            mx.eval(mx.distributed.all_sum(mx.ones(1), stream=mx.cpu))


def caption(args: argparse.Namespace, options: GenerationOptions) -> None:
    """Run the command; the model is found, or downloaded, at once, and loaded if there is something to do.

    Args:
        args: of the command.
        options: how to decode.

    Raises:
        InputError: no images, or a file with answers of another job. UnreadableError: at the end, if there were
            images that can't be read or that fill the context. Others as `load`.
    """
    from fastvlm_mlx.hub import resolve
    from fastvlm_mlx.views import view_of

    _check(args)
    folder, out, names, ranks = args.folder, args.output, find_images(args.folder), Ranks.join()
    bundle = resolve(args.model, revision=args.revision, local_files_only=args.local_files_only)
    config = ModelConfig.from_file(Path(bundle) / CONFIG)
    view_of(config, args.resolution or config.image_size, args.aspect, args.grid)  # before a file is made for nothing
    loading = {name: getattr(args, name) for name in _LOADING}
    files = files_digest(bundle)
    job = Job(
        args.prompt,
        args.model or "default",
        files,
        args.system,
        resolution=args.resolution,
        aspect=args.aspect,
        grid=args.grid,
        loading=loading,
        options=options,
    )
    if ranks.rank == 0:
        merge_parts(out, job)
    ranks.wait()
    with closing(AnswerFile(out, job, shared=ranks.size > 1)) as answers:
        known = set(answers.done)
    todo = [name for name in names if name not in known][ranks.rank :: ranks.size]
    failed: list[str] = []
    if todo:
        target = part_of(out, ranks.rank) if ranks.size > 1 else out
        with closing(AnswerFile(target, job)) as answers:
            _answer(_load(bundle, job), folder, todo, job, answers, args.batch_size, failed, quiet=ranks.rank > 0)
    ranks.wait()
    if ranks.rank == 0 and ranks.size > 1:
        merge_parts(out, job)
    print(f"{out}: {len(todo) - len(failed)} images answered, {len(known)} were before")
    if failed:
        raise UnreadableError(f"{len(failed)} of {len(names)} images are left out, the others are in {out}")


def _check(args: argparse.Namespace) -> None:
    """Raise InputError or ResolutionError for arguments out of range, before a model is downloaded for nothing."""
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.resolution is not None:
        check_side(args.resolution)
    if args.quantize not in (None, *QUANTIZED_BITS):
        raise InputError(f"--quantize must be one of {', '.join(map(str, QUANTIZED_BITS))}, got {args.quantize}")


def _load(bundle: Path, job: Job) -> FastVLM:
    """Load the model to answer each image once: it keeps the beginning of the prompt and nothing of the images."""
    from fastvlm_mlx.loading import load

    config = ModelConfig.from_file(bundle / CONFIG)
    room = beginning_bytes(config.decoder, job, find_template(config.template))
    loading: dict[str, Any] = dict(job.loading)
    return load(bundle, resolution=job.resolution, prefix_cache_bytes=room, feature_cache_bytes=0, **loading)


def beginning_bytes(decoder: DecoderConfig, job: Job, template: Template = CHATML) -> int:
    """Most bytes that a prompt's rows take in the prefix cache up to the image.

    The cache drops the ends of prompts first, so what all of them begin with stays. Before the image stand the system
    prompt and, if it places the image last, the question: at most a position for each byte of them.
    """
    texts = (template.system if job.system is None else job.system) + job.prompt
    positions = _TEMPLATE + len(texts.encode(errors="replace"))
    heads, head_dim = decoder.num_key_value_heads, decoder.hidden_size // decoder.num_attention_heads
    row = decoder.num_hidden_layers * 2 * heads * head_dim * 4  # keys and values, in float32 at most
    return positions * (row + 3 * 8)  # and the position's key


def _answer(
    model: FastVLM,
    folder: Path,
    names: list[str],
    job: Job,
    answers: AnswerFile,
    batch_size: int,
    failed: list[str],
    quiet: bool,
) -> None:
    from tqdm import tqdm

    with tqdm(total=len(names), unit="image", disable=True if quiet else None) as bar:

        def unreadable(name: str, error: FastVLMError) -> None:
            failed.append(name)
            bar.write(f"fastvlm: {name} is skipped: {error}", file=sys.stderr)
            bar.update()

        for name, answer in answer_images(model, folder, names, job, unreadable, batch_size):
            answers.add(name, answer)
            bar.update()
