"""Grids, layouts and merges of tiles, by hand; and what can't be."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import ConfigError, ContextLengthError, FastVLMError, InputError, ResolutionError
from fastvlm_mlx.image import preprocess
from fastvlm_mlx.views import View, view_of
from fastvlm_mlx.vision.anyres import Layout, choose_grid, cut, merge, parse_grid

SQUARES = [(100, 200), (200, 100), (200, 200)]


@pytest.mark.parametrize(
    ("size", "best"),
    [
        ((400, 200), (200, 100)),  # as large in 200 x 200, which has more padding
        ((100, 300), (100, 200)),
        ((300, 300), (200, 200)),
        ((10, 10), (100, 200)),  # all of it fits anywhere: the least padding, the first of two
        ((3000, 1), (100, 200)),  # nothing is left of it anywhere
    ],
)
def test_the_grid_that_suits_a_picture_best(size, best):
    assert choose_grid(size, SQUARES) == best


@pytest.mark.parametrize(
    ("columns", "rows", "size", "lines", "kept"),
    [
        (2, 2, (100, 100), range(8), range(8)),
        (2, 2, (100, 50), range(2, 6), range(8)),
        (2, 2, (50, 100), range(8), range(2, 6)),
        (2, 2, (80, 50), range(1, 7), range(8)),  # five lines are picture: of the other three, one goes on each side
        (3, 1, (1000, 1), range(2, 2), range(12)),
    ],
)
def test_padding_is_left_out(columns, rows, size, lines, kept):
    layout = Layout(columns, rows, 256, "spatial_unpad", size)
    assert layout.kept() == (lines, kept)
    assert layout.tokens == 16 + len(lines) * (len(kept) + 1)
    assert dataclasses.replace(layout, merge="spatial").tokens == 16 * (columns * rows + 1)


def numbered(layout: Layout) -> mx.array:
    """(T, N, 1) embeddings, each of which is its place's number."""
    n = (layout.side // 64) ** 2
    return mx.arange(layout.tiles * n, dtype=mx.float32).reshape(layout.tiles, n, 1)


@pytest.mark.parametrize(
    ("kind", "size", "order"),
    [
        ("flat", (2, 1), list(range(12))),
        ("spatial", (2, 1), [0, 1, 2, 3, 4, 5, 8, 9, 6, 7, 10, 11]),
        ("spatial_unpad", (2, 1), [0, 1, 2, 3, 4, 5, 8, 9, -1, 6, 7, 10, 11, -1]),
        ("spatial_unpad", (1, 1), [0, 1, 2, 3, 5, 8, -1, 7, 10, -1]),
    ],
)
def test_the_order_of_positions(kind, size, order):
    """A tile of 2 x 2 positions beside another one, after the whole picture."""
    layout = Layout(2, 1, 128, kind, size)
    found = merge(numbered(layout), layout, mx.array([-1.0]))
    assert found.reshape(-1).tolist() == order
    assert layout.tokens == len(order)


@pytest.mark.parametrize(("kind", "order"), [("flat", [0, 1]), ("spatial", [0, 1]), ("spatial_unpad", [0, 1, -1])])
def test_a_single_tile(kind, order):
    tile = mx.arange(2, dtype=mx.float32).reshape(1, 2, 1)
    assert merge(tile, Layout(1, 1, 64, kind, (1, 1)), mx.array([-1.0])).reshape(-1).tolist() == order


def test_a_line_break_that_is_not_there():
    layout = Layout(1, 1, 64, "spatial_unpad", (1, 1))
    with pytest.raises(ConfigError, match="have no image_newline to end their lines with; convert a checkpoint"):
        merge(numbered(layout), layout, None)


def test_a_side_that_rounding_would_make_too_large():
    """2998 * (768 / 2998) is a little above 768 in floating point."""
    found = cut(Image.new("RGB", (2998, 2998), "white"), Layout(1, 1, 768, "flat", (2998, 2998)))
    assert found.shape == (2, 768, 768, 3)
    assert found.min() == 255


def test_a_narrow_picture_s_columns_are_cut_off_not_rounded():
    layout = Layout(2, 2, 256, "spatial_unpad", (59, 100))  # 4.72 of 8 columns: 4, so 2 go on each side
    assert layout.kept() == (range(8), range(2, 6))


def test_tiles_of_a_picture_that_is_narrower_than_its_grid():
    """Four columns of one colour each, two of them padding."""
    picture = Image.fromarray(np.array([[[200, 0, 0], [0, 200, 0]]], np.uint8)).resize((128, 128), Image.NEAREST)
    found = cut(picture, Layout(2, 1, 128, "flat", (128, 128)))
    assert found.shape == (3, 128, 128, 3)
    assert not found[1][:, :64].any()
    assert not found[2][:, 64:].any()
    np.testing.assert_array_equal(found[0], np.asarray(picture))
    np.testing.assert_array_equal(np.concatenate([found[1][:, 64:], found[2][:, :64]], axis=1), np.asarray(picture))


@pytest.mark.parametrize("text", ["2", "2x", "x2", "0x2", "2x0", "2X2", "2x2 ", "-1x2", "1000x1", "", 2, (2, 2)])
def test_what_is_no_grid(text):
    with pytest.raises(InputError, match='grid must be COLUMNSxROWS, each from 1 to 999, such as "2x2"; got'):
        parse_grid(text)


def test_a_single_square_has_no_tiles():
    with pytest.raises(InputError, match="'anyres' makes tiles; use"):
        preprocess(np.zeros((9, 9, 3), np.uint8), 64, "anyres")


BROKEN: list[tuple[dict[str, object], dict[str, object], type[FastVLMError], str]] = [
    ({}, {"grid": "4x1"}, InputError, "the model's grids are 1x2, 2x1, 2x2, 3x1, 1x3, not 4x1; choose one of them"),
    (
        {},
        {"grid": "2x2", "aspect": "pad"},
        InputError,
        "for aspect 'anyres', and aspect is 'pad'; leave one of them out",
    ),
    ({"aspect": "pad"}, {"grid": "2x2"}, InputError, "aspect is 'pad'; give aspect 'anyres', too"),
    ({}, {"side": 100}, ResolutionError, "got 100"),
    ({}, {"aspect": "tiles"}, InputError, "aspect must be one of pad, crop, stretch, native, anyres"),
    ({"grid_pinpoints": ()}, {}, InputError, "this model has no grids of its own; say which one"),
    ({"grid_pinpoints": ((256, 500),)}, {}, ConfigError, "256 x 500 px, no grid of whole tiles of the model's 256 px"),
    ({"grid_pinpoints": ((300, 512),)}, {}, ConfigError, "300 x 512 px"),
    ({"grid_pinpoints": ((0, 256),)}, {}, ConfigError, "0 x 256 px"),
    ({"image_newline": False}, {}, ConfigError, "'spatial_unpad', and the weights have no image_newline"),
    ({"patch_merge_type": "pile"}, {}, ConfigError, "patch_merge_type is 'pile'; this version knows flat, spatial,"),
]


@pytest.mark.parametrize(("change", "view", "error", "message"), BROKEN)
def test_bad_views(bundle, change, view, error, message):
    config = dataclasses.replace(ModelConfig.from_file(bundle("tiny-newline") / "config.json"), **change)
    with pytest.raises(error, match=message) as caught:
        view_of(config, **({"side": 256} | view))
    assert "\n" not in str(caught.value)


def test_a_grid_that_fills_the_context():
    """Counted as the picture takes it, before it is cut."""
    view = View(1024, "anyres", ((6, 6),), "spatial_unpad", 8192)
    assert view.layout((1600, 900)).tokens == 256 + 54 * 97
    with pytest.raises(
        ContextLengthError, match="has 9568 positions in 6x6 tiles of 1024 px, the model's context is 8192"
    ):
        view.layout((900, 900))
    exact = View(64, "anyres", ((2, 2),), "flat", 5)
    with pytest.raises(ContextLengthError, match="has 5 positions"):
        exact.pixels(Image.new("RGB", (9, 9)))
    assert dataclasses.replace(exact, context=6).layout((9, 9)).tokens == 5


def test_views(bundle):
    config = ModelConfig.from_file(bundle("tiny-newline") / "config.json")
    assert config.aspect == "anyres"
    most = config.context_length
    whole = View(128, "anyres", ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3)), "spatial_unpad", most)
    assert view_of(config, 128) == whole
    assert view_of(config, np.int64(128), grid="3x1") == View(128, "anyres", ((3, 1),), "spatial_unpad", most)
    assert type(view_of(config, np.int64(128), "pad").side) is int
    assert view_of(config, 128, "crop") == View(128, "crop")
    assert whole.tokens is None
    assert whole.layout((10, 10)) == Layout(1, 2, 128, "spatial_unpad", (10, 10))
    assert View(128, "crop").tokens == 4
    assert View(128, "crop").layout((10, 10)) is None
