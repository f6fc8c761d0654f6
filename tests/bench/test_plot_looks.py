"""The figures can be read: contrast, colours, sizes, and nothing lies on anything else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from fastvlm_bench.plots.breakdown import draw_breakdown
from fastvlm_bench.plots.placing import Placer, spread_out, text_width, wrap_label, wrap_text
from fastvlm_bench.plots.roofline import draw_roofline
from fastvlm_bench.plots.style import DARK, DPI, LIGHT, PALETTES, applied, ink_on, rate_text, time_text
from fastvlm_bench.plots.ttft import draw_ttft
from support.figures import series_of, texts
from support.plot_reports import STAGES, decoders, hard_ones

MAKERS = (draw_breakdown, draw_ttft, draw_roofline)


@pytest.fixture(autouse=True)
def style():
    with applied():
        yield


def luminance(colour):
    """WCAG 2.1, "relative luminance"."""
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in (red, green, blue)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def ratio(one, other):
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_measure_of_contrast():
    assert ratio("#000000", "#ffffff") == pytest.approx(21)
    assert ratio("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)  # the well-known grey that just fails


@pytest.mark.parametrize("palette", PALETTES, ids=["light", "dark"])
def test_colours_stand_out_from_their_page(palette):
    assert palette.page == {"": "#ffffff", "-dark": "#0d1117"}[palette.suffix]
    assert min(ratio(ink, palette.page) for ink in (palette.ink, palette.muted)) >= 4.5
    marks = {**palette.stages, **dict(enumerate(palette.series))}
    assert {
        name: ratio(colour, palette.page) for name, colour in marks.items() if ratio(colour, palette.page) < 3
    } == {}
    assert all(ratio(ink_on(fill), fill) >= 4.5 for fill in palette.stages.values())


# Machado, Oliveira, Fernandes, "A Physiologically-based Model for Simulation of Color Vision Deficiency", 2009: all
# cones of a kind missing; on linear sRGB.
CONES = {
    "all": np.eye(3),
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def oklab(colour, cones):
    """Ottosson, "A perceptual color space for image processing", 2020."""
    values = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(CONES[cones]) @ linear, 0, 1)
    to_lms = [
        [0.41222147, 0.53633254, 0.05144599],
        [0.2119035, 0.68069955, 0.10739696],
        [0.08830246, 0.28171884, 0.6299787],
    ]
    to_lab = [
        [0.21045426, 0.79361779, -0.00407205],
        [1.9779985, -2.42859221, 0.4505937],
        [0.02590404, 0.78277177, -0.80867577],
    ]
    return np.array(to_lab) @ np.cbrt(np.array(to_lms) @ seen)


@pytest.mark.parametrize("cones", CONES)
@pytest.mark.parametrize("palette", PALETTES, ids=["light", "dark"])
def test_neighbours_differ_for_everyone(palette, cones):
    seen = {name: oklab(colour, cones) for name, colour in palette.stages.items()}
    # Those that can touch: each and the next, or the one after where the next is too short to be seen.
    near = {(a, b) for step in (1, 2) for a, b in zip(STAGES, STAGES[step:], strict=False)}
    for a, b in itertools.combinations(seen, 2):
        # 0.02 is what can just be told apart side by side; 0.08 is far, 0.12 is another colour.
        assert np.linalg.norm(seen[a] - seen[b]) > (0.12 if (a, b) in near else 0.08), (a, b)
    lines = [oklab(colour, cones) for colour in palette.series]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(lines, 2)) > 0.08


@pytest.mark.parametrize("palette", PALETTES, ids=["light", "dark"])
@pytest.mark.parametrize("make", MAKERS)
def test_every_text_can_be_read(make, palette):
    figure = make(series_of(decoders()), palette)
    assert to_hex(figure.get_facecolor()) == palette.page
    stages = {palette.stages[name] for name in palette.stages}
    for text in texts(figure):
        assert text.get_fontsize() >= 9
        colour = to_hex(text.get_color())
        inside = colour in ("#000000", "#ffffff") and colour not in (palette.ink, palette.muted)
        if inside:  # a bar
            assert text.axes is not None
            assert any(ratio(colour, fill) >= 4.5 for fill in stages)
        else:
            assert ratio(colour, palette.page) >= 4.5, text.get_text()


def test_numbers_in_bars_stand_out_from_them():
    figure = draw_breakdown(series_of(decoders()), DARK)
    for axes in figure.axes:
        bars = [bar for container in axes.containers[:-1] for bar in container]
        for text in axes.texts:
            x, y = text.get_position()
            under = [
                b
                for b in bars
                if b.get_x() <= x <= b.get_x() + b.get_width() and abs(b.get_y() + b.get_height() / 2 - y) < 0.1
            ]
            ground = to_hex(under[0].get_facecolor()) if under else DARK.page
            assert ratio(to_hex(text.get_color()), ground) >= 4.5


@pytest.mark.parametrize(
    ("make", "name"),
    [(m, name) for name, (data, *_) in hard_ones().items() for m in MAKERS if data["peaks"] or m is not draw_roofline],
)
def test_nothing_collides_or_is_cut_off(make, name):
    figure = make(series_of(*hard_ones()[name]), LIGHT)
    renderer = figure.canvas.get_renderer()
    figure.draw(renderer)
    width, height = figure.bbox.size
    boxes, slanted = [], []
    for text in texts(figure):
        left, bottom, right, top = Text.get_window_extent(text, renderer).extents  # without a line to what it names
        assert 0 <= left < right <= width, text.get_text()
        assert 0 <= bottom < top <= height, text.get_text()
        if text.get_rotation() % 90 == 0:
            boxes.append((left + 1, bottom + 1, right - 1, top - 1, text.get_text()))
        else:
            slanted.append(((left + right) / 2, (bottom + top) / 2, text))
    for one, other in itertools.combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one[4], other[4])
    for x, y, text in slanted:
        angle, length = np.radians(text.get_rotation()), text_width(text.get_text(), text.get_fontsize()) * DPI / 72
        for part in np.linspace(-0.5, 0.5, 20):
            along = x + part * length * np.cos(angle), y + part * length * np.sin(angle)
            assert not [b[4] for b in boxes if b[0] < along[0] < b[2] and b[1] < along[1] < b[3]], text.get_text()


def test_intervals_are_spread_out():
    assert spread_out([5.0, 50.0], [10.0, 10.0], 0.0, 100.0) == [5.0, 50.0]
    assert spread_out([50.0, 52.0], [10.0, 10.0], 0.0, 100.0) == [46.0, 56.0]
    assert spread_out([52.0, 50.0], [10.0, 10.0], 0.0, 100.0) == [56.0, 46.0]
    assert spread_out([1.0, 2.0], [10.0, 20.0], 0.0, 100.0) == [5.0, 20.0]
    assert spread_out([99.0, 99.0], [10.0, 10.0], 0.0, 100.0) == [85.0, 95.0]
    middles = spread_out([10.0, 40.0, 41.0, 42.0, 90.0], [20.0] * 5, 0.0, 100.0)
    assert np.diff(middles).tolist() == pytest.approx([20.0] * 4)


def test_a_label_has_a_place_where_it_covers_nothing():
    axes = Figure(figsize=(2, 2), dpi=DPI).add_axes((0, 0, 1, 1), xlim=(0, 144), ylim=(0, 144))  # points
    placer = Placer(axes)
    assert placer.label(72, 72, "text", 9).get_position() == (8, 0)  # right of it
    assert placer.label(72, 74, "text", 9).get_position()[0] <= 0  # not on the first one
    assert placer.label(140, 20, "text", 9).get_position() == (-8, 0)  # not outside
    placer.avoid([0, 60], [120, 120])
    assert placer.label(20, 115, "a long text", 9).get_position() == (
        7,
        -7,
    )  # not on a line, nor on the mark at its end
    far = [(40.0, 0.0, "left", "center")]
    assert placer.label(20, 40, "text", 9, far, leader="#000000").arrow_patch is not None
    assert placer.label(20, 20, "text", 9, far).arrow_patch is None


def test_lines_are_broken_where_they_may_be():
    assert wrap_text("one two three", text_width("one two", 9) + 0.1, 9) == ["one two", "three"]
    assert wrap_label("a b, c d", text_width("a b,", 9) + 0.1, 9) == "a b,\nc d"
    assert wrap_label("a b, c d", 1000, 9) == "a b, c d"
    assert wrap_text("stage-three-12000", text_width("stage-three-", 9) + 0.1, 9) == ["stage-three-", "12000"]
    assert "".join(wrap_text("m" * 40, 50, 9)) == "m" * 40


@pytest.mark.parametrize(
    ("milliseconds", "said"),
    [
        (0.26, "0.3 ms"),
        (9.94, "9.9 ms"),
        (9.96, "10 ms"),
        (1297, "1297 ms"),
        (10_000, "10000 ms"),
        (10_001, "10.0 s"),
        (123_456, "123 s"),
    ],
)
def test_times(milliseconds, said):
    assert time_text(milliseconds) == said


def test_rates():
    assert [rate_text(rate) for rate in (3.3e9, 110e9, 2e12, 13.4e12)] == [
        "3.3 GFLOP/s",
        "110 GFLOP/s",
        "2.0 TFLOP/s",
        "13 TFLOP/s",
    ]
