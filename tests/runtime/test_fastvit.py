"""Encoders with 32x downsampling in the run time: every place that counts positions; and shapes that can't be."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_bench.seeded_model import build, model_config
from fastvlm_mlx import FastVLM
from fastvlm_mlx.budget import apply_budget
from fastvlm_mlx.config import ModelConfig, VisionConfig, check_side, from_dict
from fastvlm_mlx.errors import ConfigError, ContextLengthError, EncoderError, InputError, ResolutionError
from fastvlm_mlx.latency import Grid, latencies
from fastvlm_mlx.loading import load_mlx_encoder
from fastvlm_mlx.measurements import parse_report
from fastvlm_mlx.pictures import picture_of
from fastvlm_mlx.speculation import check_draft
from fastvlm_mlx.views import View, view_of
from fastvlm_mlx.vision.anyres import Layout, merge
from fastvlm_mlx.vision.coreml import CoreMLVisionEncoder, FallbackEncoder
from fastvlm_mlx.vision.pooling import AveragePool, DepthwisePool
from fastvlm_mlx.vision_config import MultiScaleConfig
from support.reports import point, report, subject

FOUR = VisionConfig(
    128, (1, 1, 2, 1), (8, 16, 32, 64), 3, family="mci0", norm="batch", se_downsamples=(False, False, True, True)
)
PHOTO = np.random.default_rng(1).integers(0, 256, (90, 70, 3), np.uint8)
PROMPT = [5, -200, 6]


def with_vision(vision: VisionConfig) -> FastVLM:
    """A model of random weights with this encoder."""
    config = model_config("tiny")
    projector = dataclasses.replace(config.projector, input_dim=vision.feature_dim)
    return build(dataclasses.replace(config, vision=vision, projector=projector))


@pytest.fixture(scope="module")
def four() -> FastVLM:
    return with_vision(FOUR)


def test_older_configs_mean_fastvithd(bundle):
    data = {"image_size": 256, "layers": [1, 2, 2, 1, 1], "embed_dims": [16, 32, 64, 128, 256], "mlp_ratio": 4}
    found = from_dict(VisionConfig, data, "vision")
    assert found == ModelConfig.from_file(bundle("tiny") / "config.json").vision
    assert (found.family, found.downsampling, found.feature_dim) == ("fastvithd", 64, 512)
    assert [found.attends(stage) for stage in range(5)] == [False, False, False, True, True]
    assert not any(found.squeezes(stage) or found.pools(stage) for stage in range(5))


def test_the_shape_of_fastvit():
    assert (FOUR.downsampling, FOUR.feature_dim) == (32, 128)
    assert [FOUR.attends(stage) for stage in range(4)] == [False, False, False, True]
    assert [FOUR.squeezes(stage) for stage in range(4)] == [False, False, True, True]
    assert [FOUR.pooling_ratio(stage) for stage in range(4)] == [8, 4, 2, 1]
    data = from_dict(VisionConfig, dataclasses.asdict(FOUR) | {"layers": [1, 1, 2, 1], "embed_dims": [8, 16, 32, 64]}
                     | {"se_downsamples": [False, False, True, True]}, "vision")  # fmt: skip
    assert data == FOUR


@pytest.mark.parametrize(
    ("dim", "squeezed"), [(16, 8), (40, 8), (48, 16), (256, 64), (320, 80), (512, 128), (640, 160)]
)
def test_squeezed_channels(dim, squeezed):
    """A quarter, to the nearest multiple of 8, the larger one of two; 8 at least."""
    shape = VisionConfig(64, (1, 1, 1, 1), (8, dim, dim, dim), head_dim=dim, se_downsamples=(False, True, True, True))
    assert shape.squeezed_dim(1) == squeezed


WRONG = {
    "two stages": ({"layers": (1, 1), "embed_dims": (8, 16)}, "4 or 5 positive layers and as many positive embed_dims"),
    "six stages": ({"layers": (1,) * 6, "embed_dims": (8,) * 6}, "4 or 5 positive layers"),
    "five layers for four": ({"layers": (1,) * 5}, "as many positive embed_dims"),
    "a side of no whole positions": ({"image_size": 80}, "image_size must be a multiple of 32, got 80"),
    "another norm": ({"norm": "rms"}, "norm must be one of layer, batch, got 'rms'"),
    "too few squeezes": ({"se_downsamples": (False, True)}, "a value for each of the 4 stages"),
    "a squeeze in the first stage": ({"se_downsamples": (True, True, True, True)}, "the first one false"),
    "attention from nowhere": ({"attention_from": 5}, "attention_from must be a stage from 0 to 4, got 5"),
    "heads that don't divide": ({"attention_from": 1}, r"multiples of head_dim 32, got \(16, 32, 64\)"),
    "no hidden channels": ({"mlp_ratio": 0}, "mlp_ratio must be at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_impossible_shapes(case):
    change, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(FOUR, **change)


@pytest.mark.parametrize(
    ("pooling", "stages", "message"),
    [
        ("max", (0,), "one of average, depthwise, got 'max'"),
        ("average", (), "at least one stage, each once"),
        ("average", (1, 1), "at least one stage, each once"),
        ("average", (0, 3), r"before the last stage, from 0 to 2, got \(0, 3\)"),
        ("depthwise", (-1,), "before the last stage"),
    ],
)
def test_impossible_scales(pooling, stages, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(FOUR, multi_scale=MultiScaleConfig(pooling, stages))


def test_sides_before_a_model_is_known():
    """What some encoder takes passes; the advice is what all take."""
    for side in (32, 96, 1024):
        check_side(side)
    for side in (0, 16, 100):
        with pytest.raises(
            ResolutionError, match=r"must be a multiple of 64 pixels, got .*FastViT take multiples of 32, too"
        ):
            check_side(side)
    with pytest.raises(ResolutionError, match="must be a multiple of 32 pixels, got 100; the nearest are 96 and 128"):
        check_side(100, 32)
    with pytest.raises(ResolutionError, match="must be a multiple of 64 pixels, got 96"):
        check_side(96, 64)


def test_positions_of_a_picture(four):
    """(height / 32) x (width / 32), row-major, in the prompt and from the encoder."""
    assert four.encode_image(PHOTO, resolution=96).embeddings.shape == (9, 128)
    answer = four.generate(PHOTO, PROMPT, resolution=96, max_tokens=2, ignore_eos=True)
    assert (answer.image_tokens, answer.prompt_tokens) == (9, 11)
    assert picture_of(np.zeros((64, 96, 3), np.uint8), downsampling=32).tokens == 6
    assert view_of(four.config, 96) == View(96, downsampling=32)
    assert view_of(four.config, 96).tokens == 9


def test_a_picture_that_is_known_keeps_its_positions(four):
    """From the file's bytes, which the second time aren't decoded."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(PHOTO).save(file, "PNG")
    opened = [four.engine.vision.open(file.getvalue(), view_of(four.config, 96)) for _ in range(2)]
    assert [picture.tokens for picture in opened] == [9, 9]
    assert opened[0].digest == opened[1].digest


