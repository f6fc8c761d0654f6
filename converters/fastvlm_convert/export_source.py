"""What an export is made of: a checkpoint, an adapter with its base, or a bundle of ours.

What a bundle holds is not rounded again, only named and laid out anew; FastViTHD lies there folded, and is given
under the bundle's names with FOLDED before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastvlm_convert.keymap import DECODER_NAMES, PROJECTOR, Layout, Rule, Tensor, map_tensors
from fastvlm_convert.mil_check import open_package
from fastvlm_convert.options import Options
from fastvlm_convert.origin import merge_record, open_source
from fastvlm_convert.pipeline import read_model
from fastvlm_convert.records import Progress, check_target
from fastvlm_convert.source import Checkpoint, TensorFiles
from fastvlm_convert.vision_weights import from_bundle, from_checkpoint
from fastvlm_mlx.bundle import CONFIG, DECODER, VISION, Bundle
from fastvlm_mlx.config import ModelConfig, QuantizationConfig, VisionConfig
from fastvlm_mlx.errors import BundleError, CheckpointError, FastVLMError, InputError
from fastvlm_mlx.hub_cache import bundle_format
from fastvlm_mlx.manifest import Source

FOLDED = "folded."

# The names of decoder.safetensors.
BUNDLE = Layout(
    name="bundle",
    marks=(r"projector\.linear_1\..*",),
    rules=(
        Rule(r"projector\.linear_1\.(.*)", PROJECTOR + r"0.\1"),
        Rule(r"projector\.linear_2\.(.*)", PROJECTOR + r"2.\1"),
        Rule(r"projector\.image_newline", "model.image_newline"),
        Rule(DECODER_NAMES, r"\1"),
    ),
)


class BundleSource(Checkpoint):
    """The tensors of a bundle as a checkpoint's; `bundle` has the rest."""

    def __init__(self, path: Path) -> None:
        """Open the bundle, whose files are checked by their hashes; errors as `Bundle.open`."""
        self.bundle = Bundle.open(path)
        self.path, self.config, self.adapter = path, {}, None
        self.config_file = path / CONFIG
        files = [path / DECODER, *([path / VISION] if self.bundle.config.vision else [])]
        TensorFiles.__init__(self, files)
        here = [stored for stored in self.tensors.values() if stored.shard == path / VISION]
        packed = any(stored.name.endswith(".scales") for stored in here)  # no weights that can be written elsewhere
        self.folded = (
            {}
            if packed
            else {
                FOLDED + stored.name: Tensor(FOLDED + stored.name, stored.name, stored.shape, stored.dtype)
                for stored in here
            }
        )


def open_any(
    source: Path, target: Path, base: Path | None, source_id: str | None, revision: str | None, progress: Progress
) -> tuple[Checkpoint, Layout, Source]:
    """Open what is to be exported; arguments and errors as `fastvlm_convert.origin.open_source`.

    A bundle is a source with the name and revision of its own, and with the hashes of its files.
    """
    if bundle_format(source) is None:
        return open_source(source, target, base, source_id, revision, progress)
    if base is not None:
        raise InputError(f"{source} is a bundle, no adapter; leave --base out")
    opened = BundleSource(source)
    check_target(source, target)
    manifest = opened.bundle.manifest
    files = {name: record.sha256 for name, record in manifest.files.items()}
    layout = replace(BUNDLE, has_vision=opened.bundle.config.vision is not None)
    origin = replace(manifest.source, layout=layout.name, files=files)
    return opened, layout, replace(origin, id=source_id or origin.id, revision=revision or origin.revision)


def read_any(
    opened: Checkpoint, layout: Layout, name: str, options: Options
) -> tuple[dict[str, Tensor], ModelConfig, list[str]]:
    """Tensors, config and warnings, as `fastvlm_convert.pipeline.read_model` gives them; errors too."""
    if not isinstance(opened, BundleSource):
        return read_model(opened, layout, name, options)
    config, width = opened.bundle.config, options.width
    if config.quantization and width:
        raise CheckpointError(
            f"{opened.path} is quantised already ({config.quantization.bits} bits); convert it without -q"
        )
    if width:
        config = replace(config, quantization=QuantizationConfig(width.bits, width.group_size))
    return map_tensors(opened, BUNDLE)[0] | opened.folded, config, []


def read_vision(opened: Checkpoint, tensors: Mapping[str, Tensor], config: VisionConfig) -> dict[str, np.ndarray]:
    """FastViTHD's folded weights, by the names of fastvlm_convert.folding.

    Raises:
        CheckpointError: those of a bundle are rounded.
    """
    if not isinstance(opened, BundleSource):
        return from_checkpoint(opened, tensors, config)
    try:
        return from_bundle(opened.bundle)
    except BundleError as exc:
        raise CheckpointError(
            f"the vision weights of {opened.path} are rounded; give the checkpoint that it was made from"
        ) from exc


def package_side(package: Path) -> int | None:
    """Side of the square images, in pixels, that a Core ML package takes; None where that can't be read."""
    try:
        opened = open_package(package)
    except FastVLMError:  # no package, none that the checker knows, or coremltools isn't there
        return None
    given = opened.functions[opened.default_function].inputs[0].shape
    return given[-1] if len(given) == 4 and given[-1] == given[-2] > 0 else None


def earlier_changes(opened: Checkpoint, origin: Source) -> tuple[str, ...]:
    """The change record up to here: of a bundle, or of a merge."""
    if isinstance(opened, BundleSource):
        return opened.bundle.manifest.changes
    return merge_record(origin)
