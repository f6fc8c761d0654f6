#!/usr/bin/env python3
"""The mean of two checkpoints of which one was trained on from the other: often better than either.

    average.py FIRST SECOND OUT --share 0.7    # 0.3 of FIRST and 0.7 of SECOND

What training on unlearnt on its way, the mean has most of again (model soups, arXiv 2203.05482). Without a common past
the mean of two networks knows nothing. Norms' statistics are averaged, too.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # From a checkout: the packages stand beside each other, and this folder itself is none.
    sys.path[:1] = [str(ROOT / "models"), str(ROOT / "src")]

from fastvlm_mlx.commands import add_common, run  # noqa: E402
from fastvlm_mlx.errors import InputError  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "model.safetensors"
ALIKE = ("config.json", "generation_config.json", "tokenizer.json")
_KIN = "give one that was trained on from the other"


def average(first: Path, second: Path, out: Path, share: float) -> None:
    """Write the mean of two checkpoints.

    Args:
        first: folder that train.py exported.
        second: another, of the same sizes and with the same tokenizer.
        out: folder for the mean; it must be new.
        share: of the second, 0 to 1.

    Raises:
        InputError: a file is missing or damaged, the two aren't alike, `out` is there already, or there is no such
            share.
    """
    if not 0 <= share <= 1:
        raise InputError(f"share needs a number from 0 to 1, not {share}")
    if out.exists():
        raise InputError(f"{out} is there already; give a new folder")
    for folder in (first, second):
        missing = [name for name in (WEIGHTS, *ALIKE) if not (folder / name).is_file()]
        if missing:
            raise InputError(f"{folder} lacks {', '.join(missing)}; give a folder that train.py exported")
    other = [name for name in ALIKE if (first / name).read_bytes() != (second / name).read_bytes()]
    if other:
        raise InputError(f"{first} and {second} differ in {', '.join(other)}; {_KIN}")
    import torch
    from safetensors.torch import save_file

    from fastvlm_mlx.files import replaced_folder

    weights, more = _read(first / WEIGHTS), _read(second / WEIGHTS)
    if {name: each.shape for name, each in weights.items()} != {name: each.shape for name, each in more.items()}:
        raise InputError(f"{first} and {second} hold other tensors; {_KIN}")
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            weights[name] = torch.lerp(tensor.float(), more[name].float(), share).to(tensor.dtype)
    with replaced_folder(out) as folder:
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        for name in ALIKE:
            shutil.copyfile(first / name, folder / name)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as exc:
        raise InputError(f"{path} holds no weights ({exc}); export the checkpoint again") from exc


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("first", "second", "out"):
        parser.add_argument(name, type=Path, metavar=name.upper())
    parser.add_argument("--share", type=float, default=0.5, help="of SECOND, 0 to 1 (default 0.5)")
    add_common(parser)
    return run(parser, _average, argv)


def _average(args: argparse.Namespace) -> None:
    average(args.first, args.second, args.out, args.share)
    print(f"wrote {args.out}; convert it with: fastvlm-convert {args.out} -o BUNDLE")


if __name__ == "__main__":
    raise SystemExit(main())
