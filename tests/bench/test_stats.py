"""Medians and ends against values worked out by hand."""

from __future__ import annotations

import pytest

from fastvlm_bench.stats import Spread, spread


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
