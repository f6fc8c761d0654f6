"""`load(ttft_budget=...)`: the largest resolution in time, by a clock that a test sets."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from fastvlm_mlx import budget, load
from fastvlm_mlx import image as image_module
from fastvlm_mlx.budget import apply_budget, largest_within, slow_end
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.measurement_cache import machine_facts, save_measurements, saved_slowest
from fastvlm_mlx.vision.coreml import FallbackEncoder
from support.reports import MACHINE, point, report, subject

SIDES = [64, 128, 192, 256]


class Asked:
    """Answers in so many milliseconds, by side; a list is used up call by call. Remembers the sides."""

    def __init__(self, ms):
        self.ms, self.sides = ms, []

    def __call__(self, side):
        self.sides.append(side)
        ms = self.ms[side]
        return ms.pop(0) if isinstance(ms, list) else ms


@pytest.mark.parametrize(
    ("limit", "side", "asked"),
    [(10, 64, [128, 64]), (29.9, 128, [128, 192]), (30, 192, [128, 192, 256]), (1000, 256, [128, 192, 256])],
)
def test_by_halves(limit, side, asked):
    measure = Asked({64: 10, 128: 20, 192: 30, 256: 40})
    assert largest_within(limit, SIDES, {}, measure) == side
    assert measure.sides == asked


@pytest.mark.parametrize("most", [64, 448, 512, 960, 1024])
def test_few_of_many_sides_are_measured(most):
    measure = Asked({side: side for side in range(64, 1025, 64)})
    assert largest_within(most + 63, range(64, 1025, 64), {}, measure) == most
    assert len(measure.sides) <= 5, "16 sides by halves"


def test_the_first_is_not_timed_and_the_slower_one_counts():
    ask = Asked({64: [99, 15, 20], 128: [1, 21, 1]})
    assert [slow_end(ask, 64), slow_end(ask, 128)] == [20, 21]
    assert ask.sides == [64] * 3 + [128] * 3


def test_nothing_is_fast_enough():
    with pytest.raises(InputError, match=r"ttft_budget=0.005: the least .* 0\.012 s, at 64 px; raise the budget"):
        largest_within(5, SIDES, {}, Asked({64: 12, 128: 13}))


def test_what_is_known_is_not_asked():
    measure = Asked({})
    assert largest_within(25, SIDES, {64: 10, 128: 20, 192: 30, 256: 40}, measure) == 128
    # 64 px would be faster still; 192 px is known to be too slow, and 256 px lies beyond.
    assert largest_within(25, SIDES, {128: 20, 192: 30}, measure) == 128
    assert measure.sides == []


def test_beyond_what_is_known_is_asked():
    measure = Asked({192: 24, 256: 26})
    assert largest_within(25, SIDES, {64: 10, 128: 20}, measure) == 192
    assert measure.sides == [192, 256]


def test_below_what_is_known_is_asked():
    measure = Asked({64: 9, 128: 12})
    assert largest_within(10, SIDES, {192: 30}, measure) == 64
    assert measure.sides == [64, 128]
    with pytest.raises(InputError, match=r"0\.03 s, at 192 px"):
        largest_within(10, SIDES, {192: 30}, Asked({64: 31}))


@pytest.mark.parametrize("seconds", [0, -0.2, float("nan"), float("inf"), "200ms", True, np.float32("nan"), np.True_])
def test_no_budget(seconds):
    with pytest.raises(InputError, match=r"ttft_budget must be seconds above 0, such as 0\.2, got"):
        load("no-such-model", ttft_budget=seconds)


def test_not_together_with_a_resolution():
    with pytest.raises(InputError, match=r"ttft_budget chooses the resolution, and resolution=256 was given"):
        load("no-such-model", ttft_budget=0.2, resolution=256)


@pytest.fixture
def clock(monkeypatch):
    """Sets what each side takes; says what was asked."""

    def set_to(ms):
        ask = Asked(ms)
        monkeypatch.setattr(budget, "_asker", lambda model: ask)
        return ask

    return set_to


@pytest.fixture(autouse=True)
def _nothing_saved(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))


def save(model_identity, points):
    facts = machine_facts()
    machine = MACHINE | {name: facts[name] for name in ("device", "cores", "mlx")}
    assert save_measurements(report([subject(None, identity=model_identity)], points, machine=machine))


def test_load_chooses(bundle, clock):
    ask = clock({64: 1, 128: 50, 192: 200.1, 256: 500})
    model = load(bundle("tiny"), ttft_budget=0.2)
    assert model.resolution == 128
    assert set(ask.sides) == {128, 192}
    assert model.encode_image(np.zeros((8, 8, 3), np.uint8)).size == (128, 128), "images are looked at in that size"


@pytest.mark.parametrize("seconds", [np.float32(0.2), np.float64(0.2), np.int64(1), 1])
def test_a_number_of_numpy(bundle, clock, seconds):
    clock({64: 1, 128: 50, 192: 1001, 256: 2000})
    assert load(bundle("tiny"), ttft_budget=seconds).resolution == 128


def test_the_next_load_asks_nothing(bundle, clock):
    ask = clock({64: 1, 128: 50, 192: [9, 199, 200.1], 256: 500})
    load(bundle("tiny"), ttft_budget=0.2)
    assert ask.sides == [128] * 3 + [192] * 3
    assert load(bundle("tiny"), ttft_budget=0.2).resolution == 128
    assert len(ask.sides) == 6
    assert load(bundle("tiny"), ttft_budget=0.201).resolution == 192, "the slower end is kept, whatever the budget was"
    assert ask.sides[6:] == [256] * 3, "which nothing was known of"
    assert saved_slowest(load(bundle("tiny")).identity) == {128: 50, 192: 200.1, 256: 500}


def test_what_was_measured_is_kept_though_nothing_is_in_time(bundle, clock):
    ask = clock({64: 1000, 128: 2000})
    for _ in range(2):
        with pytest.raises(InputError, match="1 s, at 64 px"):
            load(bundle("tiny"), ttft_budget=0.2)
    assert ask.sides == [128] * 3 + [64] * 3


def test_another_model_is_asked_for_itself(bundle, clock):
    ask = clock(dict.fromkeys(SIDES, 1))
    load(bundle("tiny"), ttft_budget=0.2)
    load(bundle("tiny-untied"), ttft_budget=0.2)
    assert ask.sides == [side for _ in range(2) for side in (128, 192, 256) for _ in range(3)]


def test_what_fastvlm_bench_measured_counts_before_an_earlier_load(bundle, clock):
    clock({128: 9, 192: 9, 256: 9})
    plain = load(bundle("tiny"), ttft_budget=0.01)
    assert plain.resolution == 256
    save(plain.identity, [point(0, 64, 2, 2), point(0, 256, 10, 10)])
    # 256 px takes 20 ms by ten runs; 192 px, which the load has asked, lies only between them.
    assert load(bundle("tiny"), ttft_budget=0.01).resolution == 192


def test_it_says_what_it_does(bundle, clock, caplog):
    clock({64: 1, 128: 50, 192: 200.1, 256: 500})
    with caplog.at_level("INFO", logger="fastvlm_mlx"):
        load(bundle("tiny"), ttft_budget=0.2)
    assert [record.getMessage() for record in caplog.records] == [
        "ttft_budget: asking 3 questions at 128 px",
        "ttft_budget: 128 px takes up to 0.05 s",
        "ttft_budget: asking 3 questions at 192 px",
        "ttft_budget: 192 px takes up to 0.2 s",
        "ttft_budget: 128 px is the largest within 0.2 s",
    ]


def test_load_up_to_the_trained_side(bundle, clock):
    ask = clock(dict.fromkeys(range(64, 1025, 64), 1))
    assert load(bundle("tiny"), ttft_budget=0.2).resolution == 256
    assert max(ask.sides) == 256


def test_load_uses_what_was_measured(bundle, clock):
    plain = load(bundle("tiny"))
    # 1 and 9 image tokens; of those between, 128 px has 4: 10 + (60 - 10) * 3 / 8 = 28.75, and 2 to the high end.
    save(plain.identity, [point(0, 64, 5, 5, width=2), point(0, 192, 30, 30, width=2)])
    ask = clock({})
    assert load(bundle("tiny"), ttft_budget=0.0307).resolution == 64
    assert load(bundle("tiny"), ttft_budget=0.0308).resolution == 128
    assert load(bundle("tiny"), ttft_budget=0.0619).resolution == 128, "the median would be in time"
    assert ask.sides == []


def test_what_was_measured_of_another_model_says_nothing(bundle, clock):
    plain = load(bundle("tiny"))
    save(plain.identity + " quantised", [point(0, 64, 5, 5), point(0, 256, 6, 6)])
    ask = clock(dict.fromkeys(SIDES, 1))
    assert load(bundle("tiny"), ttft_budget=0.2).resolution == 256
    assert ask.sides


def test_questions_of_another_length_say_what_they_can(bundle, clock):
    # Prefill of 25 positions is not known from questions of 100 text tokens.
    save(load(bundle("tiny")).identity, [point(0, 64, 5, 5, text_tokens=100), point(0, 256, 6, 6, text_tokens=100)])
    ask = clock(dict.fromkeys(SIDES, 1))
    load(bundle("tiny"), ttft_budget=0.2)
    assert ask.sides


def test_the_real_questions_find_nothing_known_and_leave_nothing(tiny, monkeypatch):
    asked, opened = [], []
    decode = image_module._decode
    monkeypatch.setattr(image_module, "_decode", lambda *source: opened.append(source) or decode(*source))
    generate = type(tiny).generate

    def watched(model, image, prompt, **options):
        vision = model.engine.vision
        assert (model.engine.prefixes.nbytes, vision.cache.nbytes, vision._sources) == (0, 0, {})
        before = len(opened)
        result = generate(model, image, prompt, **options)
        assert len(opened) == before + 1, "decoding the photo is part of each question's time"
        asked.append((options["resolution"], result))
        return result

    monkeypatch.setattr(type(tiny), "generate", watched)
    try:
        apply_budget(tiny, 1000.0)
        assert tiny.resolution == 256
    finally:
        tiny.resolution = 256
    assert [side for side, _ in asked] == [side for side in (128, 192, 256) for _ in range(3)]
    for side, result in asked:
        assert result.cached_tokens == 0
        assert result.generation_tokens == 1
        assert (result.image_tokens, result.prompt_tokens) == ((side // 64) ** 2, (side // 64) ** 2 + 24)
        assert min(result.timings.vision, result.timings.prefill, result.timings.preprocess) > 0
    engine = tiny.engine
    assert (engine.prefixes.nbytes, engine.vision.cache.nbytes, engine.vision._sources) == (0, 0, {})


def test_a_failure_leaves_nothing_either(tiny, monkeypatch):
    monkeypatch.setattr(budget, "_TIMED", 1)
    with pytest.raises(InputError, match="no resolution is within"):
        apply_budget(tiny, 1e-9)
    assert tiny.resolution == 256
    assert (tiny.engine.prefixes.nbytes, tiny.engine.vision.cache.nbytes) == (0, 0)


def package(sizes):
    """A stand-in for a model whose encoder is a Core ML package of these sizes, with MLX where that fails."""
    encoder = FallbackEncoder(SimpleNamespace(sizes=sizes), lambda: None)
    engine = SimpleNamespace(vision=SimpleNamespace(encoder=encoder))
    rest = {
        "config": SimpleNamespace(aspect="pad", downsampling=64),
        "identity": "package",
        "clear_cache": lambda: None,
    }
    return SimpleNamespace(engine=engine, resolution=1024, **rest)


def test_a_package_has_its_own_sizes(clock):
    model = package([(256, 256), (576, 1024), (768, 768), (1024, 1024), (1536, 1536)])
    ask = clock({256: 1, 768: 2, 1024: 9})
    apply_budget(model, 0.005)
    assert model.resolution == 768
    assert sorted(set(ask.sides)) == [768, 1024]
    model.resolution = 1024
    apply_budget(model, 1.0)
    assert model.resolution == 1024, "it was trained at that side"


def test_a_package_without_a_square_size(clock):
    clock({})
    with pytest.raises(InputError, match="images of 576 x 1024 px, none of them square"):
        apply_budget(package([(576, 1024)]), 0.2)


def test_no_vision_weights(clock):
    clock({})
    model = package([])
    model.engine.vision.encoder = None
    with pytest.raises(InputError, match="no vision weights"):
        apply_budget(model, 0.2)
