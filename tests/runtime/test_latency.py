"""Times between those that were measured, counted by hand."""

from __future__ import annotations

import json

import pytest

from fastvlm_mlx.errors import InputError
from fastvlm_mlx.latency import Grid, Latency, latencies
from fastvlm_mlx.measurements import Times, parse_report, read_report
from support.reports import point, report, spread, subject


def latency(*points) -> Latency:
    found = latencies([parse_report(report([subject()], list(points)), "here")])
    return next(iter(found.values()))


@pytest.fixture
def two():
    """128 px: 4 + 24 positions; 384 px: 36 + 24."""
    small = point(0, 128, vision=10, prefill=20, rest=2, width=3, peak_bytes=5000)
    return latency(small, point(0, 384, vision=90, prefill=52, rest=4, width=5, peak_bytes=9000))


def test_a_measured_size_is_as_it_was_measured(two):
    found = two.estimate(128)
    assert (found.ttft, found.measured, found.peak_bytes) == (Times(32, 29, 35), True, 5000)
    assert two.resolutions == [128, 384]


def test_between_two_sizes_each_stage_lies_on_its_own_line(two):
    # 256 px has 16 tokens, (16 - 4) / (36 - 4) = 3/8 of the way: vision 40, prefill 32, the rest 2.75.
    found = two.estimate(256)
    assert found.ttft.median == pytest.approx(74.75)
    # The ends of TTFT: 3 and 5 away from the median.
    assert (found.ttft.low, found.ttft.high) == pytest.approx((74.75 - 3.75, 74.75 + 3.75))
    assert not found.measured
    assert found.peak_bytes == 9000, "what the next larger size took"


@pytest.mark.parametrize("side", [64, 448])
def test_nothing_is_said_outside(two, side):
    assert two.estimate(side) is None


def test_prefill_goes_by_positions(two):
    # 128 px with 40 text tokens: 44 positions, half way between 28 and 60; vision and the rest as measured.
    found = two.estimate(128, 40)
    assert found.ttft.median == pytest.approx(10 + 36 + 2)
    assert not found.measured
    assert found.peak_bytes == 9000
    assert two.estimate(128, 23) is None
    assert two.estimate(384, 25) is None


def test_a_larger_size_is_never_estimated_faster():
    noisy = latency(point(0, 64, 10, 10), point(0, 192, 50, 50), point(0, 320, 40, 90))
    # 256 px: 16 tokens, (16 - 9) / (25 - 9) of the way; vision stays 50, prefill 50 + 40 * 7 / 16.
    assert noisy.estimate(256).ttft.median == pytest.approx(50 + 67.5)
    assert noisy.estimate(320).ttft.median == 130, "measured is measured"
    times = [noisy.estimate(side).ttft.median for side in (64, 128, 192, 256)]
    assert times == sorted(times)


def test_ends_enclose_the_median():
    # 64 px: prefill's high end is 40, TTFT's 30, so the rest's is 30 - 10 - 40 = -20, below its median, 0. With 8 more
    # positions prefill's median is 30 and its end still 40: 10 + 30 + 0 = 40, and the ends' sum 10 + 40 - 20 = 30.
    wide = point(0, 64, 10, 20)
    wide["figures"]["prefill_ms"] = {"median": 20, "low": 20, "high": 40}
    found = latency(wide, point(0, 192, 10, 30)).estimate(64, 32)
    assert found.ttft == Times(40, 40, 40)


def test_what_was_measured_later_counts():
    first = parse_report(report([subject()], [point(0, 64, 1, 1)]), "first")
    second = parse_report(report([subject(bits=4), subject()], [point(1, 64, 2, 2), point(0, 64, 7, 7)]), "second")
    found = latencies([first, second])
    assert [(s.bits, known.estimate(64).ttft.median) for s, known in found.items()] == [(None, 4), (4, 14)]


def test_tiles_are_encoded_each_and_prefilled_together():
    # 64 px: a tile is one position. 2 x 1 tiles and the whole: 3 pictures, 3 + 24 positions.
    known = latency(point(0, 64, vision=10, prefill=25, rest=1), point(0, 192, vision=50, prefill=33, rest=1))
    # Prefill has 25 at 25 positions and 33 at 33.
    assert known.estimate_grid(64, Grid(2, 1)).ttft.median == pytest.approx(3 * 10 + 3 * 1 + 27)
    # A line break ends each of the two rows of 1 x 2 tiles.
    assert known.estimate_grid(64, Grid(1, 2, line_breaks=True)).ttft.median == pytest.approx(33 + 24 + 3 + 2)
    assert known.estimate_grid(64, Grid(3, 3)) is None, "10 + 24 positions: more than were measured"
    assert known.most_positions == 33


