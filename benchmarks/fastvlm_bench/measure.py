"""Load what is to be measured, measure it, and hold it against what the machine can do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from tqdm import tqdm

from fastvlm_bench.layers import Storage
from fastvlm_bench.machine import available_bytes, describe_machine
from fastvlm_bench.peaks import PLAIN, Peaks, measure_peaks
from fastvlm_bench.report import Report, StageLimit
from fastvlm_bench.roofline import Work, limit, stage_work
from fastvlm_bench.runner import PHOTO_SIZE, Plan, Questions, run_plan, sample_photo, summarise
from fastvlm_bench.subjects import Choice, load_subject, open_choices
from fastvlm_mlx.image import preprocess

if TYPE_CHECKING:
    from fastvlm_bench.runner import Summary
    from fastvlm_mlx.model import FastVLM


def measure(wanted: Sequence[Choice], plan: Plan, image: str | None, *, load: bool, roofline: bool) -> Report:
    """Run a plan; shows its progress on a terminal's stderr.

    Args:
        wanted: the models, all in memory at once.
        plan: without resolutions, at the first model's own.
        image: a file, or None for a synthetic photo.
        load: also how long loading takes.
        roofline: also what the machine can do; a few seconds.

    Raises:
        InputError: the models don't fit into memory. Others as `fastvlm_mlx.load` and `FastVLM.generate`.
    """
    photo = sample_photo() if image is None else image
    preprocess(photo, 64)  # a file that can't be read is known before minutes of work
    sources = open_choices(wanted, available_bytes())
    loaded = [
        load_subject(choice, source, load)
        for choice, source in tqdm(
            list(zip(wanted, sources, strict=True)), desc="loading", unit="model", leave=False, disable=None
        )
    ]
    subjects, models = tuple(subject for subject, _ in loaded), [model for _, model in loaded]
    if not plan.resolutions:
        plan = dataclasses.replace(plan, resolutions=(models[0].resolution,))
    asked = [Questions(model, photo, plan) for model in models]
    calls = (plan.warmup + plan.runs) * len(plan.resolutions) * len(asked)
    with tqdm(total=calls, unit="question", leave=False, disable=None) as bar:
        runs = run_plan(asked, plan, bar.update)
    kinds = {storage for model in models for storage in storages(model).values()}
    peaks = measure_peaks(dict.fromkeys([*PLAIN, *kinds])) if roofline else None
    limits = {}
    if peaks:
        for case in summarise(runs):
            work = work_of(models[case.subject], case, plan.max_tokens)
            limits[case.subject, case.resolution] = limits_of(work, case, plan.max_tokens, peaks)
    return Report(
        subjects=subjects,
        image=image or "synthetic photo, {} x {} px JPEG".format(*PHOTO_SIZE),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        plan=plan,
        machine=describe_machine(),
        peaks=peaks,
        runs=runs,
        rooflines=limits,
    )


def storages(model: FastVLM) -> dict[str, Storage]:
    """How each part that MLX computes is kept; "vision" is left out where Core ML runs it."""
    from fastvlm_mlx.vision.fastvithd import MLXVisionEncoder

    found = {
        "projector": Storage.of(model.engine.vision.projector),
        "decoder": Storage.of(model.decoder.network),
    }
    encoder = model.engine.vision.encoder
    return found | ({"vision": Storage.of(encoder.network)} if isinstance(encoder, MLXVisionEncoder) else {})


def work_of(model: FastVLM, case: Summary, max_tokens: int) -> dict[str, Work]:
    """What the stages of a case have to do; "decode" is one token of the mean context."""
    kept = storages(model)
    work = stage_work(
        model.config,
        case.resolution,
        case.prompt_tokens - case.image_tokens,
        vision=kept.get("vision", kept["projector"]),
        decoder=kept["decoder"],
        projector=kept["projector"],
        context=case.prompt_tokens + max(max_tokens - 2, 0) // 2,
    )
    return {stage: found for stage, found in work.items() if stage != "vision" or "vision" in kept}


def limits_of(work: Mapping[str, Work], case: Summary, max_tokens: int, peaks: Peaks) -> dict[str, StageLimit]:
    """Each stage's limit, and its share of the median that was measured."""
    measured = {stage: case.figures[f"{stage}_ms"].median for stage in work}
    measured["decode"] /= max(max_tokens - 1, 1)  # of a token after the first
    found = {}
    for stage, done in work.items():
        if measured[stage] > 0:  # a single token has no decode
            least = limit(done, peaks)
            share = least.share(measured[stage] / 1e3)
            found[stage] = StageLimit(done.flops, done.bytes, least.bound, least.seconds * 1e3, share)
    return found
