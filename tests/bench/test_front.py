"""The order that is taken for granted, and the front that follows from it, on cases worked out by hand."""

from __future__ import annotations

import pytest

from fastvlm_bench.front import (
    Budget,
    Choice,
    at_least_as_good,
    candidates,
    judge,
    published_accuracy,
    trained_side,
)
from fastvlm_mlx.latency import Estimate, Grid, latencies
from fastvlm_mlx.measurements import Subject, Times, parse_report
from support.reports import point, report, subject

GRID = Grid(2, 2)


def choice(size="0.5b", bits=None, side=512, ms=100.0, grid=None, high=None, peak=10**9, **more) -> Choice:
    name = more.pop("name", f"FastVLM-{size}")
    owner = Subject(name, size, False, bits, "bfloat16", "mlx", "MLX", **more)
    return Choice(owner, side, grid, Estimate(Times(ms, ms, high or ms), True, peak))


def mine(**more) -> Choice:
    return choice(size=None, **{"name": "mine"} | more)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (choice(side=512), choice(side=256)),
        (choice(side=1024), choice(side=256)),
        (choice(bits=8), choice(bits=4)),
        (choice(bits=None), choice(bits=8)),
        (choice("1.5b"), choice("0.5b")),
        (choice("7b"), choice("0.5b")),
        (choice("7b", 8, 1024), choice("0.5b", 4, 512)),
        (mine(side=256, image_size=256), mine(side=128, image_size=256)),
        (mine(bits=8), mine(bits=4)),
    ],
)
def test_better_by_the_order(better, worse):
    assert at_least_as_good(better, worse)
    assert not at_least_as_good(worse, better)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (choice("0.5b", None, 1024), choice("1.5b", None, 512)),
        (choice("7b", 4), choice("0.5b", None)),
        (choice(bits=4, side=1024), choice(bits=8, side=512)),
        (choice(side=1088), choice(side=1024)),  # beyond the trained side nothing is sure
        (choice(side=2048), choice(side=1088)),
        (choice(side=1024, grid=GRID), choice(side=1024)),
        (choice(side=1024, grid=GRID), choice(side=1024, grid=Grid(1, 2))),
        (mine(), choice()),
        (mine(), mine(name="another")),
        (mine(side=256), mine(side=128)),  # where it was trained isn't known
        (mine(side=256, image_size=128), mine(side=128, image_size=128)),
    ],
)
def test_the_order_says_nothing(one, other):
    assert not at_least_as_good(one, other)
    assert not at_least_as_good(other, one)


def test_equals():
    assert at_least_as_good(choice(ms=1), choice(ms=2))
    assert at_least_as_good(choice(ms=2), choice(ms=1, name="a copy"))


def test_the_figures_that_are_published():
    exact, bounds = published_accuracy(choice("1.5b", None, 1024)), published_accuracy(choice("1.5b", 8, 1024))
    assert (exact.entry.model, exact.exact) == ("FastVLM-1.5B", True)
    assert (bounds.entry.model, bounds.exact, bounds.own) == ("FastVLM-1.5B", False, True)
    assert published_accuracy(choice("7b", None, 960)).exact is False
    for unknown in (choice(side=1088), choice(side=1024, grid=GRID), mine(side=1024)):
        assert published_accuracy(unknown) is None


def test_random_weights_have_no_published_figures_of_their_own():
    seeded = Subject("seeded 0.5b", "0.5b", True, None, "bfloat16", "mlx", "MLX")
    known = published_accuracy(Choice(seeded, 1024, None, choice().estimate))
    assert (known.entry.model, known.bound, known.own, known.exact) == ("FastVLM-0.5B", False, False, False)


def reasons(choices, budget=Budget(200)):  # noqa: B008 (frozen)
    return {str(v.choice): v.reason for v in judge(choices, budget)}


def test_a_front():
    """Four decoders' worth of measurements; who beats whom is worked out by hand."""
    choices = [
        choice("0.5b", 4, 512, 40),  # the fastest
        choice("0.5b", 8, 512, 50),  # more bits
        choice("0.5b", 4, 1024, 120),  # larger images than both
        choice("1.5b", 8, 512, 110),  # a larger decoder
        choice("1.5b", 8, 1024, 120),  # as fast as 0.5B with 4 bits at 1024 px, and better
        choice("0.5b", None, 512, 150),  # full bits: nothing within the budget has them
        choice("7b", 4, 512, 130),  # the largest, but 4 bits: better than 0.5B's 4 bits, slower though
        choice("7b", 4, 256, 135),  # slower and smaller than the one before
        choice("7b", None, 512, 190, high=201),  # its slowest run was too slow
    ]
    assert reasons(choices) == {
        "0.5B, 4 bits, mlx, 512 px": None,
        "0.5B, 8 bits, mlx, 512 px": None,
        "0.5B, 4 bits, mlx, 1024 px": "no better and no faster than 1.5B, 8 bits, mlx, 1024 px",
        "1.5B, 8 bits, mlx, 512 px": None,
        "1.5B, 8 bits, mlx, 1024 px": None,
        "0.5B, unquantised, mlx, 512 px": None,
        "7B, 4 bits, mlx, 512 px": None,
        "7B, 4 bits, mlx, 256 px": "no better and no faster than 7B, 4 bits, mlx, 512 px",
        "7B, unquantised, mlx, 512 px": "over the TTFT budget",
    }
    assert [v.choice.estimate.ttft.median for v in judge(choices, Budget(200))] == sorted(
        c.estimate.ttft.median for c in choices
    )


