"""What is run, in which order, and what is kept of it."""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastvlm_bench import runner
from fastvlm_bench.photo import PHOTO_SIZE, sample_photo
from fastvlm_bench.runner import FIGURES, Plan, Questions, prompt_ids, run_plan, summarise
from fastvlm_mlx import load
from fastvlm_mlx.errors import InputError, ResolutionError
from fastvlm_mlx.types import GenerationResult, Timings

TIMINGS = Timings(
    preprocess=0.001,
    tokenize=0.002,
    vision=0.004,
    projector=0.008,
    prefill=0.016,
    first_token=0.032,
    ttft=0.064,
    decode=0.128,
    total=0.192,
)


def answer(resolution: int, vision: float = 0.004, ttft: float = 0.064) -> GenerationResult:
    times = {name: getattr(TIMINGS, name) for name in Timings.__dataclass_fields__}
    return GenerationResult(
        text="",
        token_ids=(1, 2, 3),
        prompt_tokens=30,
        image_tokens=(resolution // 64) ** 2,
        cached_tokens=0,
        generation_tokens=3,
        prompt_tps=1.0,
        generation_tps=15.625,
        peak_memory=4096,
        finish_reason="length",
        timings=Timings(**times | {"vision": vision, "ttft": ttft}),
        device="vision: a fake, decoder: a fake",
    )


class FakeModel:
    """Records its calls; each first question's vision takes a second more than the one's before."""

    def __init__(self, name: str = "", log: list[str] | None = None) -> None:
        self.name, self.log, self.firsts, self.others_bytes = name, [] if log is None else log, 0, 0

    def forget(self) -> None:
        self.log.append(f"{self.name}forget")

    def first(self, resolution: int) -> GenerationResult:
        self.log.append(f"{self.name}{resolution}")
        self.firsts += 1
        return answer(resolution, vision=float(self.firsts))

    def second(self, resolution: int) -> GenerationResult:
        self.log.append(f"{self.name}{resolution} again")
        return answer(resolution, ttft=0.016)


def test_models_and_resolutions_take_turns_and_each_round_begins_with_another():
    log, calls = [], []
    plan = Plan((256, 64), runs=2, warmup=1)
    runs = run_plan([FakeModel("a", log), FakeModel("b", log)], plan, lambda: calls.append(len(log)))
    turns = [["a256", "b256", "a64", "b64"], ["b64", "a64", "b256", "a256"], ["b256", "a64", "b64", "a256"]]
    expected = []
    for case in (case for turn in turns for case in turn):
        expected += [f"{case[0]}forget", case, f"{case} again", f"{case[0]}forget"]
    assert log == expected
    assert calls == list(range(4, 52, 4))
    assert [f"{'ab'[run.subject]}{run.resolution}" for run in runs] == [case for turn in turns for case in turn]
    assert [run.round for run in runs] == [0] * 4 + [1] * 4 + [2] * 4
    assert [run.warmup for run in runs] == [True] * 4 + [False] * 8


def test_medians_leave_warmup_out():
    runs = run_plan([FakeModel()], Plan((256, 512), runs=3, warmup=1))
    small, large = summarise(runs)
    assert (small.subject, small.resolution, small.runs) == (0, 256, 3)
    assert (small.image_tokens, small.prompt_tokens, small.generation_tokens) == (16, 30, 3)
    assert (large.resolution, large.image_tokens, large.runs) == (512, 64, 3)
    seconds = small.figures["vision_ms"]  # calls 1 (warm-up), 4, 6, 7: each round in its own order
    assert (seconds.median, seconds.low, seconds.high) == (6000.0, 4000.0, 7000.0)
    assert large.figures["vision_ms"].median == 5000.0
    assert small.figures["second_ttft_ms"].median == 16.0
    assert set(small.figures) == set(FIGURES)


def test_models_are_summarised_one_by_one():
    slow, fast = FakeModel(), FakeModel()
    slow.firsts = 10
    found = summarise(run_plan([slow, fast], Plan((64,), runs=3, warmup=0)))
    assert [(case.subject, case.figures["vision_ms"].median) for case in found] == [(0, 12000.0), (1, 2000.0)]


def test_without_warmup_the_first_call_counts():
    (summary,) = summarise(run_plan([FakeModel()], Plan((64,), runs=1, warmup=0)))
    assert summary.runs == 1
    assert summary.figures["vision_ms"].median == 1000.0


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_a_case_comes_as_often_after_its_one_neighbour_as_after_the_other(count):
    cases = [(0, 64 * i) for i in range(1, count + 1)]
    after = collections.Counter()
    for index in range(2 * count):
        order = runner.turn(cases, index)
        assert sorted(order) == cases
        after.update(itertools.pairwise(order))
    for one, other in after:
        assert after[one, other] == after[other, one]
    assert {runner.turn(cases, index)[0] for index in range(2 * count)} == set(cases)


class Shaped:
    """A model of which only the question is looked at."""

    def __init__(self, aspect):
        self.config = SimpleNamespace(aspect=aspect, decoder=SimpleNamespace(vocab_size=100))
        self.asked = []

    def generate(self, image, ids, **options):
        self.asked.append((options["resolution"], options["aspect"], options["grid"]))


@pytest.mark.parametrize(
    ("own", "plan", "asked"),
    [
        ("pad", {}, (None, None)),
        ("crop", {}, (None, None)),
        ("anyres", {}, ("pad", None)),  # a square, whose work is known
        ("native", {}, ("pad", None)),
        ("anyres", {"aspect": "anyres"}, ("anyres", None)),
        ("pad", {"aspect": "anyres", "grid": "2x1"}, ("anyres", "2x1")),
        ("anyres", {"aspect": "native"}, ("native", None)),
    ],
)
def test_the_shape_of_the_photo(own, plan, asked):
    model = Shaped(own)
    questions = Questions(model, "photo", Plan((64,), **plan))
    questions.first(64)
    questions.second(64)
    assert model.asked == [(64, *asked)] * 2


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"aspect": "squash"}, "--aspect must be one of pad, crop, stretch, native, anyres, got 'squash'"),
        ({"grid": "2x2"}, "--grid is for --aspect anyres"),
        ({"grid": "2x2", "aspect": "native"}, "--grid is for --aspect anyres"),
        ({"grid": "two", "aspect": "anyres"}, "grid must be COLUMNSxROWS"),
    ],
)
def test_bad_shapes(plan, message):
    with pytest.raises(InputError, match=message):
        Plan((64,), **plan)


