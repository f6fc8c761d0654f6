"""Open what is to be converted, whatever it is to become, and say where it came from."""

from __future__ import annotations

from pathlib import Path

from fastvlm_convert.configs import check_model_type
from fastvlm_convert.keymap import Layout, detect_layout
from fastvlm_convert.lora import open_checkpoint
from fastvlm_convert.records import Progress, check_target, hash_source
from fastvlm_convert.source import Checkpoint
from fastvlm_mlx.manifest import Source


def open_source(
    source: Path, target: Path, base: Path | None, source_id: str | None, revision: str | None, progress: Progress
) -> tuple[Checkpoint, Layout, Source]:
    """Open a checkpoint, or an adapter with its base, and hash it.

    Args:
        source: folder of a checkpoint or of an adapter.
        target: the folder that is to be written.
        base: what an adapter was trained on; None for what its config names.
        source_id: the name to record for the checkpoint; None for its folder's.
        revision: the commit to record for it.
        progress: called with the bytes hashed.

    Raises:
        CheckpointError: it can't be read, is no FastVLM, or adapter and base don't belong together.
        InputError: the target holds the source, or something that this library didn't write.
    """
    checkpoint = open_checkpoint(source, base)
    layout = _layout_of(checkpoint)
    for folder in dict.fromkeys((source, checkpoint.path)):
        check_target(folder, target)
    files = hash_source(checkpoint.path, checkpoint.shards, progress)
    name = source_id or checkpoint.path.resolve().name
    return checkpoint, layout, Source(name, layout.name, files, revision, checkpoint.adapter)


def merge_record(origin: Source) -> tuple[str, ...]:
    """What merging an adapter adds to the change record."""
    return (origin.adapter.changes,) if origin.adapter else ()


def _layout_of(checkpoint: Checkpoint) -> Layout:
    """The layout of a FastVLM; another kind of model is told first."""
    check_model_type(checkpoint.config, str(checkpoint.config_file))
    return detect_layout(checkpoint.tensors, checkpoint.path)
