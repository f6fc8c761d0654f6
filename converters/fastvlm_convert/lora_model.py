"""The model that an adapter was trained in, where its folder says: LLaVA's training saves config.json beside it.

The official loader builds the model from that file instead of the base's: how images become tiles, how those are
merged and how long a prompt may be are the run's own, and needn't be what the base was trained with.

Source: apple/ml-fastvlm 592b4ad, llava/model/builder.py:54-57, llava/train/train_qwen.py:1179-1182 and 1240.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastvlm_convert.configs import read_config
from fastvlm_convert.keymap import Layout, detect_layout
from fastvlm_convert.source import Checkpoint, read_json
from fastvlm_mlx.bundle import CONFIG
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import CheckpointError

_STORED = ("quantization",)  # how the base's tensors lie in its files, whatever was trained
# What may differ between a base and a model that was trained from it; all else decides the tensors' shapes.
_FREE = {
    "image_size", "max_position_embeddings", "rms_norm_eps", "rope_factor", "rope_theta", "tie_word_embeddings",
}  # fmt: skip
_VOCABULARY = "decoder.vocab_size"
_SHOWN = 3  # differences that an error names


def read_trained_config(base: Checkpoint, folder: Path) -> dict[str, Any] | None:
    """The config of the model that an adapter was trained in.

    Args:
        base: the checkpoint as it lies there.
        folder: the adapter's.

    Returns:
        What takes the place of the base's config; None where the folder has none, as PEFT alone leaves it.

    Raises:
        CheckpointError: it can't be used, or is of a model of another shape than the base.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    raw = read_json(path)
    raw = {key: value for key, value in raw.items() if key not in _STORED}
    raw |= {key: base.config[key] for key in _STORED if key in base.config}
    layout = detect_layout(base.tensors, base.path)
    ours, theirs = (
        _shapes(_parse(config, where, layout)) for config, where in ((base.config, base.config_file), (raw, path))
    )
    other = [name for name in ours if ours[name] != theirs.get(name)]
    if other == [_VOCABULARY]:
        raise vocabulary_error(folder, base.path, theirs[_VOCABULARY], ours[_VOCABULARY])
    if other:
        named = "; ".join(f"{name} is {theirs.get(name)} instead of {ours[name]}" for name in other[:_SHOWN])
        raise CheckpointError(
            f"{path} is of another model than {base.path}: {named}; give the base that the adapter was trained on "
            "with --base, or correct that file"
        )
    return raw


def vocabulary_error(folder: Path, base: Path, theirs: object, ours: object) -> CheckpointError:
    """What to say of an adapter whose training gave the base more tokens, or fewer.

    Args:
        folder: the adapter's.
        base: the base's folder.
        theirs: tokens that the adapter was trained with.
        ours: tokens of the base.
    """
    return CheckpointError(
        f"{folder} was trained with a vocabulary of {theirs} tokens and {base} has {ours}, which merging can't change; "
        f"give a base of {theirs} tokens with --base, or merge in PyTorch (resize_token_embeddings, then PEFT's "
        "merge_and_unload) and convert the result"
    )


def _parse(raw: Mapping[str, Any], where: Path, layout: Layout) -> ModelConfig:
    try:
        return read_config(raw, layout, where.parent.name, str(where), {})
    except CheckpointError as exc:  # there are two files that it could be about
        if str(where) in str(exc):
            raise
        raise CheckpointError(f"{where}: {exc}") from exc


def _shapes(config: ModelConfig) -> dict[str, object]:
    """What decides the tensors' shapes, by place in our config."""
    parts: dict[str, Any] = {"decoder": config.decoder, "projector": config.projector, "vision": config.vision}
    return {
        f"{part}.{name}": value
        for part, found in parts.items()
        if found is not None
        for name, value in asdict(found).items()
        if name not in _FREE
    }
