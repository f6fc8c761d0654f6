"""aspect="native": the picture's own shape instead of black bars."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import FastVLM
from fastvlm_mlx.cache import PrefixCache
from fastvlm_mlx.cli import main
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import ContextLengthError, InputError, ResolutionError
from fastvlm_mlx.image import native_size, preprocess
from fastvlm_mlx.pictures import Vision
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.types import IMAGE_TOKEN_ID
from fastvlm_mlx.vision.coreml import CoreMLVisionEncoder
from fastvlm_mlx.vision.coreml_runtime import Function
from support.work import counted

PROMPT = [11, 12, IMAGE_TOKEN_ID, 13]
SHORT = {"max_tokens": 4, "ignore_eos": True}


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("size", "longest", "right"),
    [
        ((1920, 1080), 1024, (1024, 576)),  # 16:9 fits exactly: 16 x 9 tokens
        ((1080, 1920), 1024, (576, 1024)),
        ((1600, 1200), 1024, (1024, 768)),
        ((3000, 2000), 1024, (1024, 704)),  # 682.7 is 10.7 tokens
        ((1000, 650), 1024, (1024, 704)),  # 665.6 is 10.4 tokens
        ((1920, 1081), 1024, (1024, 576)),  # one line more doesn't cost a row of tokens
        ((1024, 652), 1024, (1024, 640)),  # 10.19 tokens: the picture gets 1.9 % smaller
        ((1024, 653), 1024, (1024, 704)),  # 10.20: that were more than 2 %
        ((1366, 768), 1024, (1024, 576)),  # 575.7
        ((128, 96), 128, (128, 128)),
        ((1024, 65), 1024, (1024, 64)),
        ((1024, 95), 1024, (1024, 128)),
        ((9000, 10), 1024, (1024, 64)),
        ((77, 77), 256, (256, 256)),
    ],
)
def test_the_size(size, longest, right):
    assert native_size(size, longest) == right


def test_a_shape_that_fits_is_what_padding_shows_without_its_bars():
    picture = noise(512, 256)
    found = preprocess(picture, 256, "native")
    assert found.shape == (128, 256, 3)
    padded = preprocess(picture, 256, "pad")
    # Bicubic mixes the bars into the lines next to them: 2 px of the source to each side of a pixel, at half scale.
    np.testing.assert_array_equal(found[2:-2], padded[66:190])
    assert not padded[:62].any()


@pytest.mark.parametrize(
    ("resolution", "downsampling", "right"),
    [
        (96, None, (64, 96, 3)),  # 54 of 96: multiples of 32
        (160, None, (96, 160, 3)),  # 90
        (1056, None, (608, 1056, 3)),  # 594
        (128, None, (128, 128, 3)),  # 72: multiples of 64
        (128, 32, (96, 128, 3)),
        (1024, 64, (576, 1024, 3)),
        (1024, 32, (576, 1024, 3)),
    ],
)
def test_the_longer_side_is_what_was_asked_for(resolution, downsampling, right):
    assert preprocess(noise(160, 90), resolution, "native", downsampling).shape == right


def test_a_side_that_is_not_of_whole_positions():
    with pytest.raises(ResolutionError, match="resolution must be a multiple of 64 pixels, got 96"):
        preprocess(noise(160, 90), 96, "native", 64)


def test_no_aspect_is_not_the_default(default_model):
    with pytest.raises(InputError, match=r"aspect must be one of pad, .*, got ''"):
        default_model.generate(noise(9, 9), PROMPT, aspect="")


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((320, 180), (0, 24, 256, 168)),  # 144 of 192 lines
        ((180, 320), (24, 0, 168, 256)),
        ((300, 160), (0, 27, 256, 164)),  # 136.5 of 192
        ((256, 130), (2, 0, 254, 128)),  # 2.03 tokens: 128 lines, and so 252 columns
        ((300, 1), (0, 31, 256, 32)),  # a line stays one
    ],
)
def test_a_shape_that_does_not_fit_keeps_its_proportions(size, box):
    """As large as it fits, centred on black."""
    picture = noise(*size)
    left, top, right, bottom = box
    found = preprocess(picture, 256, "native")
    inside = np.asarray(picture.resize((right - left, bottom - top), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(found[top:bottom, left:right], inside)
    outside = found.copy()
    outside[top:bottom, left:right] = 0
    assert not outside.any()


def test_positions_and_features(default_model):
    model, wide = default_model, noise(160, 90)
    (picture,) = model.open_images([wide], 1024, "native", Clock())
    assert (picture.tokens, picture.size) == (144, (576, 1024))
    found = model.encode_image(wide, resolution=256, aspect="native")
    assert found.size == (192, 256)
    pixels = preprocess(wide, 256, "native")
    right = model.engine.vision.encoder.encode(pixels[None])[0]
    np.testing.assert_array_equal(np.array(found.features), np.array(right))
    assert found.embeddings.shape[0] == 12
    shapes = [noise(160, 80), noise(80, 160), noise(90, 160)]
    ids = [*PROMPT, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID]
    answer = model.generate(shapes, ids, resolution=128, aspect="native", **SHORT)
    assert answer.image_tokens == 2 + 2 + 4


@pytest.mark.parametrize("height", range(1, 1025, 37))
def test_no_position_is_all_black(height):
    white = preprocess(Image.new("RGB", (1024, height), "white"), 1024, "native")
    rows, columns = white.shape[0] // 64, white.shape[1] // 64
    assert white.reshape(rows, 64, columns, 64, 3).any(axis=(1, 3, 4)).all()


def test_a_square_is_the_same_picture_as_padded(default_model):
    """So its features are known."""
    model, square = default_model, noise(100, 100)
    model.clear_cache()
    model.generate(square, PROMPT, resolution=64, **SHORT)
    with counted(model) as work:
        model.generate(square, PROMPT, resolution=64, aspect="native", **SHORT)
    assert work.images == 0


def test_a_context_that_pictures_overfill(default_model):
    photos, ids = [noise(160, 90)] * 100, [IMAGE_TOKEN_ID] * 100
    with pytest.raises(ContextLengthError, match=r"of 100 images take .* show fewer"), counted(default_model) as work:
        default_model.generate(photos, ids, resolution=1024, aspect="native")
    assert work.images == 0


def test_chats_and_batches(default_model, tmp_path):
    model, path = default_model, tmp_path / "talk.json"
    one, two = noise(160, 80), noise(80, 160)
    batch = model.batch([one, two], [PROMPT, PROMPT], resolution=128, aspect="native", **SHORT)
    alone = [model.generate(image, PROMPT, resolution=128, aspect="native", **SHORT) for image in (one, two)]
    assert [found.token_ids for found in batch] == [found.token_ids for found in alone]
    chat = model.chat(one, resolution=128, aspect="native")
    chat.ask("What is this?", **SHORT)
    chat.save(path)
    model.clear_cache()
    other = model.load_chat(path)
    assert other.view == (128, "native", None)
    assert [picture.digest for picture in other.pictures] == [picture.digest for picture in chat.pictures]
    assert other.ask("And this?", **SHORT).token_ids == chat.ask("And this?", **SHORT).token_ids


def test_the_command(tmp_path, capsys, default_model):
    photo, answers = tmp_path / "photo.png", tmp_path / "answers.jsonl"
    noise(160, 80).save(photo)
    rest = ["--max-tokens", "4", "--resolution", "128", "--aspect", "native"]
    assert main(["generate", "--image", str(photo), "--stats", *rest]) == 0
    out, err = capsys.readouterr()
    assert "(2 image, 0 known)" in err
    assert main(["caption", str(tmp_path), "-o", str(answers), *rest]) == 0
    line = json.loads(answers.read_text())
    assert (line["text"] + "\n", line["aspect"]) == (out, "native")


class Rectangle:
    """A Core ML runtime with one function, of 64 x 128 px."""

    def functions(self, package):
        return [Function("r64x128", "images", False, 64, 128, "image_features")]

    def open(self, package, function, compute_units):
        return lambda inputs: {"image_features": np.full((1, 2, 512), inputs["images"].shape[3])}


def test_core_ml_has_a_function_for_each_shape(speaking_model, tmp_path):
    tiny = speaking_model
    vision = Vision(CoreMLVisionEncoder(tmp_path, Rectangle()), tiny.engine.vision.projector, 0)
    model = FastVLM(tiny.config, Engine(tiny.decoder, vision, PrefixCache(0)), None, 256)
    found = model.encode_image(noise(160, 80), resolution=128, aspect="native")
    assert (np.array(found.features) == 128).all()
    with pytest.raises(ResolutionError, match="takes images of 64 x 128 px, not 128 x 64"):
        model.encode_image(noise(80, 160), resolution=128, aspect="native")
