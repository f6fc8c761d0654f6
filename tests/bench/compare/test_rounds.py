"""Who is asked what and when, and who is taken out."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from fastvlm_bench.compare.plan import Plan, Requests
from fastvlm_bench.compare.process import SideError
from fastvlm_bench.compare.rivals import OURS, RIVALS
from fastvlm_bench.compare.rounds import Comparison, Leg, legs, rotate
from fastvlm_mlx.errors import InputError, ResolutionError
from support.fake_side import POSITIONS, answer


class FakeSide:
    """`support.fake_side` without a process; keeps what it was asked in a list that all share."""

    def __init__(self, name, log, **behaviour):
        self.name, self.log, self.behaviour = name, log, behaviour
        self.number = -1

    def request(self, request):
        self.number += 1
        self.log.append((self.name, request))
        if self.number == self.behaviour.get("dies_at"):
            raise SideError(f"{self.name} ended with exit code 1: gone")
        answers = [answer(request, self.behaviour, self.number, i) for i in range(len(request["tokens"]))]
        return {"answers": answers, "peak_rss_bytes": 1}


class Asked(Requests):
    """Requests whose pictures aren't drawn."""

    def picture(self, index, resolution):
        return Path(f"{resolution}-{index}.jpg")


def compare(rivals, plan, **behaviours):
    """The outcome, and all requests in order."""
    log = []
    workers = {name: FakeSide(name, log, **behaviours.get(name.replace("-", "_"), {})) for name in (OURS, *rivals)}
    return Comparison(workers, plan, Asked(plan, Path())).run(), log


def test_each_rival_is_asked_its_kind_and_we_every_kind():
    ours, theirs = Leg(OURS, "picture"), Leg("mlx-vlm", "picture")
    assert legs(["mlx-vlm"]) == [ours, theirs]
    assert legs(["mlx-lm"]) == [Leg(OURS, "text"), Leg("mlx-lm", "text")]
    assert legs(RIVALS) == [
        *(ours, theirs, Leg("transformers", "picture")),
        *(Leg(OURS, "text"), Leg("mlx-lm", "text")),
    ]
    assert legs([]) == []


def test_every_side_is_first_as_often():
    items = legs(RIVALS)
    orders = [rotate(items, index) for index in range(len(items))]
    assert [order[0] for order in orders] == items
    assert all(set(order) == set(items) for order in orders)
    assert rotate(items, len(items)) == items


def test_sides_take_turns_request_by_request():
    outcome, log = compare(["mlx-vlm", "transformers"], Plan((64, 128), runs=3))
    sides = (OURS, "mlx-vlm", "transformers")
    expected = []
    for side in (64, 128):  # how long a question is; then the check, the last in turn first
        expected += [(OURS, f"{side}--1.jpg"), *((name, f"{side}--1.jpg") for name in (sides[2], *sides[:2]))]
    for index, side in itertools.product(range(3), (64, 128)):
        expected += [(name, f"{side}-{index}.jpg") for name in (*sides[index:], *sides[:index])]
    assert [(name, request["image"]) for name, request in log] == expected
    assert [(run.side, run.resolution, run.round) for run in outcome.runs] == [
        (name, side, index)
        for index, side in itertools.product(range(3), (64, 128))
        for name in (*sides[index:], *sides[:index])
    ]
    assert [run.place for run in outcome.runs] == [0, 1, 2] * 6


def test_a_text_is_as_long_as_the_question_and_new_each_round():
    _, log = compare(["mlx-lm"], Plan((64, 128), runs=2, max_tokens=5))
    texts = [request for _, request in log if "ids" in request]
    assert all(len(request["ids"]) == POSITIONS for request in texts)
    assert all(request["tokens"] == [5] for request in texts)
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    assert all(ours["ids"] == theirs["ids"] for ours, theirs in pairs)
    assert len({tuple(ours["ids"]) for ours, _ in pairs}) == len(pairs) == 6


