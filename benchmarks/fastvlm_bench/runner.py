"""Ask the same questions of several models at several resolutions, and keep every time that was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fastvlm_bench.stats import LEAST_RUNS, Spread, spread
from fastvlm_mlx.config import check_side
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.types import ASPECTS, IMAGE_TOKEN_ID

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.types import GenerationResult, ImageInput, OptionArgs

SHAPED = ("native", "anyres")  # aspects under which an image's shape decides how many positions it takes
STAGES = ("preprocess", "tokenize", "vision", "projector", "prefill", "first_token")
FIGURES = (*(f"{name}_ms" for name in STAGES), "ttft_ms", "second_ttft_ms", "decode_ms", "wall_ms", "decode_tps")


Case = tuple[int, int]  # a model's number, and a side in pixels


class Asked(Protocol):
    """A model that is asked about one picture."""

    @property
    def others_bytes(self) -> int:
        """Memory that other models hold meanwhile."""

    def forget(self) -> None:
        """Make the next question a first one: nothing of earlier ones is kept."""

    def first(self, resolution: int) -> GenerationResult:
        """Ask; the answer has all tokens of the plan."""

    def second(self, resolution: int) -> GenerationResult:
        """Ask something else about the same picture; the answer has one token."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run; checked before anything is loaded.

    Attributes:
        resolutions: image sides in pixels, multiples of 64 (FastViT: 32), each once; none stands for the model's own.
        runs: measured calls per resolution.
        warmup: calls per resolution before those, which count in no median.
        prompt_tokens: text tokens around the image.
        max_tokens: tokens to generate; end-of-sequence is ignored, so that every call decodes as many.
        aspect: of `types.ASPECTS`. None is a square: padded where the model itself would do something else, whose
            cost depends on the photo.
        grid: of the tiles for "anyres", such as "2x2"; None for the model's own.
    """

    resolutions: tuple[int, ...] = ()
    runs: int = LEAST_RUNS
    warmup: int = 1
    prompt_tokens: int = 24  # the chat template and a short question
    max_tokens: int = 32
    aspect: str | None = None
    grid: str | None = None

    def __post_init__(self) -> None:
        """Raise ResolutionError or InputError for a value out of range."""
        if self.aspect is not None and self.aspect not in ASPECTS:
            raise InputError(f"--aspect must be one of {', '.join(ASPECTS)}, got {self.aspect!r}")
        if self.grid is not None:
            from fastvlm_mlx.vision.anyres import parse_grid  # imports Pillow, for which --help needn't wait

            parse_grid(self.grid)
            if self.aspect != "anyres":
                raise InputError("--grid is for --aspect anyres; give both or neither")
        for side in self.resolutions:
            check_side(side)
        if len(set(self.resolutions)) != len(self.resolutions):
            listed = ",".join(map(str, self.resolutions))
            raise InputError(f"--resolution must name each resolution once, got {listed}")
        for name, least in (("runs", 1), ("warmup", 0), ("prompt_tokens", 1), ("max_tokens", 1)):
            if getattr(self, name) < least:
                option = name.replace("_", "-")
                raise InputError(f"--{option} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Run:
    """One first question and the second after it: the model's own times, and the first call as seen from outside.

    Attributes:
        subject: the model's number.
        resolution: image side in pixels.
        round: 0, 1, ... over warm-up and measured rounds; a round asks every model at every resolution once.
        warmup: counts in no median.
        image_tokens: positions that the image takes.
        prompt_tokens: all positions of the prompt.
        generation_tokens: tokens that were generated.
        preprocess_ms, tokenize_ms, vision_ms, projector_ms, prefill_ms, first_token_ms: the stages.
        stages_ms: their sum; `ttft_ms` less a few lines of Python, or a stage is not accounted for.
        ttft_ms: from the call to the first token.
        second_ttft_ms: the same of the second question, about the same picture.
        decode_ms: from the first token to the last.
        wall_ms: the whole call, measured by the benchmark.
        decode_tps: tokens per second after the first one; 0 for a single token.
        peak_bytes: most memory that MLX held in the first call, without the weights of other models.
        device: what ran which part.
    """

    subject: int
    resolution: int
    round: int
    warmup: bool
    image_tokens: int
    prompt_tokens: int
    generation_tokens: int
    preprocess_ms: float
    tokenize_ms: float
    vision_ms: float
    projector_ms: float
    prefill_ms: float
    first_token_ms: float
    stages_ms: float
    ttft_ms: float
    second_ttft_ms: float
    decode_ms: float
    wall_ms: float
    decode_tps: float
    peak_bytes: int
    device: str


@dataclass(frozen=True, slots=True)
class Summary:
    """The measured runs of one model at one resolution; `figures` has a Spread for each name of FIGURES."""

    subject: int
    resolution: int
    image_tokens: int
    prompt_tokens: int
    generation_tokens: int
    runs: int
    peak_bytes: int
    figures: dict[str, Spread]


def run_plan(asked: Sequence[Asked], plan: Plan, progress: Callable[[], object] = lambda: None) -> tuple[Run, ...]:
    """Ask as planned, models and resolutions in turn within each round, so that drift hits all alike.

    Args:
        asked: the models; `Questions` makes one of a loaded one.
        plan: with at least one resolution.
        progress: called after each pair of questions.

    Returns:
        All runs in the order in which they ran, warm-up included.
    """
    runs = []
    cases = [(number, resolution) for resolution in plan.resolutions for number in range(len(asked))]
    for index in range(plan.warmup + plan.runs):
        for number, resolution in turn(cases, index):
            runs.append(_measure(asked[number], number, resolution, index, index < plan.warmup))
            progress()
    return tuple(runs)


def turn(cases: Sequence[Case], index: int) -> Sequence[Case]:
    """The order of a round: every second one backwards, each pair beginning with the next case.

    So a case comes as often after its one neighbour as after the other, and none is always the one after the largest.
    """
    begin = index // 2 % len(cases)
    ordered = (*cases[begin:], *cases[:begin])
    return ordered[::-1] if index % 2 else ordered


class Questions:
    """Two fixed questions about an image, asked greedily and past end-of-sequence; implements `Asked`.

    Attributes:
        others_bytes: memory of other models that are loaded, too.
    """

    def __init__(self, model: FastVLM, image: ImageInput, plan: Plan) -> None:
        self.model, self.image, self.max_tokens = model, image, plan.max_tokens
        self.aspect, self.grid = plan.aspect, plan.grid
        vocabulary = model.config.decoder.vocab_size
        self.others_bytes = 0
        self.prompts = [prompt_ids(plan.prompt_tokens, vocabulary, asked=number) for number in range(2)]

    def forget(self) -> None:
        """See `Asked.forget`."""
        self.model.engine.forget()

    def first(self, resolution: int) -> GenerationResult:
        """See `Asked.first`."""
        return self._ask(0, resolution, self.max_tokens)

    def second(self, resolution: int) -> GenerationResult:
        """See `Asked.second`."""
        return self._ask(1, resolution, 1)

    def _ask(self, number: int, resolution: int, tokens: int) -> GenerationResult:
        ids = self.prompts[number]
        aspect = self.aspect or ("pad" if self.model.config.aspect in SHAPED else None)
        options: OptionArgs = {"max_tokens": tokens, "ignore_eos": True}
        return self.model.generate(self.image, ids, resolution=resolution, aspect=aspect, grid=self.grid, **options)


def prompt_ids(text_tokens: int, vocab_size: int, asked: int = 0) -> list[int]:
    """Ids of a prompt: half of the text, the image, the other half, which is another one for each `asked`.

    The values are arbitrary: every id costs the same, and ids need no tokenizer in the bundle.
    """
    ids = [i % vocab_size for i in range(text_tokens)]
    middle = text_tokens // 2
    return [*ids[:middle], IMAGE_TOKEN_ID, *((i + asked) % vocab_size for i in ids[middle:])]


def summarise(runs: Sequence[Run]) -> tuple[Summary, ...]:
    """Median, least and greatest of each figure, by model and resolution, both in ascending order."""
    measured: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        if not run.warmup:
            measured.setdefault((run.subject, run.resolution), []).append(run)
    return tuple(
        Summary(
            *case,
            group[0].image_tokens,
            group[0].prompt_tokens,
            group[0].generation_tokens,
            len(group),
            max(run.peak_bytes for run in group),
            {name: spread([getattr(run, name) for run in group]) for name in FIGURES},
        )
        for case, group in sorted(measured.items())
    )


def precision(model: FastVLM, quantize: int | None = None) -> str:
    """How the decoder's weights lie in memory, such as "bfloat16" or "4 bits, bfloat16 scales".

    Args:
        model: loaded.
        quantize: the bits that it was quantised to after loading, if it was.
    """
    import mlx.core as mx
    from mlx.utils import tree_map

    dtypes: set[mx.Dtype] = set()
    tree_map(lambda array: dtypes.add(array.dtype), model.decoder.network.parameters())
    kept = " and ".join(sorted(str(d).rpartition(".")[2] for d in dtypes if mx.issubdtype(d, mx.floating)))
    stored = model.config.quantization
    bits = quantize or (stored.bits if stored else None)
    if bits is None:
        return kept
    if mx.uint32 in dtypes:
        return f"{bits} bits, {kept} scales"
    return f"{bits}-bit values unpacked to {kept}"  # what `load` does on a CPU


def _measure(asked: Asked, number: int, resolution: int, index: int, warmup: bool) -> Run:
    asked.forget()
    start = time.perf_counter()
    result = asked.first(resolution)
    wall = time.perf_counter() - start
    second = asked.second(resolution)
    asked.forget()  # the next one's memory is its own
    times = result.timings
    stages = {f"{name}_ms": getattr(times, name) * 1e3 for name in STAGES}
    return Run(
        subject=number,
        resolution=resolution,
        round=index,
        warmup=warmup,
        image_tokens=result.image_tokens,
        prompt_tokens=result.prompt_tokens,
        generation_tokens=result.generation_tokens,
        **stages,
        stages_ms=sum(stages.values()),
        ttft_ms=times.ttft * 1e3,
        second_ttft_ms=second.timings.ttft * 1e3,
        decode_ms=times.decode * 1e3,
        wall_ms=wall * 1e3,
        decode_tps=result.generation_tps,
        peak_bytes=result.peak_memory - asked.others_bytes,
        device=result.device,
    )
