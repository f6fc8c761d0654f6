"""Pictures in tiles in chats, on Core ML, at the command line; and what is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from fastvlm_mlx import FastVLM, budget
from fastvlm_mlx.cache import PrefixCache
from fastvlm_mlx.cli import main
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import ConfigError, ContextLengthError, InputError, PromptError
from fastvlm_mlx.pictures import Vision, picture_of
from fastvlm_mlx.projector import MLPProjector
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.vision.anyres import Layout
from fastvlm_mlx.vision.coreml import CoreMLVisionEncoder
from fastvlm_mlx.vision.coreml_runtime import Function
from support.anyres import PROMPT, SHORT, bytes_of, reference
from support.work import counted


class OneByOne:
    """A Core ML runtime whose feature is an image's mean."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def functions(self, package):
        return [Function(None, "images", False, 256, 256, "image_features")]

    def open(self, package, function, compute_units):
        def predict(inputs):
            self.shapes.append(inputs["images"].shape)
            return {"image_features": np.full((1, 16, 512), inputs["images"].mean())}

        return predict


def test_core_ml_takes_tiles_one_after_another(tiled, tmp_path):
    runtime = OneByOne()
    encoder = CoreMLVisionEncoder(tmp_path, runtime)
    vision = Vision(encoder, tiled.engine.vision.projector, 0)
    model = FastVLM(tiled.config, Engine(tiled.decoder, vision, PrefixCache(0)), None, 256)
    found = model.encode_image(bytes_of("any_wide"))
    means = reference()["any_wide.tiles"].mean(axis=(1, 2, 3)) / 255
    np.testing.assert_allclose(np.array(found.features)[:, 0, 0], means, rtol=1e-3)
    assert runtime.shapes == [(1, 3, 256, 256)] * 4
    assert model.generate(bytes_of("any_wide"), PROMPT, **SHORT).image_tokens == 52  # begun beside the text
    assert len(runtime.shapes) == 8


def test_a_chat_keeps_its_tiles(default_model, tmp_path):
    """Also where a question shows pictures of other shapes."""
    model, path = default_model, tmp_path / "talk.json"
    chat = model.chat(bytes_of("any_wide"), aspect="anyres", grid="2x1", resolution=64)
    chat.show(model.open_images([bytes_of("any_wide")], 128, "pad", Clock())[0])
    assert [picture.tokens for picture in chat.unseen] == [3, 4]
    first = chat.ask("What is this?", **SHORT)
    assert first.image_tokens == 7
    chat.add_image(bytes_of("any_tall"))
    chat.save(path)
    model.clear_cache()
    other = model.load_chat(path)
    assert other.view == (64, "anyres", "2x1")
    assert [p.digest for p in (*other.pictures, *other.unseen)] == [p.digest for p in (*chat.pictures, *chat.unseen)]
    assert other.ask("And this?", **SHORT).token_ids == chat.ask("And this?", **SHORT).token_ids
    assert other.pictures[2].tokens == 3
    assert model.load_chat(path, grid="1x2").view == (64, "anyres", "1x2")
    assert model.load_chat(path, aspect="anyres").view == (64, "anyres", "2x1")
    assert model.load_chat(path, aspect="pad").view == (64, "pad", None)
    assert model.load_chat(path, resolution=128).view == (128, "anyres", "2x1")


def test_tiles_whose_line_break_a_model_lacks(tiled, default_model, tmp_path):
    path = tmp_path / "talk.json"
    chat = default_model.chat(bytes_of("any_wide"), aspect="anyres", grid="2x1", resolution=64)
    chat.save(path)
    data = json.loads(path.read_text())
    (name,) = data["tiles"]
    layout = Layout(2, 1, 64, "spatial_unpad", tuple(data["tiles"][name]["size"]))
    picture = picture_of(chat.unseen[0].make_pixels(), layout)
    text = path.read_text().replace(name, picture.digest.hex()).replace('"flat"', '"spatial_unpad"')
    path.write_text(text)
    with pytest.raises(InputError, match=r"have no image_newline.*load the model that it began with"):
        default_model.load_chat(path)


def test_a_draft_without_a_line_break(tiled, default_model):
    """Told before anything is computed."""
    asked = FastVLM(tiled.config, tiled.engine, default_model.tokenizer, 256)
    config = dataclasses.replace(tiled.config, image_newline=False)
    projector = MLPProjector(config.projector)
    vision = Vision(tiled.engine.vision.encoder, projector, 0)
    draft = FastVLM(config, Engine(tiled.decoder, vision, PrefixCache(0)), default_model.tokenizer, 256)
    with counted(asked) as work, pytest.raises(ConfigError, match="the draft can't see these images"):
        asked.generate(bytes_of("any_wide"), PROMPT, draft=draft, **SHORT)
    assert (work.images, work.rows) == (0, 0)


