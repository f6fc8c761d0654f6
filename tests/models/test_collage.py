"""Photographs behind training's scenes: changed, with pieces of others on them; the held-out one stays as it is."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from PIL import Image

from nano.backdrops import Backdrop, draw_backdrop
from nano.collage import MOST, ORDERS, PLAIN, Look, Piece, cropped, paste
from nano.planning import Plan
from nano.scenes import make_scene
from nano.vocabulary import BACKGROUNDS, HELD_OUT_PHOTOGRAPHS, PHOTOGRAPH, TRAIN_PHOTOGRAPHS
from support.plans import planned

RED = Image.new("RGB", (8, 8), (200, 40, 10))
DISC = Piece("", False, PLAIN, (0.0, 0.0, 1.0), 0.5, 0.5, 0.25, 0.25, 0.0, (), 0.0)


def photographed(split: str) -> list[Plan]:
    plans = [planned(seed, split)[0] for seed in range(400)]
    return [plan for plan in plans if plan.backdrop.photograph]


def colour(picture: Image.Image) -> tuple[int, ...]:
    (found,) = {tuple(pixel) for pixel in np.asarray(picture).reshape(-1, 3).tolist()}
    return found


def test_only_training_changes_photographs_and_with_its_own_alone() -> None:
    held_out, training = photographed("held-out"), photographed("train")
    assert {plan.backdrop.photograph for plan in held_out} == {*TRAIN_PHOTOGRAPHS, *HELD_OUT_PHOTOGRAPHS}
    assert all(plan.backdrop.look == PLAIN and not plan.backdrop.pieces for plan in held_out)
    pieces = [plan.backdrop.pieces for plan in training]
    assert {piece.photograph for found in pieces for piece in found} == set(TRAIN_PHOTOGRAPHS)
    assert {len(found) for found in pieces} >= set(range(MOST + 1))
    looks = [plan.backdrop.look for plan in training]
    assert {look.quarters for look in looks} == set(range(4))
    assert {look.order for look in looks} == set(ORDERS)
    assert {look.inverted for look in looks} == {True, False}


def test_held_out_scenes_ask_what_they_always_asked() -> None:
    """Of the hundred first of the card's table: with other draws, two models' figures couldn't be compared."""
    asked = [(q.kind, q.prompt, q.answer) for seed in range(1000, 1100) for q in planned(seed, "held-out")[1]]
    assert hashlib.sha256(repr(asked).encode()).hexdigest()[:16] == "07c456e759689511"


def test_a_look_turns_permutes_tints_and_inverts() -> None:
    assert colour(PLAIN.of(RED)) == (200, 40, 10)
    assert colour(Look(order=(1, 2, 0)).of(RED)) == (40, 10, 200)
    assert colour(Look(gains=(0.5, 1.0, 2.0)).of(RED)) == (100, 40, 20)
    assert colour(Look(gains=(2.0, 1.0, 1.0)).of(RED)) == (255, 40, 10)
    assert colour(Look(inverted=True).of(RED)) == (55, 215, 245)
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    for quarters in range(4):
        turned = np.asarray(Look(quarters=quarters).of(picture))
        assert np.array_equal(turned, np.rot90(np.asarray(picture), quarters)), quarters


@pytest.mark.parametrize("side", [64, 256])
def test_a_piece_covers_its_outline_and_nothing_else(side: int) -> None:
    for piece in (
        DISC,
        replace(DISC, x=0.1, y=0.95),
        replace(DISC, width=0.3, height=0.1, angle=90.0),
        replace(DISC, waves=((0.2, 0.0), (0.1, 1.0))),
    ):
        picture = Image.new("RGB", (side, side))
        paste(picture, piece, lambda name, mirrored: Image.new("RGB", (50, 40), (200, 40, 10)))
        painted = np.asarray(picture)[..., 0] > 100
        middles = (np.arange(side) + 0.5) / side
        right, down = middles[None] - piece.x, middles[:, None] - piece.y
        width, height = (piece.width, piece.height) if piece.angle == 0 else (piece.height, piece.width)
        reach = np.hypot(right / width, down / height)
        most = 1 + sum(depth for depth, _ in piece.waves)
        assert not painted[reach > most + 4 / side / min(width, height)].any()
        assert painted[reach < 2 - most - 4 / side / min(width, height)].all()
        assert painted.any()


def test_a_crop_is_the_part_that_it_names() -> None:
    ramp = np.arange(200, dtype=np.uint8)[None, :, None]
    picture = Image.fromarray(np.broadcast_to(ramp, (100, 200, 3)).copy())
    whole, last = cropped(picture, (0.0, 0.0, 1.0), 50), cropped(picture, (1.0, 0.0, 0.5), 50)
    assert whole.size == last.size == (50, 50)
    assert np.asarray(whole)[..., 0].min() < 3
    assert np.asarray(whole)[..., 0].max() in range(96, 101)
    assert np.asarray(last)[..., 0].min() in range(149, 153)
    assert np.asarray(last)[..., 0].max() > 196


def test_what_lies_on_a_photograph_is_in_the_picture() -> None:
    plain = Backdrop(BACKGROUNDS.index(PHOTOGRAPH), photograph="chelsea")
    piece = replace(DISC, photograph="rocket", crop=(0.5, 0.5, 0.2))
    before, after = (np.asarray(draw_backdrop(b, 128), np.int64) for b in (plain, replace(plain, pieces=(piece,))))
    changed = np.abs(before - after).max(-1) > 0
    assert changed[48:80, 48:80].mean() > 0.9
    assert not changed[:20].any()
    turned = np.asarray(draw_backdrop(replace(plain, look=Look(quarters=1)), 128))
    assert np.array_equal(turned, np.rot90(before))


def test_a_changed_scene_is_the_same_for_every_side() -> None:
    seed = next(seed for seed in range(400) if planned(seed, "train")[0].backdrop.pieces)
    small, large = (make_scene(seed, side=side).image for side in (128, 256))
    reduced = np.asarray(Image.fromarray(large).reduce(2), np.int64)
    assert np.abs(reduced - small).mean() < 12
