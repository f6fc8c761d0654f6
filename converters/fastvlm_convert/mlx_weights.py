"""Plan what the safetensors files of a bundle hold, then write them tensor by tensor.

Shapes and dtypes follow from the source's headers, so the file's own header is written first and the
values stream through: no more than one source shard and one tensor are in memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from fastvlm_convert.folding import Folded, fold_vision
from fastvlm_convert.keymap import PROJECTOR, VISION, Tensor
from fastvlm_convert.quantize import Quantization, quantize
from fastvlm_convert.schema import Shapes, decoder_shapes, projector_layers, projector_shapes, vision_shapes
from fastvlm_convert.source import DTYPES, Checkpoint
from fastvlm_mlx.bundle import parameter_shapes, raise_faults
from fastvlm_mlx.config import ModelConfig, VisionConfig
from fastvlm_mlx.vision.fastvithd import FastViTHD

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of an output file."""

    name: str
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Size of its values in bytes."""
        return int(np.prod(self.shape)) * self.dtype.size


@dataclass(frozen=True, slots=True)
class Output:
    """Tensors that are made together (one, or the three of a quantised matrix), and what makes them."""

    specs: tuple[TensorSpec, ...]
    sources: tuple[str, ...]  # LLaVA names
    make: Callable[[Sequence[mx.array]], Sequence[mx.array]]


def check_tensors(tensors: Mapping[str, Tensor], unknown: Sequence[str], config: ModelConfig, where: str) -> None:
    """Compare a checkpoint's tensors with what its config asks for.

    Raises:
        WeightsError: lists every missing, unexpected and wrongly shaped tensor at once.
    """
    expected: Shapes = decoder_shapes(config.decoder) | projector_shapes(config.projector, config.image_newline)
    if config.vision:
        expected |= vision_shapes(config.vision, tensors)
    faults: dict[str, list[str]] = {"missing": [], "unexpected": list(unknown), "wrong shape": []}
    for name, shape in list(expected.items()):
        tensor = tensors.get(name)
        wanted = {name: shape}
        # Convolutions and folded matrices of the encoder can't be taken packed; they are reported as misshapen.
        packed = tensor is not None and tensor.dtype == "U32" and not name.startswith(VISION)
        if packed and config.quantization and len(shape) == 2:
            width = Quantization(config.quantization.bits, config.quantization.group_size)
            words, grouped = width.shapes(shape)
            stem = name.removesuffix("weight")
            wanted = {name: words, f"{stem}scales": grouped, f"{stem}biases": grouped}
            expected |= wanted
        for part, right in wanted.items():
            if part not in tensors:
                faults["missing"].append(part)
            elif tensors[part].shape != right:
                faults["wrong shape"].append(f"{tensors[part].source} {tensors[part].shape} instead of {right}")
    faults["unexpected"] += [tensor.source for name, tensor in tensors.items() if name not in expected]
    raise_faults(faults, where)


def plan_decoder(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    dtype: mx.Dtype | None,
    width: Quantization | None,
    quantize_projector: bool,
) -> list[Output]:
    """decoder.safetensors: decoder under mlx-lm's names, the projector under `projector.`."""
    names = decoder_shapes(config.decoder) | projector_shapes(config.projector, config.image_newline)
    outputs: list[Output] = []
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition(".")
        if name not in names and not (part in ("scales", "biases") and f"{stem}.weight" in names):
            continue
        wide = width if quantize_projector or not name.startswith(PROJECTOR) else None
        stored = DTYPES[tensor.dtype]
        kept = stored if stored == mx.uint32 else dtype or stored
        outputs.append(_output(_target_name(name, config), tensor.shape, kept, (name,), _cast(kept), wide))
    return outputs


def _cast(dtype: mx.Dtype) -> Callable[[Sequence[mx.array]], tuple[mx.array]]:
    return lambda tensors: (tensors[0].astype(dtype),)


def _target_name(name: str, config: ModelConfig) -> str:
    for number, layer in enumerate(projector_layers(config.projector), start=1):
        if name.startswith(layer):
            return f"projector.linear_{number}.{name.removeprefix(layer)}"
    return "projector.image_newline" if name == "model.image_newline" else name


