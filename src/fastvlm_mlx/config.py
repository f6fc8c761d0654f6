"""The bundle's config.json as frozen dataclasses; unknown, missing or mistyped keys are named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastvlm_mlx.errors import BundleError, ConfigError
from fastvlm_mlx.vision_config import DOWNSAMPLING as DOWNSAMPLING
from fastvlm_mlx.vision_config import VisionConfig as VisionConfig
from fastvlm_mlx.vision_config import check_side as check_side

FORMAT_VERSION = 1
PUBLISHED_SIDE = 1024  # pixels, of images

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ProjectorConfig:
    """What turns the encoder's channels into the decoder's: linear layers, exact GELU between them.

    Attributes:
        input_dim: channels that come in.
        hidden_dim: channels that go out, the decoder's.
        kind: LLaVA's name for it: "linear", "mlpNx_gelu" for N layers, or "identity" for none.
    """

    input_dim: int
    hidden_dim: int
    kind: str = "mlp2x_gelu"

    @property
    def depth(self) -> int:
        """How many linear layers it has.

        Raises:
            ConfigError: an unknown kind.

        Source: apple/ml-fastvlm 592b4ad, llava/model/multimodal_projector/builder.py.
        """
        for pattern, layers in _PROJECTORS.items():
            if match := re.fullmatch(pattern, self.kind):
                return layers(match)
        raise ConfigError(f"projector.kind is {self.kind!r}; this version knows {PROJECTOR_KINDS}")

    def __post_init__(self) -> None:
        """Raise ConfigError for an unknown kind, and where there is no layer to make one width the other."""
        if self.depth == 0 and self.input_dim != self.hidden_dim:
            raise ConfigError(
                f"an identity projector passes {self.input_dim} channels on, and the decoder takes {self.hidden_dim}; "
                "the two must be equal"
            )


PROJECTOR_KINDS = "linear, mlpNx_gelu (N from 1 on), identity"
_PROJECTORS: dict[str, Callable[[re.Match[str]], int]] = {  # how many linear layers each has
    "linear": lambda _: 1,
    r"mlp([1-9]\d{0,2})x_gelu": lambda match: int(match[1]),
    "identity": lambda _: 0,
}


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The language model's shape, in the terms of its own config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_position_embeddings: int = 32768
    model_type: str = "qwen2"  # of fastvlm_mlx.decoder.FAMILIES
    rope_factor: float = 1.0  # positions are divided by it before they are rotated ("linear" scaling)
    qkv_bias: bool = True  # Qwen2's; the other two are some LLaMAs'
    output_bias: bool = False  # attention's output projection
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError for a shape that attention can't have."""
        sizes = {f.name: getattr(self, f.name) for f in fields(self) if f.type == "int"}
        if small := [f"{name} {size}" for name, size in sizes.items() if size < 1]:
            raise ConfigError(f"decoder sizes must be at least 1, got {', '.join(small)}")
        if not self.rope_factor > 0:
            raise ConfigError(f"decoder.rope_factor must be above 0, got {self.rope_factor}")
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"decoder heads don't divide: hidden_size {self.hidden_size}, "
                f"{self.num_attention_heads} heads, "
                f"{self.num_key_value_heads} key/value heads"
            )


@dataclass(frozen=True, slots=True)
class QuantizationConfig:
    """Width of the quantised matrices (affine, along the input axis)."""

    bits: int
    group_size: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Everything the run time needs to know about a model, besides its weights and tokenizer.

    `vision` is None where the source has no PyTorch or MLX vision weights (Apple's MLX exports hold them
    only as a Core ML package).
    """

    name: str
    decoder: DecoderConfig
    projector: ProjectorConfig
    vision: VisionConfig | None
    context_length: int  # positions, image tokens included
    eos_token_ids: tuple[int, ...]
    aspect: str = "pad"
    image_newline: bool = False  # the weights hold AnyRes' learnt line break
    grid_pinpoints: tuple[tuple[int, int], ...] = ()  # AnyRes: (width, height) in pixels
    patch_merge_type: str = "flat"
    quantization: QuantizationConfig | None = None
    template: str = "chatml"  # of fastvlm_mlx.template
    prefix_after_special: bool = True  # see fastvlm_mlx.tokenizer.Tokenizer
    format_version: int = FORMAT_VERSION

    @property
    def image_size(self) -> int:
        """Side in pixels that the weights were trained at; the published models' where the config doesn't say."""
        return self.vision.image_size if self.vision else PUBLISHED_SIDE

    @property
    def downsampling(self) -> int:
        """Image pixels per token side; the published models' where the config doesn't say."""
        return self.vision.downsampling if self.vision else DOWNSAMPLING

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> ModelConfig:
        """Read and check a bundle's config.json.

        Raises:
            BundleError: not there, no JSON, or written by a newer version of this library.
            ConfigError: unknown, missing or mistyped keys; all are named.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as exc:
            raise BundleError(f"no bundle at {path.parent}: it has no config.json") from exc
        except (OSError, ValueError) as exc:
            raise BundleError(f"can't read {path}: {exc}") from exc
        version = data.get("format_version") if isinstance(data, dict) else None
        if not isinstance(version, int):
            raise BundleError(
                f"{path.parent} is not a fastvlm-mlx bundle (its config.json has no format_version); "
                f"convert it first: fastvlm-convert {path.parent}"
            )
        if version < 1:
            raise BundleError(f"{path} has bundle format {version}, which never was; convert the model again")
        if version > FORMAT_VERSION:
            raise BundleError(
                f"{path.parent} has bundle format {version}, this version reads up to {FORMAT_VERSION}; "
                "upgrade with: pip install -U fastvlm-mlx"
            )
        return from_dict(cls, data, str(path))


def from_dict(cls: type[_T], data: object, where: str) -> _T:
    """Build a config dataclass from JSON data, strictly.

    Raises:
        ConfigError: unknown or missing keys, or a value of another type; says which and where.
    """
    if not isinstance(data, dict):
        raise ConfigError(f"{where}: expected an object, found {type(data).__name__}")
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(data) - set(known))
    missing = [n for n, f in known.items() if n not in data and f.default is MISSING and f.default_factory is MISSING]
    if unknown or missing:
        parts = [
            f"{label} {', '.join(names)}" for label, names in (("unknown", unknown), ("missing", missing)) if names
        ]
        raise ConfigError(f"{where}: keys {'; '.join(parts)}")
    hints = get_type_hints(cls)
    return cls(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in data.items()})


def _value(hint: Any, value: object, where: str) -> object:
    """Check one JSON value against a type hint; lists become tuples, objects become dataclasses."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        if value is None:
            return None
        return _value(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple and isinstance(value, list):
        inner = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(inner) == len(value):
            return tuple(_value(h, v, where) for h, v in zip(inner, value, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {str(k): _value(args[1], v, f"{where}[{k}]") for k, v in value.items()}
    elif hint is object or (origin is Literal and value in args):
        return value
    elif is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, where)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}: expected {getattr(hint, '__name__', hint)}, found {value!r}")