def test_memory_is_without_the_other_models():
    model = FakeModel()
    model.others_bytes = 96
    (run,) = run_plan([model], Plan((64,), runs=1, warmup=0))
    assert run.peak_bytes == 4000


def test_the_most_memory_of_any_run_counts():
    runs = run_plan([FakeModel()], Plan((64,), runs=2, warmup=0))
    more = [dataclasses.replace(run, peak_bytes=size) for run, size in zip(runs, (9, 5), strict=True)]
    assert summarise(more)[0].peak_bytes == 9


def test_seconds_become_milliseconds(monkeypatch):
    clock = iter((10.0, 10.2))
    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    model = FakeModel()
    model.first = answer
    (run,) = run_plan([model], Plan((64,), runs=1, warmup=0))
    stages = [getattr(run, f"{name}_ms") for name in runner.STAGES]
    assert stages == pytest.approx([1, 2, 4, 8, 16, 32])
    assert run.stages_ms == pytest.approx(63)
    assert (run.ttft_ms, run.second_ttft_ms, run.decode_ms) == pytest.approx((64, 16, 128))
    assert run.wall_ms == pytest.approx(200)
    assert (run.decode_tps, run.peak_bytes) == (15.625, 4096)
    assert (run.prompt_tokens, run.generation_tokens) == (30, 3)