def test_what_is_over_the_budget_beats_nobody():
    slow_run = choice("7b", None, 1024, 90, high=250)
    assert reasons([slow_run, choice("0.5b", 4, 256, 100)])["0.5B, 4 bits, mlx, 256 px"] is None


def test_the_reason_names_one_that_is_on_the_front():
    chain = [choice("7b", ms=10), choice("1.5b", ms=20), choice("0.5b", ms=30)]
    found = reasons(chain)
    assert found["0.5B, unquantised, mlx, 512 px"].endswith("than 7B, unquantised, mlx, 512 px")
    assert found["1.5B, unquantised, mlx, 512 px"].endswith("than 7B, unquantised, mlx, 512 px")


def test_of_two_alike_one_stays():
    alike = [choice(name="one"), choice(name="two")]
    assert [v.reason is None for v in judge(alike, Budget(200))] == [True, False]
    faster = [choice(name="one", ms=100), choice(name="two", ms=99)]
    assert [(v.choice.subject.name, v.reason is None) for v in judge(faster, Budget(200))] == [
        ("two", True),
        ("one", False),
    ]


def test_the_budget_is_kept_to_its_edge():
    assert reasons([choice(ms=150, high=200)]) == {"0.5B, unquantised, mlx, 512 px": None}
    assert Budget(200, 10**9).reason_against(choice(peak=10**9).estimate) is None
    assert Budget(200, 10**9).reason_against(choice(peak=10**9 + 1).estimate) == "over the memory budget"
    assert Budget(200, 10**9).reason_against(choice(peak=None).estimate) == "its memory wasn't measured alone"
    assert Budget(200).reason_against(choice(peak=None).estimate) is None


def offered(limit, owner=None, points=None, text_tokens=24, memory=None):
    points = points or [point(0, 256, 20, 30), point(0, 1024, 260, 130)]
    data = parse_report(report([owner or subject()], points), "here")
    ((found, latency),) = latencies([data]).items()
    return {
        (c.resolution, str(c.grid or "")): c.estimate.measured
        for c in candidates(found, latency, text_tokens, Budget(limit, memory))
    }


def test_measured_sizes_and_the_largest_between_them_that_is_in_time():
    # 16 to 256 image tokens, 50 to 390 ms: 200 ms are 106 tokens on; 640 px has 100 (169 ms), 704 px 121 (198.75).
    assert offered(198.7) == {(256, ""): True, (1024, ""): True, (640, ""): False}
    assert offered(198.75) == {(256, ""): True, (1024, ""): True, (704, ""): False}
    assert offered(390) == {(256, ""): True, (1024, ""): True}, "the largest is in time itself"
    assert offered(51) == {(256, ""): True, (1024, ""): True}, "nothing larger is"


def test_a_package_has_no_sizes_between():
    assert offered(198.75, subject(vision="coreml")) == {(256, ""): True, (1024, ""): True}


def test_nothing_is_estimated_beyond_the_trained_side():
    points = [point(0, 256, 20, 30), point(0, 2048, 2000, 1000)]
    assert offered(2999, points=points) == {(256, ""): True, (2048, ""): True, (1024, ""): False}


def test_memory_counts_between_too():
    points = [point(0, 256, 20, 30), point(0, 512, 40, 50, peak_bytes=10**9), point(0, 1024, 260, 130, peak_bytes=5000)]
    assert (448, "") in offered(89, points=points, memory=10**9)
    assert (448, "") not in offered(89, points=points, memory=10**9 - 1)


def test_grids_are_offered_where_the_config_has_them():
    pinpoints = subject(size=None, image_size=64, grid_pinpoints=[[128, 64], [192, 192]])
    points = [point(0, 64, 10, 25), point(0, 192, 50, 33)]
    # 2 x 1 tiles: 27 positions; 3 x 3: 34, and 33 were measured.
    assert offered(1000, pinpoints, points) == {(64, ""): True, (192, ""): True, (64, "2x1"): False}
    assert all(not grid for _, grid in offered(1000))


def test_the_side_that_it_was_trained_at():
    assert trained_side(choice().subject) == 1024
    assert trained_side(choice(image_size=512).subject) == 512
    assert trained_side(mine().subject) is None
