"""Which models are measured, whether they fit, and what they are."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from fastvlm_bench import subjects
from fastvlm_bench.layers import count_parameters
from fastvlm_bench.loads import cold_load, warm_loads
from fastvlm_bench.memory import weights_bytes
from fastvlm_bench.photo import sample_photo
from fastvlm_bench.runner import Plan, Questions
from fastvlm_bench.seeded_model import build, model_config
from fastvlm_bench.sizes import SIZES, published_size
from fastvlm_bench.subjects import Choice, Subject, check_resolutions, choices, load_subject, open_choices
from fastvlm_mlx.errors import FastVLMError, InputError

ON_CPU = mx.default_device() == mx.Device(mx.cpu)
PLAIN_BYTES = 4 if ON_CPU else 2


def kept(module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(module.parameters()))


def test_every_combination_in_order():
    found = choices("m", (), (None, 4), ("mlx", "coreml"), ("ALL", "CPU_ONLY"))
    assert [(c.bits, c.vision, c.compute_units) for c in found] == [
        (None, "mlx", "CPU_AND_NE"),  # once: MLX doesn't care
        (None, "coreml", "ALL"),
        (None, "coreml", "CPU_ONLY"),
        (4, "mlx", "CPU_AND_NE"),
        (4, "coreml", "ALL"),
        (4, "coreml", "CPU_ONLY"),
    ]
    assert {c.model for c in found} == {"m"}
    assert [c.size for c in choices(None, ("0.5b", "7b"), (None,), ("auto",), ("ALL",))] == ["0.5b", "7b"]


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ({"size": "3b"}, r"--size must be of 0.5b, 1.5b, 7b, vicuna-7b, tiny, .*\+mci0, \+mci1, .*, got '3b'"),
        ({"bits": 7}, "--q-bits must be of 2, 3, 4, 5, 6, 8 or none, got 7"),
        ({"vision": "abacus"}, "--vision must be of auto, mlx, coreml"),
        ({"compute_units": "GPU"}, "--compute-units must be of CPU_AND_NE"),
        ({"size": "0.5b", "vision": "coreml"}, "no Core ML package; convert a checkpoint"),
    ],
)
def test_what_cannot_be(wrong, part):
    with pytest.raises(InputError, match=part):
        Choice(**wrong)


@pytest.mark.parametrize(
    ("size", "decoder"),
    [("0.5b", 494_032_768), ("1.5b", 1_543_714_304), ("7b", 7_615_616_512)],  # as Qwen2's model cards
)
def test_seeded_shapes_are_the_published_ones(size, decoder):
    counts = count_parameters(model_config(size))
    assert counts["decoder"] == decoder
    head = 3072 * 768  # of CLIP, published and unused
    assert (counts["vision"] + head) / 1e6 == pytest.approx(125.1, abs=0.1)


@pytest.mark.parametrize("bits", [None, 4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_the_counted_bytes_are_those_in_memory(model, bits, tied):
    config = model("tiny" if tied else "tiny-untied").config
    made = build(config, bits)
    vision = made.engine.vision
    total = kept(vision.encoder.network) + kept(vision.projector) + kept(made.decoder.network)
    counted = weights_bytes(config, Choice(bits=bits))
    assert abs(counted - total) / total < 0.02


def test_a_seeded_model_answers(capsys):
    subject, model = load_subject(Choice(size="tiny"), model_config("tiny"), measures_load=True)
    assert (subject.name, subject.size, subject.seeded, subject.vision) == ("seeded tiny", None, True, "mlx")
    assert subject.load.cold_ms is None
    assert subject.load.warm_ms == ()
    logits = model.decoder.network(mx.array([[1, 2, 3]]))
    assert bool(mx.isfinite(logits).all())
    assert model.generate(None, [1, 2, 3], max_tokens=2, ignore_eos=True).generation_tokens == 2
    again = build(model_config("tiny"))
    assert bool((again.decoder.network(mx.array([[1, 2, 3]])) == logits).all()), "the same each time"


def test_a_bundle_is_loaded_and_timed(bundle):
    choice = Choice(str(bundle("tiny")), bits=4, vision="mlx")
    (source,) = open_choices([choice], SMALL, 0)
    subject, model = load_subject(choice, source, measures_load=True)
    assert subject.load.cold_ms > max(subject.load.warm_ms) > 0  # imports alone take longer
    assert len(subject.load.warm_ms) == 2
    assert (subject.name, subject.bits, subject.seeded, subject.vision) == ("tiny", 4, False, "mlx")
    assert "4" in subject.precision
    assert subject.device == model.device
    assert subject.identity == model.identity
    assert (subject.image_size, subject.grid_pinpoints, subject.patch_merge_type) == (256, (), "flat")
    assert subject.weights_bytes == weights_bytes(model.config, choice) > 0
    assert (subject.size, subject.compute_units) == (None, None)
    untimed, _ = load_subject(choice, source, measures_load=False)
    assert untimed.load == subjects.LoadTimes()


def test_labels_tell_models_apart():
    def label(**parts) -> str:
        usual = {"name": "m", "size": None, "seeded": False, "bits": None, "precision": "", "vision": "mlx"}
        usual["compute_units"] = None
        more = {"device": "", "weights_bytes": 0, "load": subjects.LoadTimes(), "identity": "", "image_size": 256}
        more |= {"grid_pinpoints": (), "patch_merge_type": "flat"}
        return Subject(**usual | more | parts).label

    assert label() == "m, vision mlx"
    assert label(bits=4, vision="coreml", compute_units="CPU_AND_NE") == "m, 4 bits, vision coreml"
    assert label(vision="coreml", compute_units="ALL") == "m, vision coreml ALL"


SMALL = Plan((64,), runs=1, warmup=0, max_tokens=2)


def test_memory_is_checked_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(subjects, "build", lambda *_: pytest.fail("was made"))
    with pytest.raises(InputError, match=r"seeded 7b needs about \d+\.\d GiB of memory and 8\.0 GiB can be used"):
        open_choices([Choice(size="7b")], Plan((256,)), 8 << 30)
    assert len(open_choices([Choice(size="7b")], Plan((256,)), 0)) == 1, "unknown memory is no reason to refuse"


def needed(plan: Plan, *wanted: Choice) -> int:
    """The least memory that isn't refused, within 1 %."""
    low, high = 0, 1 << 40
    while high - low > high // 100:
        middle = (low + high) // 2
        try:
            open_choices(wanted, plan, middle)
            high = middle
        except InputError:
            low = middle
    return high


