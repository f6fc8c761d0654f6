"""Read an export back as a source, and compare it with what it was made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from fastvlm_convert.configs import read_config
from fastvlm_convert.export_plan import EMBEDDING, HEAD, ExportPlan
from fastvlm_convert.keymap import Tensor, detect_layout, map_tensors
from fastvlm_convert.mlx_weights import Output, check_tensors, read_tensor
from fastvlm_convert.source import Checkpoint, read_json
from fastvlm_mlx.bundle import CONFIG
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import FastVLMError, VerificationError


def check_round_trip(folder: Path, plan: ExportPlan) -> None:
    """See that an export's config and tensors, read back, are those of its source; one tensor at a time.

    Raises:
        VerificationError: names what differs.
    """
    try:
        written = Checkpoint(folder)
        layout = detect_layout(written.tensors, folder)
        back, unknown = map_tensors(written, layout)
        _check_config(written, plan)
        check_tensors(back, unknown, _written_config(plan), str(folder))
    except FastVLMError as exc:
        raise VerificationError(f"{folder} can't be read back: {exc}") from exc
    by_source = {tensor.source: tensor for tensor in back.values()}
    for output in plan.outputs:
        if output.specs[0].name in by_source:  # CLIP's head isn't: reading drops it
            _check_output(output, plan, written, by_source)
        mx.clear_cache()


def _written_config(plan: ExportPlan) -> ModelConfig:
    """The model's config as the export says it."""
    tied = plan.config.decoder.tie_word_embeddings and not plan.form.own_head
    decoder = dataclasses.replace(plan.config.decoder, tie_word_embeddings=tied)
    return dataclasses.replace(plan.config, decoder=decoder, vision=None if plan.form.package else plan.config.vision)


def _check_config(written: Checkpoint, plan: ExportPlan) -> None:
    generation = written.path / "generation_config.json"
    found = read_config(
        written.config,
        plan.form.layout,
        plan.config.name,
        str(written.path / CONFIG),
        read_json(generation) if generation.exists() else {},
    )
    right = dataclasses.asdict(_written_config(plan))
    if other := [name for name, value in dataclasses.asdict(found).items() if value != right[name]]:
        raise VerificationError(
            f"{written.path / CONFIG} doesn't say what the model is: {other[0]} is read back as "
            f"{getattr(found, other[0])}, not {right[other[0]]}"
        )


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
            raise VerificationError(f"{spec.name} in {written.path} is read back as {tensor.name}, which it isn't")
        if not mx.array_equal(read_tensor(written, tensor), right):
            raise VerificationError(f"{spec.name} in {written.path} doesn't hold what {output.sources[0]} does")
