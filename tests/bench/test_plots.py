"""The figures show what the report says."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.container import ErrorbarContainer

from fastvlm_bench.plots.breakdown import draw_breakdown
from fastvlm_bench.plots.naming import heading, short_names
from fastvlm_bench.plots.roofline import draw_roofline
from fastvlm_bench.plots.style import DARK, LIGHT, applied
from fastvlm_bench.plots.ttft import draw_ttft
from support.figures import series_of, words
from support.plot_reports import OTHER, PEAKS, case, limit, model, whole


@pytest.fixture(autouse=True)
def style():
    with applied():
        yield


def test_the_bars_are_the_stages():
    small, large = (10.0, 0.1, 20.0, 1.0, 30.0, 2.0), (11.0, 0.2, 40.0, 2.0, 60.0, 3.0)
    data = whole(
        [model()], [case(0, 512, large, (117.0, 100.0, 130.0), 9.0), case(0, 256, small, (63.5, 60.0, 70.0), 7.0)]
    )
    figure = draw_breakdown(series_of(data), LIGHT)
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["256 px", "512 px"]
    bars = {
        c.get_label(): [(b.get_x(), b.get_width(), b.get_y() + b.get_height() / 2) for b in c]
        for c in axes.containers[:-1]
    }
    # Without tokenising, which is a thousandth.
    assert list(bars) == ["preprocess", "vision", "projector", "prefill", "first token"]
    for row, stages in enumerate((small, large)):
        start = 0.0
        for name, length in zip(bars, (stages[0], *stages[2:]), strict=True):
            assert bars[name][row] == pytest.approx((start, length, row))
            start += length
    whisker = next(c for c in axes.containers if isinstance(c, ErrorbarContainer))
    assert whisker.lines[0].get_xdata() == pytest.approx([63.5, 117.0])
    assert [tuple(segment[:, 0]) for segment in whisker.lines[2][0].get_segments()] == [(60.0, 70.0), (100.0, 130.0)]
    (second,) = (line for line in axes.lines if line.get_label() == "second question")
    assert second.get_xdata() == pytest.approx([7.0, 9.0])
    assert {"64 ms", "\u25b2 7.0 ms", "117 ms", "\u25b2 9.0 ms", "20", "40", "60"} <= set(words(figure))
    assert axes.get_xlabel() == "time to first token (ms)"
    assert axes.yaxis_inverted()


def test_tokenising_is_shown_where_it_can_be_seen():
    stages = (10.0, 5.0, 20.0, 1.0, 30.0, 2.0)
    figure = draw_breakdown(series_of(whole([model()], [case(0, 256, stages)])), LIGHT)
    bars = {container.get_label(): container[0] for container in figure.axes[0].containers[:-1]}
    assert list(bars)[1] == "tokenize"
    assert (bars["tokenize"].get_x(), bars["vision"].get_x()) == (10.0, 15.0)
    assert "tokenize" in words(figure)


def test_models_share_a_scale_unless_they_differ_too_much():
    for factor, shared in ((10.0, True), (300.0, False)):
        stages = [(10.0, 0.0, 20.0, 1.0, 30.0, 2.0), tuple(factor * s for s in (10.0, 0.0, 20.0, 1.0, 30.0, 2.0))]
        figure = draw_breakdown(
            series_of(whole([model("a"), model("b")], [case(i, 256, stages[i]) for i in (0, 1)])), LIGHT
        )
        first, second = (axes.get_xlim() for axes in figure.axes)
        assert (first == second) == shared
        assert any("scale of its own" in text for text in words(figure)) != shared
        units = [axes.get_xlabel()[-4:] for axes in figure.axes]
        assert units == (["", "(ms)"] if shared else ["(ms)", " (s)"])


def test_long_times_are_in_seconds():
    stages = (100.0, 0.0, 9000.0, 20.0, 14000.0, 280.0)
    series = series_of(whole([model()], [case(0, 256), case(0, 1024, stages, (23400.0, 23000.0, 24000.0), 11000.0)]))
    bars = draw_breakdown(series, LIGHT)
    (axes,) = bars.axes
    vision = next(c for c in axes.containers if c.get_label() == "vision")
    assert vision[1].get_width() == pytest.approx(9.0)
    assert axes.get_xlabel() == "time to first token (s)"
    assert {"23.4 s", "\u25b2 11.0 s", "103 ms"} <= set(words(bars))
    lines = draw_ttft(series, LIGHT)
    assert lines.axes[0].get_ylabel() == "time to first token (s, logarithmic)"
    assert median_lines(lines)[0].get_ydata() == pytest.approx([0.1031, 23.4])


def median_lines(figure):
    return [line for line in figure.axes[0].lines if line.get_marker() != "None"]


def test_the_lines_are_the_medians_and_the_bands_the_ends():
    ends = {256: (50.0, 40.0, 70.0), 512: (90.0, 80.0, 95.0), 1024: (200.0, 190.0, 230.0)}
    cases = [case(0, side, ttft=ttft) for side, ttft in ends.items()]
    cases += [case(1, side, ttft=tuple(0.75 * value for value in ttft)) for side, ttft in ends.items()]
    figure = draw_ttft(series_of(whole([model("a"), model("b", 4)], cases)), DARK)
    axes = figure.axes[0]
    for number, factor in enumerate((1.0, 0.75)):
        line, band = median_lines(figure)[number], axes.collections[number]
        assert line.get_xydata().tolist() == [[side, factor * ttft[0]] for side, ttft in ends.items()]
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
        assert corners == {(side, factor * end) for side, ttft in ends.items() for end in ttft[1:]}
        assert to_hex(line.get_color()) == DARK.series[number]
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] == 0
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["256", "512", "1024"]
    (above,) = axes.child_axes
    assert [tick.get_text() for tick in above.get_xticklabels()] == ["16", "64", "256"]
    assert above.get_xlabel() == "image tokens"
    assert {"a\n200 ms", "b, 4 bits\n150 ms"} <= set(words(figure))


def test_a_wide_range_of_times_gets_a_logarithmic_axis():
    cases = [case(0, 256, ttft=(10.0, 10.0, 10.0)), case(0, 512, ttft=(79.0, 79.0, 79.0))]
    figure = draw_ttft(series_of(whole([model()], cases)), LIGHT)
    assert figure.axes[0].get_yscale() == "linear"
    cases[1] = case(0, 512, ttft=(81.0, 81.0, 81.0))
    axes = draw_ttft(series_of(whole([model()], cases)), LIGHT).axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] < 10 < 81 < axes.get_ylim()[1]
    assert "logarithmic" in axes.get_ylabel()


def test_a_single_resolution_has_a_whisker():
    figure = draw_ttft(series_of(whole([model()], [case(0, 512, ttft=(50.0, 40.0, 70.0))])), LIGHT)
    (whisker,) = (c for c in figure.axes[0].collections if hasattr(c, "get_segments"))
    assert [segment.tolist() for segment in whisker.get_segments()] == [[[512.0, 40.0], [512.0, 70.0]]]
    assert any(text.startswith("Whisker: least to greatest.") for text in words(figure))


def test_the_roofline_has_the_stages_and_the_roofs():
    # 2e9 operations over 1e8 bytes in 4 ms: 20 a byte, 500 GFLOP/s; memory alone takes 1 ms.
    vision, decode = limit(2e9, 1e8, 4.0), limit(1e8, 1e8, 2.0)
    larger = limit(8e9, 4e7, 10.0)
    cases = [case(0, 256, roofline={"vision": vision, "decode": decode}), case(0, 512, roofline={"vision": larger})]
    figure = draw_roofline(series_of(whole([model()], cases, peaks=PEAKS)), LIGHT)
    (axes,) = figure.axes
    marks = {c.get_label(): c.get_offsets().tolist() for c in axes.collections if isinstance(c, PathCollection)}
    assert marks["vision"] == pytest.approx(np.array([[20.0, 0.5], [200.0, 0.8]]))
    assert marks["decode"] == pytest.approx(np.array([[1.0, 0.05]]))
    assert marks["projector"] == []
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    slope = lines["memory"]
    assert (slope[:, 1] / slope[:, 0]).tolist() == pytest.approx([0.1, 0.1])  # 100 GB/s
    assert slope[-1].tolist() == pytest.approx([40.0, 4.0])
    assert lines["float32"][:, 1].tolist() == [2.0, 2.0]
    assert lines["float32"][0].tolist() == pytest.approx([20.0, 2.0])  # where it meets the slope
    assert axes.get_ylabel() == "performance (TFLOP/s)"
    said = words(figure)
    assert {"memory 100 GB/s", "float32: 2.0 TFLOP/s", "float16: 4.0 TFLOP/s", "decode 50 %"} <= set(said)
    assert "25 %" in said
    assert "vision 20 %" in said  # 8e9 operations take float16 2 ms, of 10
    assert "projector" not in said


def test_slow_machines_are_in_gigaflops():
    roofline = {"decode": limit(1e8, 1e8, 2.0, rate=9e11)}
    data = whole(
        [model()], [case(0, 256, roofline=roofline)], peaks={"matmul_flops": {"float32": 9e11}, "bandwidth": 1e11}
    )
    (axes,) = draw_roofline(series_of(data), LIGHT).axes
    assert axes.get_ylabel() == "performance (GFLOP/s)"
    (decode,) = (c for c in axes.collections if c.get_label() == "decode")
    assert decode.get_offsets().tolist() == pytest.approx(np.array([[1.0, 50.0]]))


def test_the_roofline_says_what_it_leaves_out():
    cases = [case(i, 256, roofline={"decode": limit(1e8, 1e8, 0.5)} if i else None) for i in (0, 1)]
    subjects = [model("a"), model("b", vision="coreml")]
    figure = draw_roofline(series_of(whole(subjects, cases, peaks=PEAKS)), LIGHT)
    assert len(figure.axes) == 1
    said = " ".join(" ".join(words(figure)).split())
    assert "not shown: a, vision mlx" in said
    assert "Vision that Core ML ran isn't shown" in said
    assert "Above a roof" in said  # twice the limit of 1 ms
    assert "decode 200 %" in said


def test_names_are_short_and_different():
    data = whole([model("a"), model("a", 4), model("b")], [case(i, 256) for i in range(3)])
    assert short_names(series_of(data)) == ["a", "a, 4 bits", "b"]
    assert heading(series_of(data))[0] == "a; a, 4 bits; b; vision mlx"
    assert short_names(series_of(whole([model("a")], [case(0, 256)]))) == ["a, vision mlx"]
    both = [model("a"), model("a", vision="coreml")]
    assert short_names(series_of(whole(both, [case(i, 256) for i in (0, 1)]))) == ["a, vision mlx", "a, vision coreml"]
    units = [model("a", vision="coreml", device=f"vision: Core ML ({unit})") for unit in ("CPU_ONLY", "ALL")]
    names = short_names(series_of(whole(units, [case(i, 256) for i in (0, 1)])))
    assert names == ["a, vision: Core ML (CPU_ONLY)", "a, vision: Core ML (ALL)"]


def test_models_of_several_machines_have_their_names():
    one = whole([model("a")], [case(0, 256)])
    series = series_of(one, one | {"machine": OTHER})
    assert short_names(series) == ["a, Apple M2", "a, Apple M1"]
    assert heading(series)[1].split("; ") == [
        "Apple M2, 8 cores, 16.0 GiB, MLX 0.32.4 on the GPU",
        "Apple M1, 8 cores, 8.0 GiB, MLX 0.32.4 on the GPU",
        "2026-11-21",
    ]
    for make in (draw_breakdown, draw_ttft):
        said = words(make(series, LIGHT))
        assert any(text.startswith("a, Apple M2") for text in said)
        assert any(text.startswith("a, Apple M1") for text in said)
    larger = one | {"machine": one["machine"] | {"memory_bytes": 32 * 2**30}}
    assert short_names(series_of(one, larger)) == ["a, Apple M2, 16.0 GiB", "a, Apple M2, 32.0 GiB"]


def test_reports_of_one_machine_are_told_apart_by_what_differs():
    one = whole([model("a")], [case(0, 256)])
    longer = whole([model("a")], [case(0, 256, text_tokens=200)])
    assert short_names(series_of(one, longer)) == ["a, 24 text tokens", "a, 200 text tokens"]
    later = one | {"date": "2026-12-01T10:00:00+00:00"}
    assert short_names(series_of(one, later)) == ["a, 2026-11-21", "a, 2026-12-01"]
    assert heading(series_of(one, later))[1].endswith("; 2026-11-21 to 2026-12-01")
    assert short_names(series_of(one, one)) == ["a, report 0", "a, report 1"]
    assert short_names(series_of(one, whole([model("b")], [case(0, 256)]) | {"date": "2026-12-01"})) == ["a", "b"]


def test_shapes_are_told_apart():
    """A square in tiles, in its own shape and padded are three lines, not one model measured three times."""
    times = ((10.0, 0.1, 20.0, 1.0, 30.0, 2.0), (63.5, 60.0, 70.0), 7.0)
    plans = ({}, {"aspect": "native", "grid": None}, {"aspect": "anyres", "grid": "2x2"}, {"aspect": "anyres"})
    reports = [whole([model()], [case(0, 256, *times)]) for _ in plans]
    for data, plan in zip(reports, plans, strict=True):
        data["plan"] = data["plan"] | plan
    series = series_of(*reports)
    assert [one.label.removeprefix(series[0].label) for one in series] == ["", ", native", ", 2x2 tiles", ", tiles"]
    assert len(set(short_names(series))) == 4
