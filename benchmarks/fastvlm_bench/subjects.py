"""The models that are measured: which were asked for, whether they fit, and what they are once loaded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastvlm_bench.layers import Storage, count_parameters, decoder_layers
from fastvlm_bench.loads import LoadTimes, cold_load, warm_loads
from fastvlm_bench.seeded_model import build, model_config
from fastvlm_bench.sizes import SIZES
from fastvlm_mlx import hub
from fastvlm_mlx.bundle import QUANTIZED_BITS, Bundle
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import InputError

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM

UNITS = ("CPU_AND_NE", "ALL", "CPU_AND_GPU", "CPU_ONLY")
PLAIN = "none"  # of --q-bits: as stored
_WORKING_BYTES = 1.15  # of the weights: what a question needs besides, roughly; a warning that comes late is none


@dataclass(frozen=True, slots=True)
class Choice:
    """A model as it was asked for.

    Attributes:
        model: as `fastvlm_mlx.load` takes it; unused where `size` is given.
        size: of the seeded shapes, or None.
        bits: quantise the decoder to that many after loading.
        vision: "auto", "mlx" or "coreml".
        compute_units: where Core ML may run.
    """

    model: str | None = None
    size: str | None = None
    bits: int | None = None
    vision: str = "auto"
    compute_units: str = UNITS[0]

    def __post_init__(self) -> None:
        """Raise InputError for what can't be."""
        if self.size is not None and self.size not in SIZES:
            raise InputError(f"--size must be of {', '.join(SIZES)}, got {self.size!r}")
        if self.bits is not None and self.bits not in QUANTIZED_BITS:
            known = ", ".join(map(str, QUANTIZED_BITS))
            raise InputError(f"--q-bits must be of {known} or {PLAIN}, got {self.bits}")
        if self.vision not in ("auto", "mlx", "coreml"):
            raise InputError(f"--vision must be of auto, mlx, coreml, got {self.vision!r}")
        if self.compute_units not in UNITS:
            raise InputError(f"--compute-units must be of {', '.join(UNITS)}, got {self.compute_units!r}")
        if self.size and self.vision == "coreml":
            raise InputError(
                "seeded shapes have no Core ML package; convert a checkpoint and name it with --model BUNDLE"
            )


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model, described.

    Attributes:
        name: the config's.
        size: of the seeded shapes, or None.
        seeded: random weights: answers mean nothing, times do.
        bits: of the decoder's matrices, quantised when stored or after loading; None where plain.
        precision: how the decoder's weights lie in memory.
        vision: "mlx" or "coreml", as used.
        device: what ran which part.
        weights_bytes: of all weights in memory, as counted from the shapes.
        load: how long loading took.
        identity: of the weights and the encoder, as `FastVLM.identity`; `load(ttft_budget=...)` knows its model by it.
        image_size: side in pixels that it was trained at; None without a shape of FastViTHD.
        grid_pinpoints: AnyRes: (width, height) in pixels of the grids that it was trained for.
        patch_merge_type: AnyRes: how their tiles are joined.
    """

    name: str
    size: str | None
    seeded: bool
    bits: int | None
    precision: str
    vision: str
    device: str
    weights_bytes: int
    load: LoadTimes
    identity: str
    image_size: int | None
    grid_pinpoints: tuple[tuple[int, int], ...]
    patch_merge_type: str

    @property
    def label(self) -> str:
        """Such as "seeded 0.5b, 4 bits, coreml"; tells subjects of one report apart."""
        bits = f", {self.bits} bits" if self.bits else ""
        return f"{self.name}{bits}, vision {self.vision}"


def choices(
    model: str | None, sizes: Sequence[str], bits: Sequence[int | None], visions: Sequence[str], units: Sequence[str]
) -> tuple[Choice, ...]:
    """Every combination, in order; MLX doesn't care for compute units, so it appears once.

    Raises:
        InputError: one that can't be.
    """
    found = [
        Choice(model, size, width, vision, unit if vision != "mlx" else UNITS[0])
        for size, width, vision, unit in itertools.product(sizes or (None,), bits, visions, units)
    ]
    return tuple(dict.fromkeys(found))


def open_choices(wanted: Sequence[Choice], available: int) -> list[Bundle | ModelConfig]:
    """The bundles, or the seeded shapes, of choices that fit into memory together; no weights are read.

    Args:
        wanted: the choices.
        available: bytes of memory that may be used; 0 if unknown, which checks nothing.

    Raises:
        InputError: they don't fit. Others as `fastvlm_mlx.load`.
    """
    sources = [
        model_config(choice.size) if choice.size else Bundle.open(hub.resolve(choice.model)) for choice in wanted
    ]
    needs = [
        weights_bytes(source if isinstance(source, ModelConfig) else source.config, choice)
        for source, choice in zip(sources, wanted, strict=True)
    ]
    needed = int(sum(needs) * _WORKING_BYTES)
    if available and needed > available:
        parts = f"{len(needs)} models " if len(needs) > 1 else ""
        raise InputError(
            f"{parts}need about {needed / 2**30:.1f} GiB of memory and {available / 2**30:.1f} GiB are free; "
            "choose fewer --q-bits, a smaller --size, or measure one model at a time"
        )
    return sources


def weights_bytes(config: ModelConfig, choice: Choice) -> int:
    """Bytes of a model's weights in memory, counted from its shapes."""
    import mlx.core as mx

    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    plain = Storage("float32" if on_cpu else "bfloat16")
    stored = config.quantization
    bits = choice.bits or (stored.bits if stored else None)
    decoder = plain if on_cpu or not bits else Storage(plain.dtype, bits, stored.group_size if stored else 64)
    counts = count_parameters(config)
    # The embedding is a matrix of its own where it isn't the head, which is counted with the layers.
    rows = config.decoder.vocab_size * (0 if config.decoder.tie_word_embeddings else 1)
    layers = sum(layer.weight_bytes(decoder) for layer in decoder_layers(config.decoder, 1, 0, rows))
    return plain.value_bytes(counts.get("vision", 0) + counts["projector"]) + layers


