"""Medians and ends against values worked out by hand."""

from __future__ import annotations

import pytest

from fastvlm_bench.stats import LEAST_ROUNDS, Spread, apart, spread, verdict


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