def test_every_stage_of_the_model_is_counted():
    others = {"ttft", "decode", "total"}
    assert set(runner.STAGES) == set(Timings.__dataclass_fields__) - others


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"resolutions": (256, 1000)}, "multiple of 64 pixels, got 1000"),
        ({"resolutions": (0,)}, "multiple of 64 pixels, got 0"),
        ({"resolutions": (256, 512, 256)}, "once, got 256,512,256"),
        ({"runs": 0}, "--runs must be at least 1, got 0"),
        ({"warmup": -1}, "--warmup must be at least 0, got -1"),
        ({"prompt_tokens": 0}, "--prompt-tokens must be at least 1, got 0"),
        ({"max_tokens": 0}, "--max-tokens must be at least 1, got 0"),
    ],
)
def test_a_plan_is_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        Plan(**arguments)


def test_a_bad_resolution_is_a_resolution_error():
    with pytest.raises(ResolutionError):
        Plan((100,))


@pytest.mark.parametrize("tokens", [1, 2, 24, 2000])
def test_prompt_ids(tokens):
    ids = prompt_ids(tokens, 1024)
    assert len(ids) == tokens + 1
    assert ids.index(-200) == tokens // 2
    other = prompt_ids(tokens, 1024, asked=1)
    assert other != ids, "another question"
    assert other[: tokens // 2 + 1] == ids[: tokens // 2 + 1], "about the same picture, after the same text"
    ids.remove(-200)
    assert all(0 <= i < 1024 for i in ids)


def test_the_photo_is_the_same_each_time_and_not_flat():
    data = sample_photo()
    assert sample_photo() == data
    with Image.open(io.BytesIO(data)) as picture:
        assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", PHOTO_SIZE)
        pixels = np.asarray(picture).astype(float)
    # As in a photo: much contrast over the picture, little between neighbours, and some of it left.
    assert pixels.std() > 30
    assert 1 < np.abs(np.diff(pixels, axis=1)).mean() < 20


def test_a_model_asked_as_planned(model):
    plan = Plan((64, 128), runs=1, warmup=0, prompt_tokens=9, max_tokens=3)
    small, large = run_plan([Questions(model("tiny"), sample_photo(), plan)], plan)
    assert (small.image_tokens, small.prompt_tokens, small.generation_tokens) == (1, 10, 3)
    assert (large.image_tokens, large.prompt_tokens, large.generation_tokens) == (4, 13, 3)
    assert small.device == model("tiny").device
    assert small.peak_bytes > 0


def test_the_stages_make_up_the_whole(model):
    plan = Plan((256,), runs=4, warmup=1, max_tokens=8)
    runs = run_plan([Questions(model("tiny"), sample_photo(), plan)], plan)
    assert len(runs) == 5
    for run in runs:
        assert run.stages_ms <= run.ttft_ms + 1e-6
        assert run.ttft_ms + run.decode_ms <= run.wall_ms
    # In the best run: another process may take the CPU between two stages of any one.
    assert max(run.stages_ms / run.ttft_ms for run in runs) >= 0.95
    assert max((run.ttft_ms + run.decode_ms) / run.wall_ms for run in runs) >= 0.95


def test_the_first_question_knows_nothing_and_the_second_knows_the_picture(model):
    tiny = model("tiny")
    asked = Questions(tiny, sample_photo(), Plan((256,), max_tokens=2))
    for _ in range(2):
        asked.forget()
        first, second = asked.first(256), asked.second(256)
        assert (first.cached_tokens, first.generation_tokens) == (0, 2)
        assert first.timings.vision > 0
        assert first.timings.preprocess > 0
        assert (second.cached_tokens, second.generation_tokens) == (12 + 16, 1)  # half of the text, and the picture
        assert second.timings.vision == 0


def test_precision_says_what_lies_in_memory(model, bundle):
    from fastvlm_mlx.bundle import Bundle
    from fastvlm_mlx.loading import assemble

    assert runner.precision(model("tiny")) in ("float32", "bfloat16")
    assert runner.precision(load(bundle("tiny"), dtype="bfloat16")) == "bfloat16"
    opened = Bundle.open(bundle("tiny"))
    unpacked = assemble(opened, quantize=4, dtype="float32", unpack=True)
    assert runner.precision(unpacked, 4) == "4-bit values unpacked to float32"
    packed = assemble(opened, quantize=8, dtype="float32", unpack=False)
    assert runner.precision(packed, 8) == "8 bits, float32 scales"
