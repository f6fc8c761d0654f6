"""`load(ttft_budget=...)`: the largest resolution whose first token comes in time, on this machine."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from numbers import Real
from typing import TYPE_CHECKING

from fastvlm_mlx.errors import InputError
from fastvlm_mlx.latency import QUESTION_TOKENS, Latency
from fastvlm_mlx.measurement_cache import save_slowest, saved_measurements, saved_slowest
from fastvlm_mlx.types import IMAGE_TOKEN_ID

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM

_TIMED = 2  # questions per resolution, after one that isn't timed; the slower one counts
_PHOTO_SIZE = (1280, 960)  # width, height: decoding and shrinking a photo is part of the time
_LOG = logging.getLogger("fastvlm_mlx")
Ask = Callable[[int], float]  # side in pixels -> milliseconds to the first token


def check_budget(seconds: float, resolution: int | None) -> None:
    """Raise InputError for a budget out of range, or one beside a resolution that is chosen already."""
    number = isinstance(seconds, Real) and not isinstance(seconds, bool)  # NumPy's too
    if not (number and math.isfinite(seconds) and seconds > 0):
        raise InputError(f"ttft_budget must be seconds above 0, such as 0.2, got {seconds!r}")
    if resolution is not None:
        raise InputError(
            f"ttft_budget chooses the resolution, and resolution={resolution} was given too; leave one of them out"
        )


def apply_budget(model: FastVLM, seconds: float) -> None:
    """Set a model's resolution to the largest one that is within a budget.

    Sizes that `fastvlm-bench` measured of this very model on this machine, or between those, aren't measured again,
    nor are those that an earlier call measured, which are kept until `fastvlm-bench` measures the same or another
    version is installed. The others are searched by halves, three questions to a size: five sizes at most of a model
    of 1024 px. What counts is the slowest measured time, of a photo of 4:3 in the model's own aspect: of one that cuts
    images into tiles `fastvlm-bench` measures squares, so only earlier calls count. The logger "fastvlm_mlx" says at
    level INFO what is asked.

    Args:
        model: loaded, its resolution the one that it was trained at; it keeps nothing of what it is asked here.
        seconds: the budget.

    Raises:
        InputError: no resolution is within it, or the model has no vision weights.
    """
    sides, ask = _sides(model), _asker(model)

    def measure(side: int) -> float:
        _LOG.info("ttft_budget: asking %d questions at %d px", 1 + _TIMED, side)
        slowest_ms = slow_end(ask, side)
        _LOG.info("ttft_budget: %d px takes up to %.3g s", side, slowest_ms / 1e3)
        # Each at once, under the model's name by now: Core ML may have failed at the question, and MLX answered.
        save_slowest(model.identity, {side: slowest_ms})
        return slowest_ms

    try:
        model.resolution = largest_within(float(seconds) * 1e3, sides, _known(model, sides), measure)
    finally:
        model.clear_cache()
    _LOG.info("ttft_budget: %d px is the largest within %.3g s", model.resolution, seconds)


def slow_end(ask: Ask, side: int) -> float:
    """The slower of two questions, in milliseconds, after one that isn't timed."""
    ask(side)
    return max(ask(side) for _ in range(_TIMED))


def largest_within(budget_ms: float, sides: Sequence[int], known: Mapping[int, float], measure: Ask) -> int:
    """The largest side whose time is within a budget, by halves: a larger side takes longer.

    Args:
        budget_ms: what a first token may take.
        sides: to choose from, in pixels, ascending.
        known: milliseconds of those sides that needn't be measured.
        measure: milliseconds that a side takes at most.

    Raises:
        InputError: none is; says the least time that was found.
    """
    best = max((side for side, ms in known.items() if ms <= budget_ms), default=0)
    too_slow = min((side for side in known if side > best), default=math.inf)
    found = dict(known)
    between = [side for side in sides if best < side < too_slow]
    while between:
        half = (len(between) - 1) // 2  # of two the smaller one, which takes less long
        side = between[half]
        found[side] = measure(side)
        if found[side] <= budget_ms:
            best, between = side, between[half + 1 :]
        else:
            between = between[:half]
    if not best:
        least = min(found, key=lambda side: found[side])
        raise InputError(
            f"no resolution is within ttft_budget={budget_ms / 1e3:g}: the least time to first token was "
            f"{found[least] / 1e3:.3g} s, at {least} px; raise the budget, quantise, or load a smaller model"
        )
    return best


def _sides(model: FastVLM) -> list[int]:
    """What the encoder takes, up to the model's resolution: a package its own sizes, MLX any."""
    encoder = model.engine.vision.encoder
    if encoder is None:
        raise InputError("this bundle has no vision weights, so there is no resolution to choose; omit ttft_budget")
    trained = model.resolution
    sizes: list[tuple[int, int]] | None = getattr(encoder, "sizes", None)
    if sizes is None:
        return list(range(model.config.downsampling, trained + 1, model.config.downsampling))
    sides = [height for height, width in sizes if height == width <= trained]
    if not sides:
        there = ", ".join(f"{height} x {width}" for height, width in sizes)
        raise InputError(
            f"the Core ML package takes images of {there} px, none of them square and at most {trained} px; omit "
            "ttft_budget, or use vision='mlx'"
        )
    return sides


def _known(model: FastVLM, sides: Sequence[int]) -> dict[int, float]:
    """Slowest milliseconds by side, of this model: the same weights in the same types, by the same encoder.

    Ten runs of `fastvlm-bench` count before two of an earlier load, and those before what lies between other sides.
    Of a model that cuts images into tiles only earlier loads count: the benchmark shows it whole ones.
    """
    kept = saved_slowest(model.identity)
    asked = {side: kept[side] for side in sides if side in kept}
    if model.config.aspect == "anyres":
        return asked
    measured = (
        point
        for report in saved_measurements()
        for subject, points in zip(report.subjects, report.points, strict=True)
        if subject.identity == model.identity
        for point in points
    )
    curve = Latency(measured, model.config.downsampling)
    estimates = {side: found for side in sides if (found := curve.estimate(side, QUESTION_TOKENS))}
    known = {side: found.ttft.high for side, found in estimates.items()}
    return known | asked | {side: known[side] for side, found in estimates.items() if found.measured}


def _asker(model: FastVLM) -> Ask:
    """Ask a question that nothing is known of: a short one about a photo."""
    ids = [IMAGE_TOKEN_ID, *(token % model.config.decoder.vocab_size for token in range(QUESTION_TOKENS))]

    def ask(side: int) -> float:
        model.engine.forget()  # a file that is known again isn't decoded first
        answer = model.generate(_photo(), ids, resolution=side, max_tokens=1, ignore_eos=True)
        return answer.timings.ttft * 1e3

    return ask


@cache
def _photo() -> bytes:
    """A JPEG file of soft patches of colour."""
    import numpy as np
    from PIL import Image

    patches = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(patches).resize(_PHOTO_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()