def load_subject(choice: Choice, source: Bundle | ModelConfig, measures_load: bool) -> tuple[Subject, FastVLM]:
    """Load, or make, a model.

    Args:
        choice: what was asked for.
        source: of `open_choices`.
        measures_load: load it three times, once in a process of its own; seeded weights aren't loaded from files.

    Raises:
        Errors as `fastvlm_mlx.load`.
    """
    if isinstance(source, ModelConfig):
        model, load = build(source, choice.bits), LoadTimes()
    else:
        arguments = {
            "model": str(source.path),
            "vision": choice.vision,
            "quantize": choice.bits,
            "compute_units": choice.compute_units,
        }
        cold = cold_load(arguments) if measures_load else None
        warm, model = warm_loads(arguments, repeats=3 if measures_load else 1)
        load = LoadTimes(cold, warm if measures_load else ())
    return _describe(choice, model, load), model


def _describe(choice: Choice, model: FastVLM, load: LoadTimes) -> Subject:
    from fastvlm_bench.runner import precision

    stored = model.config.quantization
    return Subject(
        name=model.config.name,
        size=choice.size,
        seeded=choice.size is not None,
        bits=choice.bits or (stored.bits if stored else None),
        precision=precision(model, choice.bits),
        vision="coreml" if "Core ML" in model.engine.vision.device else "mlx",
        device=model.device,
        weights_bytes=weights_bytes(model.config, choice),
        load=load,
        identity=model.identity,
        image_size=model.config.vision.image_size if model.config.vision else None,
        grid_pinpoints=model.config.grid_pinpoints,
        patch_merge_type=model.config.patch_merge_type,
    )