def test_a_chat_with_damaged_tiles(default_model, tmp_path):
    path = tmp_path / "talk.json"
    chat = default_model.chat(bytes_of("any_wide"), aspect="anyres", grid="2x1", resolution=64)
    chat.save(path)
    data = json.loads(path.read_text())
    (name,) = data["tiles"]
    good = data["tiles"][name]
    for bad in (good | {"columns": 3}, good | {"merge": "pile"}, good | {"size": [1, 1]}, {"columns": 2}, 5):
        path.write_text(json.dumps(data | {"tiles": {name: bad}}))
        with pytest.raises(InputError, match="is damaged"):
            default_model.load_chat(path)
    path.write_text(json.dumps(data | {"tiles": 5}))
    with pytest.raises(InputError, match="is damaged"):
        default_model.load_chat(path)


def test_what_is_told_before_anything_is_computed(tiled, default_model):
    with counted(tiled) as work:
        for wrong in ({"grid": "4x4"}, {"grid": "two"}, {"grid": "2x2", "aspect": "pad"}):
            with pytest.raises(InputError, match="grid"):
                tiled.generate(bytes_of("any_wide"), PROMPT, **wrong)
        with pytest.raises(ContextLengthError, match=r"of 100 images take .* positions, the model's context is"):
            tiled.generate([bytes_of("any_square")] * 100, [-200] * 100)
        with pytest.raises(PromptError, match="2 image sentinels"):
            tiled.generate(bytes_of("any_wide"), [-200, -200])
    assert (work.images, work.rows) == (0, 0)
    with pytest.raises(InputError, match="has no grids of its own"):
        default_model.encode_image(bytes_of("any_wide"), aspect="anyres")
    chat = default_model.chat(aspect="anyres", grid="999x999")
    with pytest.raises(ContextLengthError, match="choose a smaller grid or lower the resolution"):
        chat.add_image(bytes_of("any_wide"))


def test_the_command(tmp_path, capsys, default_model):
    photo = tmp_path / "photo.png"
    photo.write_bytes(bytes_of("any_wide"))
    argv = ["generate", "--image", str(photo), "--max-tokens", "4", "--resolution", "64"]
    assert main([*argv, "--aspect", "anyres", "--grid", "2x1", "--stats"]) == 0
    out, err = capsys.readouterr()
    right = default_model.generate(
        photo, "Describe the image.", resolution=64, aspect="anyres", grid="2x1", max_tokens=4
    )
    assert (out, right.image_tokens) == (right.text + "\n", 3)
    assert "(3 image, 0 known)" in err
    assert main([*argv, "--grid", "two"]) == 2
    assert "grid must be COLUMNSxROWS, each from 1 to 999, such as \"2x2\"; got 'two'" in capsys.readouterr().err
    assert main([*argv, "--grid", "2x1", "--aspect", "crop"]) == 2
    assert "a grid is for aspect 'anyres', and aspect is 'crop'" in capsys.readouterr().err
    assert main([*argv, "--grid", "2x1"]) == 2
    assert "aspect is 'pad'; give aspect 'anyres', too" in capsys.readouterr().err
    answers = tmp_path / "answers.jsonl"
    argv = ["caption", str(tmp_path), "-o", str(answers), "--max-tokens", "4", "--resolution", "64"]
    for wrong in ("two", "2x1"):
        assert main([*argv, "--grid", wrong]) == 2
    assert not answers.exists()
    assert main([*argv, "--aspect", "anyres", "--grid", "2x1"]) == 0
    line = json.loads(answers.read_text())
    assert (line["text"], line["aspect"], line["grid"]) == (right.text, "anyres", "2x1")


def test_the_chat_command_hands_the_view_on(monkeypatch, capsys):
    def watched(self, images, *, resolution, aspect, grid, **_):
        raise InputError(f"{resolution} {aspect} {grid}")

    monkeypatch.setattr(FastVLM, "chat", watched)
    assert main(["chat", "--resolution", "64", "--aspect", "anyres", "--grid", "2x1"]) == 2
    assert "64 anyres 2x1" in capsys.readouterr().err


def test_a_budget_counts_tiles(tiled, monkeypatch):
    """What was measured of whole pictures says nothing of a model that sees them in tiles."""
    asked, generate, before = [], type(tiled).generate, tiled.resolution
    monkeypatch.setattr(budget, "saved_measurements", lambda: pytest.fail("asked for"))

    def watched(self, image, prompt, **options):
        result = generate(self, image, prompt, **options)
        asked.append((options["resolution"], result.image_tokens))
        return result

    monkeypatch.setattr(type(tiled), "generate", watched)
    try:
        budget.apply_budget(tiled, 1000.0)
        assert tiled.resolution == 256
    finally:
        tiled.resolution = before
    assert max(asked) == (256, 16 + 6 * 9)  # a photo of 4:3 in 2 x 2 tiles