def plan_vision(
    tensors: Mapping[str, Tensor], config: VisionConfig, dtype: mx.Dtype | None, width: Quantization | None
) -> list[Output]:
    """vision.safetensors: the encoder folded, under the names of fastvlm_mlx.vision.fastvithd.

    With no `dtype`, tensors that folding leaves alone keep the source's dtype and the others are float32,
    so nothing is rounded.
    """
    shapes = parameter_shapes(FastViTHD(config))
    return [_vision_output(tensors, f, shapes[f.name], dtype, width) for f in fold_vision(config, tensors)]


def _vision_output(
    tensors: Mapping[str, Tensor],
    folded: Folded,
    shape: tuple[int, ...],
    dtype: mx.Dtype | None,
    width: Quantization | None,
) -> Output:
    first = tensors[folded.sources[0]]
    # Scales of bfloat16 would double the error of 8 bits (5.1e-2 against 1.8e-2 on the tiny encoder).
    packs = width and width.fits(shape)
    kept = dtype or (DTYPES[first.dtype] if folded.exact and not packs else mx.float32)

    def make(sources: Sequence[mx.array]) -> tuple[mx.array]:
        values = folded.fold([np.array(s.astype(mx.float32)).astype(np.float64) for s in sources])
        return (mx.array(np.ascontiguousarray(values, np.float32)).astype(kept),)

    return _output(folded.name, shape, kept, folded.sources, make, width)


def _output(
    target: str,
    shape: tuple[int, ...],
    dtype: mx.Dtype,
    sources: tuple[str, ...],
    make: Callable[[Sequence[mx.array]], tuple[mx.array]],
    width: Quantization | None,
) -> Output:
    """One tensor as `make` gives it or, where a width is asked and fits, packed with scales and biases."""
    if not (width and width.fits(shape) and target.endswith(".weight")):
        return Output((TensorSpec(target, shape, dtype),), sources, make)
    packed, grouped = width.shapes(shape)
    stem = target.removesuffix("weight")
    specs = (
        TensorSpec(target, packed, mx.uint32),
        TensorSpec(f"{stem}scales", grouped, dtype),
        TensorSpec(f"{stem}biases", grouped, dtype),
    )
    return Output(specs, sources, lambda tensors: quantize(make(tensors)[0], width))


def write_safetensors(
    path: Path,
    outputs: Sequence[Output],
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    progress: Callable[[int], object],
) -> None:
    """Write one file, reading the source's shards in their own order.

    Args:
        path: the file to write.
        outputs: what to write; reordered by where the first source lies.
        checkpoint: the values.
        tensors: LLaVA name -> source tensor.
        progress: called with the number of bytes after each tensor.
    """
    place = {name: index for index, name in enumerate(checkpoint.tensors)}
    ordered = sorted(outputs, key=lambda output: place[tensors[output.sources[0]].source])
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for spec in (spec for output in ordered for spec in output.specs):
        end = offset + spec.nbytes
        header[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for output in ordered:
            made = output.make([read_tensor(checkpoint, tensors[name]) for name in output.sources])
            for spec, value in zip(output.specs, made, strict=True):
                if tuple(value.shape) != spec.shape or value.dtype != spec.dtype:
                    raise AssertionError(f"{spec} was planned, {value.shape} {value.dtype} was made")
                file.write(raw_bytes(value))
                progress(spec.nbytes)
            del made
            mx.clear_cache()  # MLX keeps freed buffers; here every tensor has another size


def read_tensor(checkpoint: Checkpoint, tensor: Tensor) -> mx.array:
    """A tensor as LLaVA lays it out."""
    value = checkpoint.read(tensor.source)
    return tensor.transform(value) if tensor.transform else value


def raw_bytes(value: mx.array) -> memoryview:
    """Row-major little-endian bytes; bfloat16 goes through its bits, numpy doesn't have it."""
    bits = mx.contiguous(value).view(mx.uint16) if value.dtype == mx.bfloat16 else value
    return np.ascontiguousarray(np.array(bits, copy=False)).data.cast("B")