def test_what_is_kept_of_a_run():
    times = {"ttft_s": [9, 9, 0.5], "second_ttft_s": [9, 9, 0.25], "decode_s": [9, 9, 3.0]}
    outcome, _ = compare(["mlx-vlm"], Plan((64,), runs=1, max_tokens=20), fastvlm_mlx=times)
    run = next(run for run in outcome.runs if run.side == OURS)
    assert (run.ttft_s, run.second_ttft_s, run.decode_s, run.decode_tokens) == (0.5, 0.25, 3.0, 19)
    assert (len(run.ids), len(run.second_ids), run.positions) == (20, 16, POSITIONS)
    assert outcome.positions == {64: POSITIONS}
    assert outcome.failures == {}


def test_a_side_with_other_answers_is_not_timed():
    outcome, log = compare(["mlx-vlm", "transformers"], Plan((64, 128), runs=2), mlx_vlm={"wrong_at": 0})
    assert {run.side for run in outcome.runs} == {OURS, "transformers"}
    assert list(outcome.failures) == ["mlx-vlm"]
    for part in (
        "mlx-vlm answers the second question at 64 px otherwise than fastvlm-mlx",
        "before anything was timed",
    ):
        assert part in outcome.failures["mlx-vlm"]
    assert [name for name, _ in log].count("mlx-vlm") == 1  # it isn't asked again


def test_only_a_short_answer_is_checked_to_its_end():
    """Of 32 tokens the last is never looked at: after a near tie, which rounding decides, answers part for good."""
    differing, _ = compare(["mlx-vlm"], Plan((64,), runs=1, max_tokens=16), mlx_vlm={"wrong_at": 0})
    assert "the first question at 64 px" in differing.failures["mlx-vlm"]
    assert "from token 16 on" in differing.failures["mlx-vlm"]
    second, _ = compare(["mlx-vlm"], Plan((64,), runs=1, max_tokens=17), mlx_vlm={"wrong_at": 0})
    assert "the second question at 64 px" in second.failures["mlx-vlm"]


def test_an_answer_that_differs_later_takes_all_times_away():
    outcome, _ = compare(["mlx-vlm", "transformers"], Plan((64,), runs=3), mlx_vlm={"wrong_at": 2})
    assert {run.side for run in outcome.runs} == {OURS, "transformers"}
    assert "(in round 2)" in outcome.failures["mlx-vlm"]
    assert len(outcome.runs) == 2 * 3


def test_a_side_that_dies_is_left_out():
    outcome, _ = compare(["mlx-vlm", "mlx-lm"], Plan((64,), runs=2), mlx_lm={"dies_at": 1})
    assert outcome.failures == {"mlx-lm": "mlx-lm ended with exit code 1: gone"}
    assert {run.side for run in outcome.runs} == {OURS, "mlx-vlm"}


def test_without_rivals_nothing_more_is_run():
    outcome, log = compare(["mlx-vlm"], Plan((64,), runs=5), mlx_vlm={"dies_at": 0})
    assert outcome.runs == []
    assert len(log) == 3  # the length, and the check of both


def test_our_own_end_is_the_end():
    with pytest.raises(SideError, match="fastvlm-mlx ended"):
        compare(["mlx-vlm"], Plan((64,), runs=2), fastvlm_mlx={"dies_at": 2})


def test_pictures_are_new_and_the_same_for_all(tmp_path):
    requests = Requests(Plan((64,)), tmp_path)
    first, again, other = (requests.picture(*which) for which in ((0, 64), (0, 64), (1, 64)))
    assert first == again
    assert first.read_bytes() != other.read_bytes()
    assert first.read_bytes()[:2] == b"\xff\xd8"  # a JPEG file


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"resolutions": (100,)}, ResolutionError, "multiple of 64"),
        ({"resolutions": (64, 64)}, InputError, "each resolution once"),
        ({"runs": 0}, InputError, "--runs must be at least 1, got 0"),
        ({"max_tokens": 1}, InputError, "--max-tokens must be at least 2, got 1"),
    ],
)
def test_a_plan_is_checked(arguments, error, message):
    with pytest.raises(error, match=message):
        Plan(**arguments)
