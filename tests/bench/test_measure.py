"""From loaded models to a report: what is loaded once, whose memory is whose, and the limits with the right numbers."""

from __future__ import annotations

import dataclasses
import json

import mlx.core as mx
import pytest

from fastvlm_bench import measure
from fastvlm_bench.layers import Storage
from fastvlm_bench.peaks import Peaks
from fastvlm_bench.report import to_json
from fastvlm_bench.roofline import Work, stage_work
from fastvlm_bench.runner import FIGURES, Plan, Summary
from fastvlm_bench.stats import Spread
from fastvlm_bench.subjects import Choice
from fastvlm_bench.tables import format_report
from fastvlm_mlx.errors import InputError

ON_CPU = mx.default_device() == mx.Device(mx.cpu)
FEW = Plan((64,), runs=1, warmup=0, max_tokens=3)


def case(generation_tokens: int = 5, **medians: float) -> Summary:
    figures = {name: Spread(*(medians.get(name, 1.0),) * 3) for name in FIGURES}
    return Summary(0, 256, 16, 40, generation_tokens, 1, 0, figures)


def test_shares_of_the_limit():
    plain = Storage("float32")
    work = {"prefill": Work(200, 10, plain), "decode": Work(20, 50, plain)}
    peaks = Peaks({"float32": 1000.0}, bandwidth=500.0)
    # 200 operations at 1000/s are 200 ms, of 800; 50 bytes at 500/s are 100 ms, of 1600 / 4 for a token.
    found = measure.limits_of(work, case(prefill_ms=800.0, decode_ms=1600.0), peaks)
    assert (found["prefill"].bound, found["prefill"].limit_ms, found["prefill"].share) == ("compute", 200.0, 0.25)
    assert (found["decode"].bound, found["decode"].limit_ms, found["decode"].share) == ("memory", 100.0, 0.25)
    assert (found["decode"].flops, found["decode"].bytes) == (20, 50)
    assert set(measure.limits_of(work, case(1, prefill_ms=800.0, decode_ms=0.0), peaks)) == {"prefill"}


def test_the_work_is_that_of_the_question(model):
    tiny = model("tiny")
    kept = {part: Storage.of(module) for part, module in (("vision", tiny.engine.vision.encoder.network),)}
    kept |= {"decoder": Storage.of(tiny.decoder.network), "projector": Storage.of(tiny.engine.vision.projector)}
    # 24 of 40 positions are text; the tokens after the first, 2 to 6, see 40 to 44 positions before them: 42.
    expected = stage_work(tiny.config, 256, 24, context=42, **kept)
    assert measure.work_of(tiny, case(generation_tokens=6)) == expected
    assert set(expected) == {"vision", "projector", "prefill", "decode"}


def test_what_core_ml_runs_has_no_limit(model, monkeypatch):
    tiny = model("tiny")
    monkeypatch.setattr(tiny.engine.vision, "encoder", object())
    assert set(measure.work_of(tiny, case())) == {"projector", "decode"}


def test_what_comes_to_the_same_is_measured_once():
    wanted = [Choice(size="tiny", vision="auto"), Choice(size="tiny", vision="mlx"), Choice(size="tiny", bits=4)]
    report = measure.measure(wanted, FEW, None, load=False, roofline=False)
    assert [subject.label for subject in report.subjects] == [
        "seeded tiny, vision mlx",
        "seeded tiny, 4 bits, vision mlx",
    ]
    assert [run.subject for run in report.runs] == [0, 1]


@pytest.mark.skipif(not ON_CPU, reason="elsewhere 4 bits are packed, and need less")
def test_a_model_beside_others_has_the_memory_that_it_has_alone():
    one, two = Choice(size="tiny"), Choice(size="tiny", bits=4)
    mx.clear_cache()
    alone = measure.measure([one], FEW, None, load=False, roofline=False).summary[0].peak_bytes
    beside = measure.measure([one, two], FEW, None, load=False, roofline=False).summary
    assert beside[0].peak_bytes == pytest.approx(alone, rel=0.1)
    assert beside[1].peak_bytes == pytest.approx(alone, rel=0.1)


def test_a_report_says_where_and_of_what(model):
    report = measure.measure([Choice(size="tiny")], FEW, None, load=False, roofline=True)
    assert report.image == "synthetic photo, 1280 x 960 px JPEG"
    assert report.peaks
    shares = report.rooflines[0, 64]
    assert set(shares) == {"vision", "projector", "prefill", "decode"}
    figures = report.summary[0].figures
    for stage, tokens in (("vision", 1), ("prefill", 1), ("decode", 2)):
        assert shares[stage].share == pytest.approx(shares[stage].limit_ms / figures[f"{stage}_ms"].median * tokens)


@pytest.mark.parametrize(
    ("shape", "image", "tokens"),
    [
        ({"aspect": "anyres", "grid": "2x1"}, "2x1 tiles of: synthetic photo, ", 3),
        ({"aspect": "native"}, "the own shape of: synthetic photo, ", 1),
        ({"aspect": "crop"}, "synthetic photo, ", 1),
    ],
)
def test_other_shapes_of_the_photo(shape, image, tokens):
    """What tiles have to do isn't counted, so they have no share; a report of them says so."""
    plan = dataclasses.replace(FEW, **shape)
    report = measure.measure([Choice(size="tiny")], plan, None, load=False, roofline=True)
    assert report.image.startswith(image)
    assert report.summary[0].image_tokens == tokens
    assert bool(report.rooflines) == (shape["aspect"] == "crop")
    data = json.loads(to_json(report))
    assert data["plan"]["aspect"] == shape["aspect"]
    assert "share of this machine" in format_report(report) or not report.rooflines


def test_a_grid_that_a_model_lacks():
    plan = dataclasses.replace(FEW, aspect="anyres")
    with pytest.raises(InputError, match="has no grids of its own"):
        measure.measure([Choice(size="tiny")], plan, None, load=False, roofline=False)
