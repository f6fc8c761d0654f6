"""`fastvlm caption FOLDER`: one answer for each image of a folder, in one process or in several."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastvlm_mlx.caption import AnswerFile, Job, answer_images, find_images, merge_parts, part_of
from fastvlm_mlx.errors import FastVLMError, ImageError, InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastvlm_mlx.model import FastVLM


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


def caption(args: argparse.Namespace, job: Job, load: Callable[[], FastVLM]) -> None:
    """Run the command.

    Args:
        args: folder, out and batch_size.
        job: what to ask.
        load: loads the model, once there is something to do.

    Raises:
        InputError: no images, or a file with answers to something else. UnreadableError: at the end, if there were
            images that can't be read.
    """
    if args.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {args.batch_size}")
    folder, out, names, ranks = args.folder, args.output, find_images(args.folder), Ranks.join()
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
            _answer(load(), folder, todo, job, answers, args.batch_size, failed, quiet=ranks.rank > 0)
    ranks.wait()
    if ranks.rank == 0 and ranks.size > 1:
        merge_parts(out, job)
    print(f"{out}: {len(todo) - len(failed)} images answered, {len(known)} were before")
    if failed:
        raise UnreadableError(f"{len(failed)} of {len(names)} images can't be read, the others are in {out}")


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

        def unreadable(name: str, error: ImageError) -> None:
            failed.append(name)
            bar.write(f"fastvlm: {name} is skipped: {error}", file=sys.stderr)
            bar.update()

        for name, answer in answer_images(model, folder, names, job, unreadable, batch_size):
            answers.add(name, answer)
            bar.update()
