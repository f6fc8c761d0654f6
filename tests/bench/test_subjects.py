"""Which models are measured, whether they fit, and what they are."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from fastvlm_bench import subjects
from fastvlm_bench.layers import count_parameters
from fastvlm_bench.loads import cold_load, warm_loads
from fastvlm_bench.seeded_model import build, model_config
from fastvlm_bench.sizes import SIZES
from fastvlm_bench.subjects import Choice, Subject, choices, load_subject, open_choices, weights_bytes
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
        ({"size": "3b"}, "--size must be of 0.5b, 1.5b, 7b, tiny, got '3b'"),
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
    assert (subject.name, subject.size, subject.seeded, subject.vision) == ("seeded tiny", "tiny", True, "mlx")
    assert subject.load.cold_ms is None
    assert subject.load.warm_ms == ()
    logits = model.decoder.network(mx.array([[1, 2, 3]]))
    assert bool(mx.isfinite(logits).all())
    assert model.generate(None, [1, 2, 3], max_tokens=2, ignore_eos=True).generation_tokens == 2
    again = build(model_config("tiny"))
    assert bool((again.decoder.network(mx.array([[1, 2, 3]])) == logits).all()), "the same each time"


def test_a_bundle_is_loaded_and_timed(bundle):
    choice = Choice(str(bundle("tiny")), bits=4, vision="mlx")
    (source,) = open_choices([choice], 0)
    subject, model = load_subject(choice, source, measures_load=True)
    assert subject.load.cold_ms > max(subject.load.warm_ms) > 0  # imports alone take longer
    assert len(subject.load.warm_ms) == 2
    assert (subject.name, subject.bits, subject.seeded, subject.vision) == ("tiny", 4, False, "mlx")
    assert "4" in subject.precision
    assert subject.device == model.device
    untimed, _ = load_subject(choice, source, measures_load=False)
    assert untimed.load == subjects.LoadTimes()


def test_labels_tell_models_apart():
    def label(**parts) -> str:
        usual = {"name": "m", "size": None, "seeded": False, "bits": None, "precision": "", "vision": "mlx"}
        more = {"device": "", "weights_bytes": 0, "load": subjects.LoadTimes(), "identity": "", "image_size": 256}
        more |= {"grid_pinpoints": (), "patch_merge_type": "flat"}
        return Subject(**usual | more | parts).label

    assert label() == "m, vision mlx"
    assert label(bits=4, vision="coreml") == "m, 4 bits, vision coreml"


def test_memory_is_checked_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(subjects, "build", lambda *_: pytest.fail("was made"))
    with pytest.raises(InputError, match=r"need about \d+\.\d GiB of memory and 8\.0 GiB are free; choose fewer"):
        open_choices([Choice(size="7b")], 8 << 30)
    one = weights_bytes(model_config("tiny"), Choice(size="tiny"))
    assert len(open_choices([Choice(size="tiny")], int(1.2 * one))) == 1
    with pytest.raises(InputError, match="2 models need about"):
        open_choices([Choice(size="tiny"), Choice(size="tiny", bits=4)], int(1.2 * one))
    assert len(open_choices([Choice(size="7b")], 0)) == 1, "unknown memory is no reason to refuse"


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(FastVLMError, match=r"^[^:]*nowhere"):
        cold_load({"model": str(tmp_path / "nowhere")})


def test_the_first_of_the_warm_loads_is_not_one(bundle):
    times, model = warm_loads({"model": str(bundle("tiny")), "vision": "mlx"}, repeats=1)
    assert times == ()
    assert model.config.name == "tiny"


def test_all_sizes_can_be_named():
    assert list(SIZES) == ["0.5b", "1.5b", "7b", "tiny"]