@pytest.mark.parametrize(
    ("how", "positions"), [({}, 4), ({"aspect": "anyres", "grid": "2x1"}, 3 * 4)], ids=["whole", "tiles"]
)
def test_chats_and_their_files(default_model, tmp_path, how, positions):
    """A picture that comes back from a file takes the same positions."""
    config = default_model.config
    projector = dataclasses.replace(config.projector, input_dim=FOUR.feature_dim)
    bare = build(dataclasses.replace(config, vision=FOUR, projector=projector))
    model = FastVLM(bare.config, bare.engine, default_model.tokenizer, 128)
    chat = model.chat(PHOTO, resolution=64, **how)
    first = chat.ask("What?", max_tokens=3, ignore_eos=True)
    assert (first.image_tokens, chat.pictures[0].tokens) == (positions, positions)
    chat.save(tmp_path / "talk.json")
    model.clear_cache()
    again = model.load_chat(tmp_path / "talk.json")
    assert (again.pictures[0].tokens, again.pictures[0].digest) == (positions, chat.pictures[0].digest)
    options = {"max_tokens": 3, "ignore_eos": True}
    assert again.ask("And?", **options).token_ids == chat.ask("And?", **options).token_ids


@pytest.mark.parametrize(
    ("merge_type", "positions"), [("flat", 5 * 9), ("spatial", 5 * 9), ("spatial_unpad", 9 + 6 * 7)]
)
def test_tiles(four, merge_type, positions):
    layout = Layout(2, 2, 96, merge_type, (50, 50), downsampling=32)
    assert layout.tokens == positions
    merged = merge(mx.zeros((5, 9, 4)), layout, mx.ones(4))
    assert merged.shape == (positions, 4)


