"""The vision encoder as a Core ML package: one function per image size, weights stored once.

Converted with `torch.export`: `torch.jit.trace` fails with numpy 2.4 (coremltools 2633) and is deprecated.
Sizes are functions, not flexible shapes: those add gathers, casts and reports of trouble on the Neural Engine
(coremltools 1909, 2370, 2730).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fastvlm_convert import compression
from fastvlm_convert.folding import fold_attention_scale
from fastvlm_convert.quiet import quiet
from fastvlm_convert.ranges import Meter, Ranges, apply_ranges
from fastvlm_convert.rounding import round_float16
from fastvlm_mlx.config import VisionConfig, check_side
from fastvlm_mlx.errors import InputError

if TYPE_CHECKING:
    from fastvlm_convert.torch_fastvithd import FastViTHD

INPUT, OUTPUT = "image", "image_features"
APPLE_INPUT = "images"  # in packages as Apple exports them
TARGETS = ("macOS13", "macOS14", "macOS15")  # macOS 15 is needed for several functions in a package
Attention = Literal["batched", "split", "sdpa"]
Interface = Literal["image", "tensor"]
DEFAULT_SIDES = (256, 512, 768, 1024)
MAX_SIDE = 1536
# Fused again, LayerNorm would be what torch_fastvithd takes apart.
_UNWANTED_PASSES = ("common::fuse_layernorm_or_instancenorm",)

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class Size:
    """A function's image size in pixels."""

    height: int
    width: int

    @property
    def function(self) -> str:
        """Its function's name: r1024, or r576x1024 for height x width."""
        return f"r{self.height}" if self.height == self.width else f"r{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read "768" or "1024x576" (height x width).

        Raises:
            InputError: not of that form. ResolutionError: not of whole tokens for any encoder; for the model's own,
                see `vision_package.check_sizes`.
        """
        parts = text.strip().lower().split("x")
        if not (1 <= len(parts) <= 2 and all(part.isdecimal() for part in parts)):
            raise InputError(f"a resolution is SIDE or HEIGHTxWIDTH in pixels, such as 768 or 1024x576; got {text!r}")
        sides = [int(part) for part in parts]
        for side in sides:
            check_side(side)
            if side > MAX_SIDE:
                raise InputError(f"a Core ML resolution can have at most {MAX_SIDE} pixels a side, got {text}")
        return cls(sides[0], sides[-1])

    @classmethod
    def parse_list(cls, text: str) -> tuple[Size, ...]:
        """Read "256,1024x576"; errors as `parse`."""
        return tuple(cls.parse(part) for part in text.split(","))


@dataclass(frozen=True, slots=True)
class PackageOptions:
    """How the package is made; see `fastvlm-convert --help`.

    With the interface "tensor" it takes what Apple's own export takes: float32 (1, 3, H, W) in [0, 1], not an image,
    and gives float32.
    """

    sizes: tuple[Size, ...] = tuple(Size(side, side) for side in DEFAULT_SIDES)
    attention: Attention = "batched"
    bits: int = 16
    min_target: str = "macOS15"
    range_safety: bool = True
    interface: Interface = "image"

    def __post_init__(self) -> None:
        """Raise InputError for what can't go together."""
        if self.attention not in get_args(Attention):
            raise InputError(f"--attention must be one of {', '.join(get_args(Attention))}, got {self.attention!r}")
        if self.min_target not in TARGETS:
            raise InputError(f"--min-target must be one of {', '.join(TARGETS)}, got {self.min_target!r}")
        if self.bits not in (16, 8):
            raise InputError(f"--vision-bits must be 16 or 8, got {self.bits}")
        if len({size.function for size in self.sizes}) != len(self.sizes) or not self.sizes:
            raise InputError("--resolutions must name at least one size, and none twice")
        if self.min_target != "macOS15" and (len(self.sizes) > 1 or self.attention == "sdpa"):
            raise InputError("several resolutions, and --attention sdpa, need --min-target macOS15")
        if self.min_target != "macOS15" and self.bits == 8:
            raise InputError("--vision-bits 8 needs --min-target macOS15: before it there are no scales by block")


def build_network(
    config: VisionConfig,
    weights: Weights,
    attention: Attention = "batched",
    ranges: Ranges | None = None,
    rounded: bool = False,
    bits: int = 16,
) -> FastViTHD:
    """The PyTorch network with its weights, folded for the Neural Engine and scaled by `ranges`.

    `rounded` rounds them to float16 and, with 8 `bits`, to what int8 leaves: as the package stores them.
    """
    from fastvlm_convert.torch_fastvithd import FastViTHD

    ranges = ranges or Ranges()
    network = FastViTHD(config, attention, ranges).eval()
    folded = fold_attention_scale(dict(weights), config.head_dim, scale_q=attention != "sdpa")
    scaled = apply_ranges(folded, ranges, config)
    if rounded:
        scaled = {n: round_float16(w) if w.ndim > 1 else w.astype(np.float16) for n, w in scaled.items()}
    if rounded and bits == 8:
        scaled = {n: compression.packed(w) if compression.fits(w) else w for n, w in scaled.items()}
    network.load(scaled)
    return network


