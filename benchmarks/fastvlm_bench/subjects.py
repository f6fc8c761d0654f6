"""The models that are measured: which were asked for, whether they fit, and what they are once loaded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastvlm_bench.loads import LoadTimes, cold_load, warm_loads
from fastvlm_bench.memory import check_memory, weights_bytes
from fastvlm_bench.seeded_model import build, model_config
from fastvlm_bench.sizes import published_size, vision_of
from fastvlm_mlx import hub
from fastvlm_mlx.bundle import PACKAGE, QUANTIZED_BITS, Bundle
from fastvlm_mlx.config import DOWNSAMPLING, ModelConfig, check_side
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.vision.coreml_runtime import COMPUTE_UNITS

if TYPE_CHECKING:
    from fastvlm_bench.runner import Plan
    from fastvlm_mlx.model import FastVLM

PLAIN = "none"  # of --q-bits: as stored


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
    compute_units: str = COMPUTE_UNITS[0]  # the usual one

    def __post_init__(self) -> None:
        """Raise InputError for what can't be."""
        if self.size is not None:
            vision_of(self.size)
        if self.bits is not None and self.bits not in QUANTIZED_BITS:
            known = ", ".join(map(str, QUANTIZED_BITS))
            raise InputError(f"--q-bits must be of {known} or {PLAIN}, got {self.bits}")
        if self.vision not in ("auto", "mlx", "coreml"):
            raise InputError(f"--vision must be of auto, mlx, coreml, got {self.vision!r}")
        if self.compute_units not in COMPUTE_UNITS:
            raise InputError(f"--compute-units must be of {', '.join(COMPUTE_UNITS)}, got {self.compute_units!r}")
        if self.size and self.vision == "coreml":
            raise InputError(
                "seeded shapes have no Core ML package; convert a checkpoint and name it with --model BUNDLE"
            )


@dataclass(frozen=True, slots=True)
class Subject:
    """A loaded model, described.

    Attributes:
        name: the config's.
        size: "0.5b", "1.5b" or "7b" if its decoder has that published shape, seeded or not; else None.
        seeded: random weights: answers mean nothing, times do.
        bits: of the decoder's matrices, quantised when stored or after loading; None where plain.
        precision: how the decoder's weights lie in memory.
        vision: "mlx" or "coreml", as used.
        compute_units: where Core ML may run; None where it doesn't.
        device: what ran which part.
        weights_bytes: of all weights in memory, as counted from the shapes.
        load: how long loading took.
        identity: of the weights and the encoder, as `FastVLM.identity`; `load(ttft_budget=...)` knows its model by it.
        image_size: side in pixels that it was trained at; None without a shape of the vision encoder.
        grid_pinpoints: AnyRes: (width, height) in pixels of the grids that it was trained for.
        patch_merge_type: AnyRes: how their tiles are joined.
        downsampling: pixels per side of a position.
    """

    name: str
    size: str | None
    seeded: bool
    bits: int | None
    precision: str
    vision: str
    compute_units: str | None
    device: str
    weights_bytes: int
    load: LoadTimes
    identity: str
    image_size: int | None
    grid_pinpoints: tuple[tuple[int, int], ...]
    patch_merge_type: str
    downsampling: int = DOWNSAMPLING

    @property
    def label(self) -> str:
        """Such as "FastVLM-0.5B, 4 bits, vision coreml"; tells subjects of one report apart."""
        bits = f", {self.bits} bits" if self.bits else ""
        units = f" {self.compute_units}" if self.compute_units not in (None, COMPUTE_UNITS[0]) else ""
        return f"{self.name}{bits}, vision {self.vision}{units}"


def choices(
    model: str | None, sizes: Sequence[str], bits: Sequence[int | None], visions: Sequence[str], units: Sequence[str]
) -> tuple[Choice, ...]:
    """Every combination, in order; MLX doesn't care for compute units, so it appears once.

    Raises:
        InputError: one that can't be.
    """
    found = [
        Choice(model, size, width, vision, unit if vision != "mlx" else COMPUTE_UNITS[0])
        for size, width, vision, unit in itertools.product(sizes or (None,), bits, visions, units)
    ]
    return tuple(dict.fromkeys(found))


