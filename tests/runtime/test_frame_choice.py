"""Which frames stand for a video, by numbers counted by hand and by searching all frames."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from fastvlm_mlx.frame_choice import CUT, choose_evenly, choose_scenes

TWELVE = range(12)


@pytest.mark.parametrize(
    ("count", "chosen"),
    [
        (1, [6]),  # the centre, 6.0, is where frame 6 begins
        (2, [3, 9]),
        (4, [1, 4, 7, 10]),  # centres 1.5, 4.5, 7.5, 10.5
        (5, [1, 3, 6, 8, 10]),  # 1.2, 3.6, 6.0, 8.4, 10.8
        (11, [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]),
        (12, list(TWELVE)),
        (100, list(TWELVE)),
    ],
)
def test_evenly(count, chosen):
    assert choose_evenly(TWELVE, 12, count) == chosen


def test_frames_that_do_not_last_equally_long():
    # Until 1000: the centres of three parts are 166, 500 and 833; frame 600 is seen from 600 to 900.
    assert choose_evenly([0, 100, 300, 600, 900], 1000, 3) == [100, 300, 600]
    # Frame 20 is seen at both centres, 250 and 750.
    assert choose_evenly([0, 10, 20, 900], 1000, 2) == [20]
    assert choose_evenly([0, 10, 20, 900], 1000, 4) == [0, 10, 20, 900]


def test_a_video_that_begins_late():
    assert choose_evenly([n + 1000 for n in TWELVE], 1012, 4) == [1001, 1004, 1007, 1010]


@pytest.mark.parametrize("seed", range(50))
def test_evenly_against_a_search_of_all_frames(seed):
    dice = random.Random(seed)
    *times, end = sorted(dice.sample(range(1000), dice.randrange(3, 40)))
    count = dice.randrange(1, len(times))
    chosen = set()
    for part in range(count):
        centre = times[0] + Fraction(2 * part + 1, 2 * count) * (end - times[0])
        chosen |= {begin for begin, after in zip(times, [*times[1:], end], strict=True) if begin <= centre < after}
    assert choose_evenly(times, end, count) == sorted(chosen)


def changes(**at: float) -> list[float]:
    """Of twelve frames, by number: f5=0.5."""
    return [at.get(f"f{number}", 0.01) for number in TWELVE]


@pytest.mark.parametrize(
    ("count", "cuts", "chosen"),
    [
        (1, {"f5": 0.5}, [0]),
        (3, {"f5": 0.5, "f8": 0.3}, [0, 5, 8]),
        (3, {"f2": 0.2, "f5": 0.5, "f8": 0.3}, [0, 5, 8]),  # the weakest is left out
        (3, {"f2": 0.3, "f5": 0.3, "f8": 0.3}, [0, 2, 5]),  # of equal ones the earliest
        (2, {"f0": 0.9, "f7": CUT}, [0, 7]),  # the first frame is no cut
        (3, {"f7": CUT - 1e-9}, [0, 4, 8]),  # no cut at all: thirds begin at 0, 4, 8
        # Scenes of 8 and 4 frames: with 2 frames the first has 4 to each, as the other, and comes before it.
        (4, {"f8": 0.5}, [0, 2, 5, 8]),  # 3 and 1: parts of the first begin at 0, 2.67, 5.33
        (3, {"f8": 0.5}, [0, 4, 8]),
        (5, {"f8": 0.5}, [0, 2, 5, 8, 10]),
        (12, {"f8": 0.5}, list(TWELVE)),
        (40, {}, list(TWELVE)),
    ],
)
def test_scenes(count, cuts, chosen):
    assert choose_scenes(TWELVE, 12, changes(**cuts), count) == chosen


def test_a_scene_gets_no_more_frames_than_it_has():
    # One picture for 900, then five for 20 each: all others are those seen at 900, 925, 950 and 975.
    times = [0, 900, 920, 940, 960, 980]
    assert choose_scenes(times, 1000, [0, 0.5, 0, 0, 0, 0], 5) == [0, 900, 920, 940, 960]
