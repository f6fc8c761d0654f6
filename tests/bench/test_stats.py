"""Medians and ends against values worked out by hand."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from fastvlm_bench.stats import LEAST_ROUNDS, LEAST_RUNS, Spread, apart, spread, verdict


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], Spread(7.0, 7.0, 7.0)),
        ([5.0, 1.0, 9.0], Spread(5.0, 1.0, 9.0)),
        ([4.0, 1.0, 2.0, 100.0], Spread(3.0, 1.0, 100.0)),
        ([2.0, 2.0, 8.0, 1.0, 3.0], Spread(2.0, 1.0, 8.0)),
    ],
)
def test_spread(values, expected):
    assert spread(values) == expected


def test_order_does_not_matter_and_stays():
    values = [3.0, 1.0, 2.0]
    assert spread(values) == spread(sorted(values))
    assert values == [3.0, 1.0, 2.0]


def test_nothing_has_no_median():
    with pytest.raises(ValueError, match="at least one value"):
        spread([])


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([1.2, 1.1, 1.3, 1.2, 1.4, 1.01], "ours faster in every round"),
        ([0.9, 0.8, 0.99, 0.7, 0.9, 0.9], "mlx-vlm faster in every round"),
        ([3.0, 3.0, 3.0, 3.0, 3.0, 0.99], "no difference shown"),
        ([3.0, 3.0, 3.0, 3.0, 3.0, 1.0], "no difference shown"),
        ([3.0, 3.0, 3.0, 3.0, 3.0], "fewer than 6 rounds show nothing"),
        ([0.9, 1.1], "no difference shown"),
    ],
)
def test_no_more_is_said_than_the_rounds_support(ratios, said):
    assert verdict(ratios, "ours", "mlx-vlm") == said


def test_the_least_number_of_rounds_is_hardly_chance():
    assert 2 * 0.5**LEAST_ROUNDS < 0.05 <= 2 * 0.5 ** (LEAST_ROUNDS - 1)


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (Spread(10, 9, 11), Spread(12.1, 12, 13), True),
        (Spread(10, 9, 11), Spread(12.0, 12, 13), False),  # as far apart as the spread is wide
        (Spread(10, 9, 11), Spread(15.0, 10, 17), False),
        (Spread(10, 6, 12), Spread(15.0, 15, 15), False),
        (Spread(10, 6, 12), Spread(16.1, 16, 17), True),
        (Spread(10, 10, 10), Spread(10, 10, 10), False),
    ],
)
def test_measurements_are_apart_by_more_than_the_wider_spread(one, other, said):
    assert apart(one, other) is said
    assert apart(other, one) is said


RECORDED = json.loads((Path(__file__).parent / "recorded" / "repeated.json").read_text())["figures"]


def share_apart(one: list[list[float]], other: list[list[float]] | None = None) -> float:
    """Of all pairs of processes: those whose medians are further apart than their spreads are wide."""
    first = [spread(values) for values in one]
    pairs = itertools.product(first, map(spread, other)) if other else itertools.combinations(first, 2)
    found = [apart(*pair) for pair in pairs]
    return sum(found) / len(found)


@pytest.mark.parametrize("figure", RECORDED)
def test_two_runs_of_one_case_differ_by_less_than_the_spread_19_times_in_20(figure):
    processes = RECORDED[figure]
    assert len(processes) == 24
    assert {len(values) for values in processes} == {LEAST_RUNS}
    assert share_apart(processes) <= 0.05


def test_fewer_runs_would_not_do():
    assert max(share_apart([values[:5] for values in processes]) for processes in RECORDED.values()) > 0.05


@pytest.mark.parametrize("figure", ["ttft_ms at 256 px", "ttft_ms at 512 px"])
def test_twice_the_time_is_mostly_seen(figure):
    processes = RECORDED[figure]
    assert share_apart(processes, [[2 * value for value in values] for values in processes]) > 0.8
