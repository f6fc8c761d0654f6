"""One model in every form that a comparison needs, kept for the next one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastvlm_bench.compare.rivals import RIVALS
from fastvlm_mlx.converter import run_converter
from fastvlm_mlx.errors import CheckpointError, InputError
from fastvlm_mlx.files import cache_dir, replaced_folder

# Part of the kept folders' names: another number makes them anew.
FORMAT_VERSION = 1
TOKENIZER = "tokenizer.json"
_PUBLISHED_SIDE = 1024  # pixels; each question may have another
_FAMILY = "llava_qwen2"  # what `layouts` writes for them, and what `processors` asks in ChatML
Say = Callable[[str], object]


def seeded_checkpoint(size: str, say: Say) -> Path:
    """A checkpoint of random weights; see `seeded`."""
    from fastvlm_bench.compare.seeded import write_seeded
    from fastvlm_bench.sizes import SIZES

    target = _home() / f"seeded-{size}-{FORMAT_VERSION}"
    if not target.exists():
        say(f"writing a seeded checkpoint of the {size} shapes")
        with replaced_folder(target) as folder:
            write_seeded(SIZES[size], folder)
    return target


def our_bundle(checkpoint: Path, say: Say) -> Path:
    """A checkpoint's bundle, FastViTHD for MLX alone.

    Raises:
        CheckpointError: the converter failed; it has said why.
    """
    target = _home() / f"{_key(checkpoint, '')}-bundle"
    if not target.exists():
        say("converting it for fastvlm-mlx")
        if run_converter([str(checkpoint), "-o", str(target), "--no-coreml"], silent=True):
            raise CheckpointError(f"{checkpoint} can't be converted; see above")
    return target


def rival_models(checkpoint: Path, bundle: Path, rivals: Sequence[str], dtype: str, say: Say) -> dict[str, Path]:
    """The checkpoint in the layout of each rival, with the bundle's tokenizer.

    Args:
        checkpoint: LLaVA's layout, safetensors.
        bundle: has the same weights; its tokenizer.json becomes theirs.
        rivals: names.
        dtype: of the weights, where a library computes in the type of its files.
        say: told what is being made.

    Raises:
        InputError: the bundle has no tokenizer. CheckpointError: another kind of checkpoint.
    """
    from fastvlm_bench.compare.processors import write_resolution

    tokenizer = bundle / TOKENIZER
    if not tokenizer.exists():
        raise InputError(f"{bundle} has no {TOKENIZER}, and rivals take questions as text; give one that has")
    models = {}
    for name in rivals:
        target = _home() / f"{_key(checkpoint, f'{name}{dtype}{_hash(tokenizer)}')}-{name}"
        if not target.exists():
            say(f"writing it for {name}")
            with replaced_folder(target) as folder, _weights_alone(checkpoint) as source:
                _BUILDERS[name](source, folder, tokenizer, dtype)
                write_resolution(folder, _PUBLISHED_SIDE)
        models[name] = target
    return models


def _for_mlx_vlm(source: Path, folder: Path, tokenizer: Path, dtype: str) -> None:
    import mlx.core as mx

    from fastvlm_bench.compare.layouts import to_mlx_vlm
    from fastvlm_bench.compare.processors import vocabulary, write_tokenizer

    to_mlx_vlm(source, folder, getattr(mx, dtype), tokens=vocabulary(tokenizer)[0])
    write_tokenizer(tokenizer, folder)


def _for_mlx_lm(source: Path, folder: Path, tokenizer: Path, dtype: str) -> None:
    import mlx.core as mx

    from fastvlm_bench.compare.layouts import to_mlx_lm
    from fastvlm_bench.compare.processors import vocabulary, write_tokenizer

    to_mlx_lm(source, folder, getattr(mx, dtype), tokens=vocabulary(tokenizer)[0])
    write_tokenizer(tokenizer, folder)


def _for_transformers(source: Path, folder: Path, tokenizer: Path, _: str) -> None:
    from fastvlm_bench.compare.layouts import to_transformers
    from fastvlm_bench.compare.processors import vocabulary, write_processor, write_tokenizer

    rows = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    tokens, image = vocabulary(tokenizer)
    to_transformers(source, folder, pad_vocabulary=image >= rows, image_token=image, tokens=tokens)
    write_tokenizer(tokenizer, folder, with_image=True)
    write_processor(folder)


_BUILDERS: dict[str, Callable[[Path, Path, Path, str], None]] = {
    "mlx-vlm": _for_mlx_vlm,
    "mlx-lm": _for_mlx_lm,
    "transformers": _for_transformers,
}
assert _BUILDERS.keys() == set(RIVALS)


@contextlib.contextmanager
def _weights_alone(checkpoint: Path) -> Iterator[Path]:
    """A folder with links to the checkpoint's config and weights, without its tokenizer and processor files."""
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files or not (checkpoint / "config.json").exists():
        raise CheckpointError(f"{checkpoint} isn't a checkpoint with a config.json and safetensors; give one")
    kind = json.loads((checkpoint / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind != _FAMILY:
        raise CheckpointError(
            f"{checkpoint} is of type {kind!r}; rivals are given {_FAMILY} only, compare one of those"
        )
    with tempfile.TemporaryDirectory() as folder:
        for file in (checkpoint / "config.json", *files):
            (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def _home() -> Path:
    return cache_dir() / "compare"


def _key(checkpoint: Path, more: str) -> str:
    """Of what a kept folder is made: the checkpoint's files, told by their sizes and times."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(checkpoint.iterdir())]
    text = json.dumps([FORMAT_VERSION, str(checkpoint.resolve()), files, more])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
