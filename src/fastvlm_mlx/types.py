"""What goes in and what comes out: image inputs, options, results and their timings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict, get_args

from fastvlm_mlx.errors import InputError

if TYPE_CHECKING:
    import mlx.core as mx
    import numpy as np
    from PIL import Image


@dataclass(frozen=True, slots=True)
class Frame:
    """A picture of a video; it can stand wherever an image can.

    Attributes:
        image: RGB, upright.
        time: seconds since the video's first frame, None where they aren't known.
    """

    image: Image.Image
    time: float | None = None


if TYPE_CHECKING:
    ImageInput: TypeAlias = str | PathLike[str] | bytes | IO[bytes] | Image.Image | np.ndarray | Frame
    ImageInputs: TypeAlias = ImageInput | Sequence[ImageInput] | None
    FrameSource: TypeAlias = str | PathLike[str] | bytes | IO[bytes] | Iterable[ImageInput]

Aspect: TypeAlias = Literal["pad", "crop", "stretch", "native", "anyres"]
FinishReason: TypeAlias = Literal["stop", "length"]
Prompt: TypeAlias = str | Sequence[int]
Sampling: TypeAlias = Literal["uniform", "scene"]

ASPECTS: tuple[str, ...] = get_args(Aspect)
FRAMES = 8  # of a video that are shown
IMAGE_SUFFIXES = frozenset([".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jfif", ".png", ".tif", ".tiff", ".webp"])
SAMPLINGS: tuple[str, ...] = get_args(Sampling)
BATCH_SIZE = 8  # answers that are decoded together
PREFILL_STEP = 2048  # positions per pass: attention scores of longer ones take much memory
KV_BITS = (2, 3, 4, 6, 8)
KV_GROUP_SIZES = (64, 32, 128)  # the first that divides the head's size is the default
IMAGE_TOKEN_ID = -200  # LLaVA's sentinel for "an image stands here" in a list of ids; never in a vocabulary


_OPTION_KINDS: dict[str, type | tuple[type, ...]] = {
    "max_tokens": int,
    "top_k": int,
    "seed": int,
    "kv_bits": int,
    "kv_group_size": int,
    "max_kv_size": int,
    "prefill_step_size": int,
    "num_draft_tokens": int,
    "temperature": (int, float),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
}


class Draft(Protocol):
    """What a draft needs to have; a `FastVLM` has it."""

    config: Any
    engine: Any
    tokenizer: Any


class OptionArgs(TypedDict, total=False):
    """The keyword arguments of `generate`, `stream` and `Chat.ask`; meaning as in GenerationOptions."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float | None
    seed: int | None
    stop: str | Sequence[str]
    ignore_eos: bool
    kv_bits: int | None
    kv_group_size: int | None
    max_kv_size: int | None
    prefill_step_size: int
    progress: Callable[[int, int], object] | None
    draft: Draft | None
    num_draft_tokens: int


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How an answer is decoded; checked once, before any work starts.

    Attributes:
        max_tokens: most tokens to generate, >= 1.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: nucleus mass in (0, 1]; 1 keeps everything.
        top_k: keep the k likeliest tokens; 0 keeps all.
        min_p: drop tokens below this share of the likeliest one's probability, in [0, 1].
        repetition_penalty: > 0; None or 1 is off. Looks at the last 20 text tokens, as mlx-lm does.
        seed: seeds MLX's global generator; None leaves it as it is.
        stop: string or strings that end the answer; they are not part of it.
        ignore_eos: go on past end-of-sequence tokens (for benchmarks).
        kv_bits: 2, 3, 4, 6 or 8: keep keys and values in that many bits while decoding; the prompt is still
            prefilled in full width, so the first token is as without. Such rows of an answer aren't kept for
            later prompts.
        kv_group_size: values that share a scale then: 32, 64 or 128, a divisor of the head's size; None is 64,
            or 32 where the head's size asks for it.
        max_kv_size: most positions that are kept. The prompt always is; of the answer the latest tokens, so
            that an endless one needs no more memory.
        prefill_step_size: most positions per decoder pass, >= 1; longer prompts are prefilled in several.
        progress: called with the positions that are prefilled, and with all, before, between and after passes.
        draft: a smaller model with the same tokenizer that proposes tokens, which this one accepts or replaces: a
            greedy answer stays the same. Not together with a repetition penalty, kv_bits or max_kv_size.
        num_draft_tokens: how many it proposes at a time, >= 1.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    kv_bits: int | None = None
    kv_group_size: int | None = None
    max_kv_size: int | None = None
    prefill_step_size: int = PREFILL_STEP
    progress: Callable[[int, int], object] | None = None
    draft: Draft | None = None
    num_draft_tokens: int = 3

    def __post_init__(self) -> None:
        """Raise InputError for a value out of range."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        for name, kind in _OPTION_KINDS.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
                raise InputError(f"{name} must be {'a whole number' if kind is int else 'a number'}, got {value!r}")
        checks = {
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "temperature": (self.temperature >= 0, "0 (greedy) or more"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "top_k": (self.top_k >= 0, "0 (off) or more"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1]"),
            "repetition_penalty": (self.repetition_penalty is None or self.repetition_penalty > 0, "above 0"),
            "seed": (self.seed is None or 0 <= self.seed < 2**64, "in [0, 2^64)"),
            "kv_bits": (self.kv_bits in (None, *KV_BITS), f"None or one of {', '.join(map(str, KV_BITS))}"),
            "kv_group_size": (self.kv_group_size in (None, *KV_GROUP_SIZES), "None, 32, 64 or 128"),
            "max_kv_size": (self.max_kv_size is None or self.max_kv_size >= 1, "at least 1"),
            "prefill_step_size": (self.prefill_step_size >= 1, "at least 1"),
            "num_draft_tokens": (self.num_draft_tokens >= 1, "at least 1"),
            "stop": (all(isinstance(s, str) and s for s in stop), "made of non-empty strings"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise InputError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        if self.draft is not None and not hasattr(self.draft, "engine"):
            raise InputError(f"draft must be a loaded model, got {self.draft!r}; load it first")
        if self.kv_bits and self.max_kv_size:
            raise InputError("kv_bits and max_kv_size don't go together; choose one")
        if self.draft and (self.kv_bits or self.max_kv_size or self.repetition_penalty not in (None, 1.0)):
            raise InputError("a draft doesn't go together with kv_bits, max_kv_size or a repetition penalty")


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one answer went, in seconds.

    `ttft` runs from the call to the first token being there; the stages before it are measured one by
    one, with the device synchronised in between, so their sum is `ttft` less a few Python lines.
    """

    preprocess: float = 0.0  # decode, orient, resize
    vision: float = 0.0  # the vision encoder
    projector: float = 0.0
    tokenize: float = 0.0  # text to ids to positions
    prefill: float = 0.0  # one decoder pass over the prompt, head on the last row
    first_token: float = 0.0  # sampling it
    ttft: float = 0.0
    decode: float = 0.0  # from the first token to the last
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """One answer. `str(result)` is its text.

    Attributes:
        text: the answer, without stop strings and end-of-sequence tokens.
        token_ids: every generated id, the one that ended the answer included.
        prompt_tokens: positions in the prompt; an image counts with all its tokens.
        image_tokens: how many of them are image positions.
        cached_tokens: how many of them were known from earlier prompts, and not computed again.
        generation_tokens: len(token_ids).
        prompt_tps: prompt positions that were computed, per second of prefill.
        generation_tps: tokens per second after the first one; 0 for a single token.
        peak_memory: most memory MLX held during the call, in bytes.
        finish_reason: "stop" (end-of-sequence or stop string) or "length".
        timings: seconds per stage.
        device: what really ran, such as "vision: MLX (cpu), decoder: MLX (cpu)".
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    generation_tokens: int
    prompt_tps: float
    generation_tps: float
    peak_memory: int
    finish_reason: FinishReason
    timings: Timings
    device: str

    def __str__(self) -> str:
        return self.text

    def to_json(self) -> str:
        """The whole result as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a streamed answer; the last one has `result` and may have an empty text."""

    text: str
    token_id: int | None = None
    result: GenerationResult | None = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """What the decoder sees of one image.

    Attributes:
        features: (N, C), the vision encoder's output, N = tokens, row-major over the image. Of an image in tiles
            (T, N, C), the whole image first, then the tiles row by row.
        embeddings: (N, hidden), after the projector. Of an image in tiles (P, hidden), merged: P positions in the order
            in which they stand in a prompt.
        size: (height, width) in pixels of the preprocessed image, or of the grid that it was cut into.
    """

    features: mx.array
    embeddings: mx.array
    size: tuple[int, int]