def test_what_a_question_needs_is_less_than_what_is_asked_for():
    choice = Choice(size="tiny")
    asked = needed(Plan((512,), max_tokens=2), choice)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = build(model_config("tiny"))
    Questions(model, sample_photo(), Plan((512,), max_tokens=2)).first(512)
    used = mx.get_peak_memory() - before
    assert used <= asked <= 3 * used


def test_memory_counts_every_model_and_the_largest_image():
    one, two = Choice(size="tiny"), Choice(size="tiny", bits=4)
    weights = weights_bytes(model_config("tiny"), two)
    assert needed(SMALL, one, two) - needed(SMALL, one) >= weights
    assert needed(Plan((64, 1024)), one) > needed(Plan((64,)), one) + 1024 * 1024 * 16 * PLAIN_BYTES
    assert needed(SMALL, two) > weights + 2 * 1024 * 256 * PLAIN_BYTES  # the largest matrix, while it is quantised


def test_quantising_takes_no_more_than_a_matrix_at_a_time():
    config = model_config("tiny")
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    made = build(config, 4)
    after = mx.get_active_memory() - before
    largest = config.decoder.vocab_size * config.decoder.hidden_size * PLAIN_BYTES
    assert made.config == config
    assert mx.get_peak_memory() - before <= after + 3 * largest


@pytest.mark.parametrize("plan", [Plan((64,), prompt_tokens=10**9), Plan((64,), max_tokens=8192), Plan((4096, 8192))])
def test_a_question_longer_than_the_context_is_refused_at_once(plan):
    with pytest.raises(InputError, match=r"positions; seeded tiny's context is 8192; choose fewer"):
        open_choices([Choice(size="tiny")], plan, 0)


def test_published_sizes_are_told_by_the_decoders_shape(model):
    assert published_size(model_config("0.5b")) == "0.5b"
    padded = dataclasses.replace(model_config("7b").decoder, vocab_size=152000)
    assert published_size(dataclasses.replace(model_config("7b"), decoder=padded)) == "7b"
    assert published_size(model_config("tiny")) is None
    assert published_size(model("tiny").config) is None


def test_a_package_without_the_side_is_not_measured():
    encoder = SimpleNamespace(sizes=[(64, 64), (256, 256), (64, 128)])
    model = SimpleNamespace(engine=SimpleNamespace(vision=SimpleNamespace(encoder=encoder)))
    check_resolutions("m", model, [64, 256])
    with pytest.raises(InputError, match="m: the Core ML package takes images of 64, 256, 64x128 px, not 128, 512;"):
        check_resolutions("m", model, [64, 128, 512])
    check_resolutions("m", SimpleNamespace(engine=SimpleNamespace(vision=SimpleNamespace(encoder=object()))), [320])


def test_what_load_is_given(bundle, monkeypatch):
    given = []
    monkeypatch.setattr(
        subjects, "warm_loads", lambda arguments, repeats: given.append((arguments, repeats)) or ((), None)
    )
    monkeypatch.setattr(subjects, "cold_load", lambda arguments: given.append((arguments, 0)) or 1.0)
    monkeypatch.setattr(subjects, "_describe", lambda choice, model, load: load)
    choice = Choice(str(bundle("tiny")), bits=8, vision="auto", compute_units="ALL")
    (source,) = open_choices([choice], SMALL, 0)
    expected = {"model": str(source.path), "vision": "auto", "quantize": 8, "compute_units": "ALL", "warm": False}
    load_subject(choice, source, measures_load=False)
    load_subject(choice, source, measures_load=True)
    assert given == [(expected, 1), (expected, 3), (expected, 0)]


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(FastVLMError, match=r"^[^:]*nowhere"):
        cold_load({"model": str(tmp_path / "nowhere")})


def test_the_first_of_the_warm_loads_is_not_one(bundle):
    times, model = warm_loads({"model": str(bundle("tiny")), "vision": "mlx"}, repeats=1)
    assert times == ()
    assert model.config.name == "tiny"


def test_all_sizes_can_be_named():
    assert list(SIZES) == ["0.5b", "1.5b", "7b", "vicuna-7b", "tiny"]
