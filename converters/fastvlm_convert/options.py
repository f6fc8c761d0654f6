"""What the user wants made of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from fastvlm_convert.coreml_vision import PackageOptions
from fastvlm_convert.quantize import Quantization
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.template import TEMPLATES

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass(frozen=True, slots=True)
class Options:
    """What to make of a checkpoint.

    Attributes:
        dtype: "float16", "bfloat16" or "float32" for decoder and projector; None keeps the source's.
        vision_dtype: the same for FastViTHD; None rounds nothing (float32 where folding changes values).
        q_bits: 2, 3, 4, 5, 6 or 8 bits per decoder weight; None doesn't quantise.
        q_group_size: weights per scale: 32, 64 or 128.
        quantize_projector: quantise the projector too.
        quantize_vision: quantise FastViTHD's matrices too.
        package: how FastViTHD's Core ML package is made; None makes none.
        template: how prompts are written, of `fastvlm_mlx.template.TEMPLATES`; None goes by the decoder's family.
    """

    dtype: str | None = None
    vision_dtype: str | None = None
    q_bits: int | None = None
    q_group_size: int = 64
    quantize_projector: bool = False
    quantize_vision: bool = False
    package: PackageOptions | None = None
    template: str | None = None

    def __post_init__(self) -> None:
        """Raise InputError for unknown dtypes, widths or templates."""
        for name in (self.dtype, self.vision_dtype):
            if name is not None and name not in DTYPES:
                raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
        if (self.quantize_projector or self.quantize_vision) and self.q_bits is None:
            raise InputError("quantising projector or vision needs -q")
        if self.template is not None and self.template not in TEMPLATES:
            raise InputError(f"template must be one of {', '.join(TEMPLATES)}, got {self.template!r}")
        _ = self.width

    @property
    def width(self) -> Quantization | None:
        """Bits and group size, where asked."""
        return None if self.q_bits is None else Quantization(self.q_bits, self.q_group_size)

    @property
    def suffix(self) -> str:
        """What the default output folder's name adds to the checkpoint's."""
        parts = [
            f"{self.q_bits}bit" if self.q_bits else "",
            f"g{self.q_group_size}" if self.q_bits and self.q_group_size != 64 else "",
            "projector" if self.quantize_projector else "",
            "vision" if self.quantize_vision else "",
            self.dtype or "",
            f"vision-{self.vision_dtype}" if self.vision_dtype else "",
            self.template or "",
            f"coreml-{self.package.bits}bit" if self.package and self.package.bits != 16 else "",
        ]
        return "".join(f"-{part}" for part in parts if part)