def test_tiles_end_to_end(four):
    answer = four.generate(PHOTO, PROMPT, resolution=64, aspect="anyres", grid="2x1", max_tokens=1, ignore_eos=True)
    assert answer.image_tokens == 3 * 4
    with pytest.raises(ContextLengthError, match="8109 positions in 30x30 tiles of 96 px"):
        view_of(dataclasses.replace(four.config, context_length=8000), 96, "anyres", "30x30").layout((640, 480))


def test_sides_that_a_budget_chooses_from(four, monkeypatch):
    asked = []

    def answer(self, *_, resolution, **__):
        asked.append(resolution)
        raise InputError("stop")

    monkeypatch.setattr(FastVLM, "generate", answer)
    monkeypatch.setattr(four, "resolution", 160)
    with pytest.raises(InputError, match="stop"):
        apply_budget(four, 1.0)
    assert asked == [96], "the middle one of 32, 64, 96, 128 and 160"


def test_a_draft_must_make_the_same_positions(four, default_model):
    class SameTokenizer:
        def same_as(self, _):
            return True

    model = with_vision(VisionConfig(256, (1, 1, 1, 1, 1), (8, 16, 32, 64, 64)))
    for one in (four, model):
        one.tokenizer = SameTokenizer()
    try:
        with pytest.raises(InputError, match="a position of 32 pixels a side, the model of 64; choose a draft"):
            check_draft(model, four, (), [picture_of(PHOTO)])
        check_draft(model, four, (), [])  # text is text
    finally:
        four.tokenizer = model.tokenizer = None


def test_measured_times_of_32_pixels():
    """128 px: 16 + 24 positions; 192 px: 36 + 24. Half way: 26 image tokens, no side; 160 px has 25."""
    points = [point(0, 128, 10, 20), point(0, 192, 30, 40)]
    for entry, side in zip(points, (128, 192), strict=True):
        entry |= {"image_tokens": (side // 32) ** 2, "prompt_tokens": (side // 32) ** 2 + 24}
    data = report([subject(downsampling=32)], points)
    ((found, latency),) = latencies([parse_report(data, "here")]).items()
    assert found.downsampling == 32
    assert latency.resolutions == [128, 192]
    assert latency.estimate(160).ttft.median == pytest.approx(10 + 20 * 9 / 20 + 20 + 20 * 9 / 20)
    assert latency.estimate_grid(128, Grid(1, 1)) is not None
    assert Grid(2, 2, line_breaks=True).tokens(96, 32) == 9 + 6 * 7
    ((_, none),) = latencies([parse_report(report([subject()], points), "here")]).items()
    assert none.resolutions == [], "of FastViTHD these would be tiles"


def test_core_ml_checks_its_own_sides(tmp_path):
    """A package of FastViT lacks a size of 96 px; one of FastViTHD couldn't have it."""

    class Runtime:
        def functions(self, package):
            return []

    (tmp_path / "x").mkdir()
    with pytest.raises(ResolutionError, match=r"takes images of .* px, not 96 x 96"):
        CoreMLVisionEncoder(tmp_path / "x", Runtime(), downsampling=32).encode(np.zeros((1, 96, 96, 3), np.uint8))
    package = CoreMLVisionEncoder(tmp_path / "x", Runtime())
    with pytest.raises(ResolutionError, match="multiple of 64 pixels, got 96"):
        FallbackEncoder(package, lambda: pytest.fail("tried MLX")).encode(np.zeros((1, 96, 96, 3), np.uint8))


def test_pools():
    """By numpy, square by square, on a rectangle."""
    x = np.random.default_rng(2).normal(size=(2, 8, 12, 3)).astype(np.float32)
    squares = x.reshape(2, 2, 4, 3, 4, 3)
    np.testing.assert_allclose(np.array(AveragePool(4)(mx.array(x))), squares.mean((2, 4)), atol=1e-6)
    pool = DepthwisePool(3, 4)
    assert pool.weight.shape == (3, 4, 4, 1)
    pool.weight = mx.random.normal(pool.weight.shape)
    pool.bias = mx.array([1.0, 2.0, 3.0])
    kernel = np.array(pool.weight)[..., 0]
    right = np.einsum("bhywxc,cyx->bhwc", squares, kernel) + np.array([1, 2, 3])
    np.testing.assert_allclose(np.array(pool(mx.array(x))), right, atol=1e-5)


def test_a_bundle_without_an_encoder_says_so(four):
    class Bundle:
        path, config = "here", dataclasses.replace(four.config, vision=None)

    assert Bundle.config.downsampling == 64, "Apple's exports are of FastViTHD"
    with pytest.raises(EncoderError, match="has no vision weights for MLX"):
        load_mlx_encoder(Bundle, mx.float32)
