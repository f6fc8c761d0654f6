"""`load(ttft_budget=...)`: the largest resolution whose first token comes in time, on this machine."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from fastvlm_mlx.config import DOWNSAMPLING
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.latency import QUESTION_TOKENS, Latency
from fastvlm_mlx.measurement_cache import saved_measurements
from fastvlm_mlx.types import IMAGE_TOKEN_ID

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM

_TIMED = 2  # questions per resolution, after one that isn't timed; the slower one counts
_PHOTO_SIZE = (1280, 960)  # width, height: decoding and shrinking a photo is part of the time
Ask = Callable[[int], float]  # side in pixels -> milliseconds to the first token


def check_budget(seconds: float, resolution: int | None) -> None:
    """Raise InputError for a budget out of range, or one beside a resolution that is chosen already."""
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not (number and math.isfinite(seconds) and seconds > 0):
        raise InputError(f"ttft_budget must be seconds above 0, such as 0.2, got {seconds!r}")
    if resolution is not None:
        raise InputError(
            f"ttft_budget chooses the resolution, and resolution={resolution} was given too; leave one of them out"
        )


def apply_budget(model: FastVLM, seconds: float) -> None:
    """Set a model's resolution to the largest one that is within a budget.

    Sizes that `fastvlm-bench` measured of this very model on this machine, or between those, aren't measured again;
    others are, from the smallest on, until one takes too long. What counts is the slowest measured time.

    Args:
        model: loaded, its resolution the one that it was trained at; it keeps nothing of what it is asked here.
        seconds: the budget.

    Raises:
        InputError: no resolution is within it, or the model has no vision weights.
    """
    sides = _sides(model)
    curve = _known_latency(model)
    estimates = {side: curve.estimate(side, QUESTION_TOKENS) for side in sides}
    known = {side: found.ttft.high for side, found in estimates.items() if found}
    try:
        model.resolution = largest_within(seconds * 1e3, sides, known, _asker(model))
    finally:
        model.clear_cache()


def largest_within(budget_ms: float, sides: Sequence[int], known: Mapping[int, float], ask: Ask) -> int:
    """The largest side whose time is within a budget.

    Args:
        budget_ms: what a first token may take.
        sides: to choose from, in pixels, ascending.
        known: milliseconds of sides that needn't be measured.
        ask: measures one question.

    Raises:
        InputError: none is; says the least time that was found.
    """
    best = max((side for side, ms in known.items() if ms <= budget_ms), default=0)
    too_slow = min((side for side in known if side > best), default=math.inf)
    found = dict(known)
    for side in sides:
        if not best < side < too_slow:
            continue
        ask(side)
        found[side] = max(ask(side) for _ in range(_TIMED))
        if found[side] > budget_ms:
            break
        best = side
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
        return list(range(DOWNSAMPLING, trained + 1, DOWNSAMPLING))
    sides = [height for height, width in sizes if height == width <= trained]
    if not sides:
        there = ", ".join(f"{height} x {width}" for height, width in sizes)
        raise InputError(
            f"the Core ML package takes images of {there} px, none of them square and at most {trained} px; omit "
            "ttft_budget, or use vision='mlx'"
        )
    return sides


def _known_latency(model: FastVLM) -> Latency:
    """What was measured of this model: the same weights in the same types, by the same encoder."""
    return Latency(
        point
        for report in saved_measurements()
        for subject, points in zip(report.subjects, report.points, strict=True)
        if subject.identity == model.identity
        for point in points
    )


def _asker(model: FastVLM) -> Ask:
    """Ask a question that nothing is known of: a short one about a photo."""
    photo = _photo()
    ids = [IMAGE_TOKEN_ID, *(token % model.config.decoder.vocab_size for token in range(QUESTION_TOKENS))]

    def ask(side: int) -> float:
        model.engine.prefixes.clear()
        model.engine.vision.cache.clear()
        # As an open file: a path or bytes would be known again before they are decoded.
        answer = model.generate(io.BytesIO(photo), ids, resolution=side, max_tokens=1, ignore_eos=True)
        return answer.timings.ttft * 1e3

    return ask


def _photo() -> bytes:
    """A JPEG file of soft patches of colour."""
    import numpy as np
    from PIL import Image

    patches = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(patches).resize(_PHOTO_SIZE, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()