def test_tokens_of_tiles():
    assert Grid(2, 2).tokens(1024) == 5 * 256
    assert Grid(2, 2, line_breaks=True).tokens(1024) == 256 + 32 * 33
    assert Grid(3, 1).pictures == 4
    assert str(Grid(3, 1)) == "3x1"


def test_a_measured_picture_in_tiles_is_no_square_one():
    tiled = point(0, 64, 90, 90) | {"image_tokens": 5, "prompt_tokens": 29}
    assert latency(tiled, point(0, 128, 10, 20)).resolutions == [128]
    assert latency(tiled).most_positions == 0


def test_a_peak_that_one_run_does_not_say_is_unknown():
    data = report([subject()], [point(0, 64, 1, 2, peak_bytes=5000), point(0, 128, 1, 2, peak_bytes=6000)])
    data["runs"][1]["peak_bytes"] = None
    assert [p.peak_bytes for p in parse_report(data, "here").points[0]] == [None, 6000]


def test_memory_stays_known_where_a_later_report_does_not_say():
    def later(*peaks):
        points = [point(0, 64, index, 2, peak_bytes=peak) for index, peak in enumerate(peaks)]
        (known,) = latencies(parse_report(report([subject()], [p]), "here") for p in points).values()
        found = known.estimate(64)
        return found.ttft.median, found.peak_bytes

    assert later(5000, None) == (3, 5000)
    assert later(5000, 7000) == (3, 7000)
    assert later(None) == (2, None)


def test_reading(tmp_path):
    (tmp_path / "bench.json").write_text(json.dumps(report([subject(identity="me")], [point(0, 64, 1, 2)])))
    found = read_report(tmp_path / "bench.json")
    assert found.where == str(tmp_path / "bench.json")
    assert found.subjects[0].identity == "me"
    assert (found.points[0][0].positions, found.points[0][0].text_tokens) == (25, 24)
    assert found.machine["cpu"] == "Apple M2"


def _with(data, path, value):
    """The data with another value at a path, or without that key."""
    *parents, last = path
    place = data
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["format_version"], 1, "expected a report of fastvlm-bench with format_version 2, found 1"),
        (["subjects"], None, "here has no subjects"),
        (["subjects"], {}, "subjects must be list"),
        (["subjects", 0, "bits"], "4", "bits must be int or NoneType, found '4'"),
        (["subjects", 0, "bits"], True, "bits must be int or NoneType, found True"),
        (["subjects", 0, "grid_pinpoints"], [[64]], "pairs of pixels"),
        (["summary", 0, "subject"], 1, "no subject 1"),
        (["summary", 0, "subject"], -1, "subject must be 0 or more"),
        (["summary", 0, "prompt_tokens"], 1, "more positions than its image"),
        (["summary", 0, "figures", "vision_ms"], None, r"summary\[0\], figures has no vision_ms"),
        (["summary", 0, "figures", "ttft_ms"], spread(5, -1), "low <= median"),
        (["summary", 0, "figures", "ttft_ms"], spread(float("nan")), "low <= median"),
        (["summary", 0, "figures", "ttft_ms"], spread(float("inf")), "low <= median"),
        (["summary", 0, "figures", "ttft_ms"], spread(1, 2), "low <= median"),
        (["runs", 0], 7, r"runs\[0\]: expected an object, found int"),
    ],
)
def test_a_report_that_is_not_whole(path, value, said):
    data = report([subject()], [point(0, 64, 1, 2)])
    with pytest.raises(InputError, match=said):
        parse_report(_with(data, path, value), "here")


@pytest.mark.parametrize("text", ["", "[1]", '"a"', "{}"])
def test_a_file_that_is_no_report(tmp_path, text):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"bench.json"):
        read_report(path)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="can't read"):
        read_report(tmp_path / "none.json")
    with pytest.raises(InputError, match="can't read"):
        read_report(tmp_path)
