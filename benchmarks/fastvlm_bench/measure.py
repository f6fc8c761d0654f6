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
from fastvlm_bench.photo import PHOTO_SIZE, sample_photo
from fastvlm_bench.report import Report, StageLimit
from fastvlm_bench.roofline import Work, limit, stage_work
from fastvlm_bench.runner import SHAPED, Plan, Questions, run_plan, summarise
from fastvlm_bench.subjects import Choice, Subject, check_resolutions, load_subject, open_choices
from fastvlm_mlx.image import preprocess

if TYPE_CHECKING:
    from fastvlm_bench.runner import Summary
    from fastvlm_mlx.bundle import Bundle
    from fastvlm_mlx.config import ModelConfig
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.types import ImageInput


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
    sources = open_choices(wanted, plan, available_bytes())
    subjects, asked = _load(wanted, sources, plan, photo, load)
    models = [questions.model for questions in asked]
    if not plan.resolutions:
        plan = dataclasses.replace(plan, resolutions=(models[0].resolution,))
    for subject, model in zip(subjects, models, strict=True):
        if plan.aspect != "native":  # whose sizes the photo decides
            check_resolutions(subject.label, model, plan.resolutions)
        for side in plan.resolutions:
            model.view(side, plan.aspect, plan.grid)  # a grid that the model lacks is known before minutes of work
    calls = (plan.warmup + plan.runs) * len(plan.resolutions) * len(asked)
    with tqdm(total=calls, unit="question", leave=False, disable=None) as bar:
        runs = run_plan(asked, plan, bar.update)
    kinds = {storage for model in models for storage in storages(model).values()}
    peaks = measure_peaks(dict.fromkeys([*PLAIN, *kinds])) if roofline else None
    limits = {}
    if peaks and plan.aspect not in SHAPED:  # the work of tiles isn't counted
        for case in summarise(runs):
            work = work_of(models[case.subject], case)
            limits[case.subject, case.resolution] = limits_of(work, case, peaks)
    return Report(
        subjects=tuple(subjects),
        image=describe_image(image, plan),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        plan=plan,
        machine=describe_machine(),
        peaks=peaks,
        runs=runs,
        rooflines=limits,
    )


def describe_image(image: str | None, plan: Plan) -> str:
    """What a report says of the picture; only of whole squares it begins as the planner expects."""
    name = image or "synthetic photo, {} x {} px JPEG".format(*PHOTO_SIZE)
    shape = {"anyres": f"{plan.grid} tiles" if plan.grid else "tiles", "native": "the own shape"}.get(plan.aspect or "")
    return f"{shape} of: {name}" if shape else name


def _load(
    wanted: Sequence[Choice], sources: Sequence[Bundle | ModelConfig], plan: Plan, photo: ImageInput, load: bool
) -> tuple[list[Subject], list[Questions]]:
    """Load the models; what two choices come to, such as "auto" and "mlx" without Core ML, is measured once."""
    import mlx.core as mx

    subjects: list[Subject] = []
    asked: list[Questions] = []
    held: list[int] = []
    pairs = list(zip(wanted, sources, strict=True))
    for choice, source in tqdm(pairs, desc="loading", unit="model", leave=False, disable=None):
        before = mx.get_active_memory()
        subject, model = load_subject(choice, source, load)
        if any(subject.label == other.label for other in subjects):
            continue
        subjects.append(subject)
        asked.append(Questions(model, photo, plan))
        held.append(mx.get_active_memory() - before)
    for questions, own in zip(asked, held, strict=True):
        questions.others_bytes = sum(held) - own
    return subjects, asked


def storages(model: FastVLM) -> dict[str, Storage]:
    """How each part that MLX computes is kept; "vision" is left out where Core ML runs it."""
    from fastvlm_mlx.vision.fastvithd import MLXVisionEncoder

    found = {
        "projector": Storage.of(model.engine.vision.projector),
        "decoder": Storage.of(model.decoder.network),
    }
    encoder = model.engine.vision.encoder
    return found | ({"vision": Storage.of(encoder.network)} if isinstance(encoder, MLXVisionEncoder) else {})


def work_of(model: FastVLM, case: Summary) -> dict[str, Work]:
    """What the stages of a case have to do; "decode" is one token of the mean context.

    Where Core ML encodes, "vision" isn't MLX's, and "prefill" isn't whole: the text before the image is prefilled
    meanwhile, in the time of "vision".
    """
    kept = storages(model)
    work = stage_work(
        model.config,
        case.resolution,
        case.prompt_tokens - case.image_tokens,
        vision=kept.get("vision", kept["projector"]),
        decoder=kept["decoder"],
        projector=kept["projector"],
        context=case.prompt_tokens + max(case.generation_tokens - 2, 0) // 2,
    )
    beside = () if "vision" in kept else ("vision", "prefill")
    return {stage: found for stage, found in work.items() if stage not in beside}


def limits_of(work: Mapping[str, Work], case: Summary, peaks: Peaks) -> dict[str, StageLimit]:
    """Each stage's limit, and its share of the median that was measured."""
    measured = {stage: case.figures[f"{stage}_ms"].median for stage in work}
    measured["decode"] /= max(case.generation_tokens - 1, 1)  # of a token after the first
    found = {}
    for stage, done in work.items():
        if measured[stage] > 0:  # a single token has no decode
            least = limit(done, peaks)
            share = least.share(measured[stage] / 1e3)
            found[stage] = StageLimit(done.flops, done.bytes, least.bound, least.seconds * 1e3, share)
    return found
