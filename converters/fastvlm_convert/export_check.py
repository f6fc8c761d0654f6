"""Read an export back as a source, and compare it with what it was made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from fastvlm_convert.configs import read_config
from fastvlm_convert.export_plan import EMBEDDING, HEAD, ExportPlan
from fastvlm_convert.export_source import FOLDED
from fastvlm_convert.folding import fold_attention_scale
from fastvlm_convert.keymap import Tensor, detect_layout, map_tensors
from fastvlm_convert.mlx_weights import Output, check_tensors, read_tensor
from fastvlm_convert.source import Checkpoint, read_json
from fastvlm_convert.vision_weights import from_checkpoint
from fastvlm_mlx.bundle import CONFIG
from fastvlm_mlx.config import ModelConfig, VisionConfig
from fastvlm_mlx.errors import FastVLMError, VerificationError

NEXT = "this is a fault of the converter: please report it with this line"
# FastViTHD unfolded and folded again, relative L2 of each tensor: float32's rounding, or bfloat16's where asked for.
FOLDED_TOLERANCE = {mx.float32: 1e-5, mx.bfloat16: 5e-2}


def check_round_trip(folder: Path, plan: ExportPlan) -> None:
    """See that an export's config and tensors, read back, are those of its source; one tensor at a time.

    A bundle's FastViTHD is compared as a whole, folded again.

    Raises:
        VerificationError: names what differs.
    """
    try:
        written = Checkpoint(folder)
        back, unknown = map_tensors(written, detect_layout(written.tensors, folder))
        found = _read_config(written, plan)
        _check_config(found, _written_config(plan))
        check_tensors(back, unknown, _written_config(plan), CONFIG)
    except VerificationError:
        raise
    except FastVLMError as exc:
        said = str(exc).replace(f"{folder}/", "")  # a folder that is gone when this is read
        raise VerificationError(f"what was written for {plan.form.runtime} can't be read back: {said}; {NEXT}") from exc
    by_source = {tensor.source: tensor for tensor in back.values()}
    for output in plan.outputs:
        # CLIP's head isn't there: reading drops it.
        if output.specs[0].name in by_source and not output.sources[0].startswith(FOLDED):
            _check_output(output, plan, written, by_source)
        mx.clear_cache()
    if plan.folded and plan.config.vision:
        _check_folded(written, back, plan, plan.config.vision)


def _written_config(plan: ExportPlan) -> ModelConfig:
    """The model's config as the export says it."""
    tied = plan.config.decoder.tie_word_embeddings and not plan.form.own_head
    decoder = dataclasses.replace(plan.config.decoder, tie_word_embeddings=tied)
    return dataclasses.replace(plan.config, decoder=decoder, vision=None if plan.form.package else plan.config.vision)


def _read_config(written: Checkpoint, plan: ExportPlan) -> ModelConfig:
    generation = written.path / "generation_config.json"
    said = read_json(generation) if generation.exists() else {}
    return read_config(written.config, plan.form.layout, plan.config.name, CONFIG, said)


def _check_config(found: ModelConfig, right: ModelConfig) -> None:
    """Raise VerificationError for the first setting that isn't the model's."""
    ours, theirs = _settings(right), _settings(found)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise VerificationError(
                f"{CONFIG} as written says {name} {theirs.get(name)}, the model has {ours.get(name)}; {NEXT}"
            )


def _settings(config: ModelConfig) -> dict[str, object]:
    """The settings by their names, those of a part as PART.NAME."""
    out: dict[str, object] = {}
    for name, value in dataclasses.asdict(config).items():
        out |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return out


def _check_output(output: Output, plan: ExportPlan, written: Checkpoint, by_source: Mapping[str, Tensor]) -> None:
    """Compare what an output became with its source: names, and values in PyTorch's order."""
    values = [read_tensor(plan.checkpoint, plan.tensors[name]) for name in output.sources]
    # A packed matrix is compared with the same packing; any other tensor with the source itself, only cast.
    packed = len(output.specs) > 1
    made = output.make(values) if packed else [values[0].astype(output.specs[0].dtype)]
    stem, _, last = output.sources[0].rpartition(".")
    stems = (stem, HEAD) if stem == EMBEDDING else (stem,)
    for spec, right in zip(output.specs, made, strict=True):
        tensor, part = by_source[spec.name], spec.name.rpartition(".")[2] if packed else last
        if tensor.name not in [f"{stem}.{part}" for stem in stems]:
            raise VerificationError(f"{output.sources[0]} was written as {spec.name}, read as {tensor.name}; {NEXT}")
        if not mx.array_equal(read_tensor(written, tensor), right):
            raise VerificationError(f"{spec.name} as written doesn't hold what {output.sources[0]} does; {NEXT}")


def _check_folded(written: Checkpoint, back: Mapping[str, Tensor], plan: ExportPlan, config: VisionConfig) -> None:
    """Compare what folds out of the written tensors with the bundle's, where biases are that the result depends on."""
    sources = {name.removeprefix(FOLDED): tensor for name, tensor in plan.tensors.items() if name.startswith(FOLDED)}
    right = {
        name: np.array(read_tensor(plan.checkpoint, tensor).astype(mx.float32)) for name, tensor in sources.items()
    }
    kinds = {spec.dtype for output in plan.outputs if output.sources[0].startswith(FOLDED) for spec in output.specs}
    allowed = FOLDED_TOLERANCE[mx.float32 if mx.float32 in kinds else mx.bfloat16]
    # k's bias has no effect and v's is one of proj's: a runtime without them has the same network.
    ours, theirs = (
        fold_attention_scale(weights, config.head_dim, scale_q=False)
        for weights in (right, from_checkpoint(written, back, config))
    )
    for name, value in ours.items():
        size = max(float(np.linalg.norm(value)), float(np.finfo(np.float32).tiny))
        if (error := float(np.linalg.norm(theirs[name] - value)) / size) > allowed:
            raise VerificationError(
                f"FastViTHD as written gives {name} with a relative error of {error:.1e}, "
                f"{allowed:.0e} is allowed; {NEXT}"
            )