def open_choices(wanted: Sequence[Choice], plan: Plan, available: int) -> list[Bundle | ModelConfig]:
    """The bundles, or the seeded shapes, of choices that can answer and fit into memory together; reads no weights.

    Args:
        wanted: the choices.
        plan: what they will be asked.
        available: bytes of memory that may be used; 0 if unknown, which checks nothing.

    Raises:
        InputError: they don't fit, or a question is longer than a model's context. ResolutionError: a side isn't of
            whole tokens for a model. Others as `fastvlm_mlx.load`.
    """
    sources = [
        model_config(choice.size) if choice.size else Bundle.open(hub.resolve(choice.model)) for choice in wanted
    ]
    configs = [source if isinstance(source, ModelConfig) else source.config for source in sources]
    for config in configs:
        _check_length(config, plan)
    check_memory(configs, wanted, plan, available)
    return sources


def _check_length(config: ModelConfig, plan: Plan) -> None:
    for side in _sides(config, plan):
        check_side(side, config.downsampling)
    side = max(_sides(config, plan))
    image_tokens = (side // config.downsampling) ** 2
    positions = plan.prompt_tokens + image_tokens + plan.max_tokens
    if positions > config.context_length:
        raise InputError(
            f"--prompt-tokens {plan.prompt_tokens}, {image_tokens} of an image at {side} px and "
            f"--max-tokens {plan.max_tokens} are {positions} positions; {config.name}'s context is "
            f"{config.context_length}; choose fewer"
        )


def _sides(config: ModelConfig, plan: Plan) -> tuple[int, ...]:
    return plan.resolutions or (config.vision.image_size if config.vision else 1024,)


def load_subject(choice: Choice, source: Bundle | ModelConfig, measures_load: bool) -> tuple[Subject, FastVLM]:
    """Load, or make, a model.

    Args:
        choice: what was asked for.
        source: of `open_choices`.
        measures_load: load it again, and once in a process of its own; seeded weights aren't loaded from files.

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
            # Core ML compiles and loads a function when it is first asked for.
            "warm": choice.vision != "mlx" and source.has(PACKAGE),
        }
        warm, model = warm_loads(arguments, repeats=3 if measures_load else 1)
        load = LoadTimes(cold_load(arguments), warm) if measures_load else LoadTimes()
    return _describe(choice, model, load), model


def _describe(choice: Choice, model: FastVLM, load: LoadTimes) -> Subject:
    from fastvlm_bench.runner import precision

    config = model.config
    stored = config.quantization
    vision = "coreml" if "Core ML" in model.engine.vision.device else "mlx"
    return Subject(
        name=config.name,
        size=published_size(config),
        seeded=choice.size is not None,
        bits=choice.bits or (stored.bits if stored else None),
        precision=precision(model, choice.bits),
        vision=vision,
        compute_units=choice.compute_units if vision == "coreml" else None,
        device=model.device,
        weights_bytes=weights_bytes(config, choice),
        load=load,
        identity=model.identity,
        image_size=config.vision.image_size if config.vision else None,
        grid_pinpoints=config.grid_pinpoints,
        patch_merge_type=config.patch_merge_type,
        downsampling=config.downsampling,
    )


def check_resolutions(label: str, model: FastVLM, resolutions: Sequence[int]) -> None:
    """Raise InputError for sides that a Core ML package lacks: MLX would run them, under Core ML's name."""
    sizes = getattr(model.engine.vision.encoder, "sizes", None)
    missing = [side for side in resolutions if sizes is not None and (side, side) not in sizes]
    if missing:
        there = ", ".join(str(h) if h == w else f"{h}x{w}" for h, w in sizes or ())
        raise InputError(
            f"{label}: the Core ML package takes images of {there} px, not {', '.join(map(str, missing))}; "
            "choose others with --resolution, or --vision mlx"
        )
