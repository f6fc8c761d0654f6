"""Ratios, their ends and what is said of them, worked out by hand."""

from __future__ import annotations

import pytest

from fastvlm_bench.compare.cold import ColdRun
from fastvlm_bench.compare.rivals import OURS
from fastvlm_bench.compare.rounds import Run
from fastvlm_bench.compare.summary import Line, summarise, summarise_cold
from fastvlm_bench.stats import Spread


def run(side, index, ttft_s, second_ttft_s=None, decode_s=3.0, kind="picture", resolution=256, tokens=3):
    return Run(
        side=side,
        kind=kind,
        resolution=resolution,
        round=index,
        place=0,
        ttft_s=ttft_s,
        second_ttft_s=second_ttft_s,
        decode_s=decode_s,
        decode_tokens=tokens,
        ids=(1, 2, 3, 4),
        second_ids=(),
        positions=None,
        peak_rss_bytes=0,
    )


def test_ratios_are_of_runs_of_the_same_round():
    """Medians of each side alone would give 2.5; times that rise for both from round to round don't widen it."""
    ours, theirs = (1.0, 2.0, 4.0), (2.0, 5.0, 8.0)
    runs = [run("mlx-vlm", i, t) for i, t in reversed(list(enumerate(theirs)))]
    runs += [run(OURS, i, t) for i, t in enumerate(ours)]
    first = [line for line in summarise(runs) if line.figure == "first question"]
    assert first == [
        Line(256, "first question", OURS, Spread(2.0, 1.0, 4.0), None, ""),
        Line(
            256,
            "first question",
            "mlx-vlm",
            Spread(5.0, 2.0, 8.0),
            Spread(2.0, 2.0, 2.5),
            "fewer than 6 rounds show nothing",
        ),
    ]


def test_each_figure_has_its_own_seconds():
    runs = [
        run(OURS, 0, 1.0, 0.5, decode_s=0.3),
        run("mlx-vlm", 0, 3.0, 3.0, decode_s=0.6),
        run(OURS, 0, 8.0, kind="text", decode_s=0.2, tokens=4),
        run("mlx-lm", 0, 9.0, kind="text", decode_s=0.1, tokens=4),
        run(OURS, 0, 4.0, 2.0, resolution=512),
        run("mlx-vlm", 0, 2.0, 1.0, resolution=512),
    ]
    ratios = {(line.resolution, line.figure, line.side): line.ratio.median for line in summarise(runs) if line.ratio}
    assert ratios == pytest.approx(
        {
            (256, "first question", "mlx-vlm"): 3.0,
            (256, "second question", "mlx-vlm"): 6.0,
            (256, "token", "mlx-vlm"): 2.0,
            (256, "token, text alone", "mlx-lm"): 0.5,
            (512, "first question", "mlx-vlm"): 0.5,
            (512, "second question", "mlx-vlm"): 0.5,
            (512, "token", "mlx-vlm"): 1.0,
        }
    )
    token = next(line for line in summarise(runs) if line.figure == "token" and line.side == OURS)
    assert token.seconds.median == pytest.approx(0.1)


def test_ours_alone_has_no_lines():
    assert summarise([run(OURS, 0, 1.0, 1.0)]) == []


def test_whole_processes():
    runs = [
        ColdRun(side, 256, i, 0, seconds, "x") for i in range(2) for side, seconds in ((OURS, 2.0), ("mlx-vlm", 5.0))
    ]
    ours, theirs = summarise_cold(runs)
    assert (ours.figure, ours.seconds) == ("process", Spread(2.0, 2.0, 2.0))
    assert theirs.ratio == Spread(2.5, 2.5, 2.5)