def measure_ranges(config: VisionConfig, weights: Weights, images: Iterable[np.ndarray]) -> Ranges:
    """Run the network in float32 on calibration images and choose exponents.

    Args:
        config: the encoder's shape.
        weights: folded weights.
        images: (H, W, 3) uint8 each, sides multiples of the downsampling.
    """
    import torch

    from fastvlm_convert.torch_fastvithd import FastViTHD

    meter = Meter()
    network = FastViTHD(config, probe=meter).eval()
    network.load(fold_attention_scale(dict(weights), config.head_dim, scale_q=True))
    with torch.inference_mode():
        for image in images:
            network(torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None])
    return meter.choose()


def convert_package(
    config: VisionConfig,
    weights: Weights,
    target: Path,
    options: PackageOptions,
    ranges: Ranges,
    progress: Callable[[str], object] = lambda _: None,
) -> None:
    """Write the package: a single function for one size, several with shared weights otherwise.

    Args:
        config: the encoder's shape.
        weights: folded weights, by the names of fastvlm_convert.folding.
        target: the .mlpackage to write; must not exist.
        options: sizes, attention form, bits, least macOS.
        ranges: exponents of `measure_ranges`.
        progress: called with what is being done.
    """
    network = build_network(config, weights, options.attention, ranges, rounded=True)
    with TemporaryDirectory(prefix="fastvlm-coreml-", dir=target.parent) as folder, quiet(), _temporary_in(folder):
        import coremltools as ct

        parts = {}
        for size in options.sizes:
            progress(f"converting the vision encoder at {size.height} x {size.width}")
            parts[size.function] = Path(folder) / f"{size.function}.mlpackage"
            _convert(network, size, options).save(str(parts[size.function]))
        if options.min_target != "macOS15":
            shutil.move(parts[options.sizes[0].function], target)
            return
        progress("joining the functions")
        descriptor = ct.utils.MultiFunctionDescriptor()
        for name, path in parts.items():
            descriptor.add_function(str(path), src_function_name="main", target_function_name=name)
        descriptor.default_function_name = options.sizes[-1].function
        ct.utils.save_multifunction(descriptor, str(target))


@contextmanager
def _temporary_in(folder: str) -> Iterator[None]:
    """Have coremltools put its own copies of a package there: on the disk that was asked for room, and cleaned up."""
    before, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def _convert(network: FastViTHD, size: Size, options: PackageOptions) -> Any:
    import coremltools as ct
    import torch

    from fastvlm_convert.torch_fastvithd import FromUnitPixels

    is_image = options.interface == "image"
    module = network if is_image else FromUnitPixels(network)
    example = torch.zeros(1, 3, size.height, size.width)
    with torch.inference_mode(False), torch.no_grad():
        exported = torch.export.export(module, (example,)).run_decompositions({})
    pipeline = ct.PassPipeline.DEFAULT
    pipeline.remove_passes(_UNWANTED_PASSES)
    if options.bits == 8:
        compression.add_to(pipeline)
    # Pixels as they are: 1/255 is in the stem. An image input is resized and converted by Core ML itself.
    given = ct.ImageType(name=INPUT, shape=example.shape, color_layout=ct.colorlayout.RGB)
    precision = ct.precision.FLOAT16
    if not is_image:
        given = ct.TensorType(name=APPLE_INPUT, shape=example.shape, dtype=np.float32)
        precision = ct.transform.FP16ComputePrecision(op_selector=_is_float16)
    return ct.convert(
        exported,
        inputs=[given],
        outputs=[ct.TensorType(name=OUTPUT, dtype=np.float16 if is_image else np.float32)],
        minimum_deployment_target=getattr(ct.target, options.min_target),
        compute_precision=precision,
        compute_units=ct.ComputeUnit.CPU_AND_NE,
        pass_pipeline=pipeline,
        skip_model_load=True,
    )


def _is_float16(op: Any) -> bool:
    """Every op but the first, by 255: in float32 it makes whole numbers of 8-bit pixels, which float16 holds exactly.

    Fractions would be rounded: an error of 2.7e-3 instead of 2.0e-3 in the features (tiny, the same picture). A float32
    input has to be cast outside of the Neural Engine in any case; this op is expected to run there too.
    """
    return not (op.op_type == "mul" and APPLE_INPUT in (op.x.name, op.y.name))
