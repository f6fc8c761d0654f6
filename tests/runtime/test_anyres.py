"""Pictures in tiles, against what the official code computes."""

from __future__ import annotations

import json
from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import FastVLM, load
from fastvlm_mlx.answer import last_result
from fastvlm_mlx.cache import PrefixCache
from fastvlm_mlx.cli import main
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import ContextLengthError, InputError, PromptError
from fastvlm_mlx.image import open_image
from fastvlm_mlx.pictures import Vision
from fastvlm_mlx.prefill import embed
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.types import IMAGE_TOKEN_ID, GenerationOptions
from fastvlm_mlx.views import View
from fastvlm_mlx.vision import fastvithd
from fastvlm_mlx.vision.anyres import MERGES, Layout, choose_grid, cut
from fastvlm_mlx.vision.coreml import CoreMLVisionEncoder
from fastvlm_mlx.vision.coreml_runtime import Function
from support.anyres import GRIDS, NAMES, POSITIONS, SIDE, reference, with_merge
from support.seeded import relative_l2
from support.work import counted

PROMPT = [11, 12, IMAGE_TOKEN_ID, 13]
SHORT = {"max_tokens": 4, "ignore_eos": True}


def bytes_of(name: str) -> bytes:
    return reference()[f"{name}.png"].tobytes()


@pytest.fixture
def tiled(model: Callable[[str], FastVLM]) -> FastVLM:
    fresh = model("tiny-newline")
    fresh.clear_cache()
    return fresh


@pytest.mark.parametrize("name", NAMES)
def test_grids_and_tiles_bit_for_bit(name):
    right = reference()
    picture = open_image(right[f"{name}.png"].tobytes())
    best = tuple(right[f"{name}.best"].tolist())
    assert choose_grid(picture.size, [(c * SIDE, r * SIDE) for c, r in GRIDS]) == best
    layout = View(SIDE, "anyres", GRIDS).layout(picture.size)
    assert layout == Layout(best[0] // SIDE, best[1] // SIDE, SIDE, "flat", picture.size)
    found = cut(picture, layout)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, right[f"{name}.tiles"])


@pytest.mark.parametrize("kind", MERGES)
@pytest.mark.parametrize("name", NAMES)
def test_merged_embeddings(tiled, name, kind):
    right, model = reference(), with_merge(tiled, kind)
    encoded = model.encode_image(right[f"{name}.png"].tobytes(), aspect="anyres")
    spans = model.expand(PROMPT, [len(encoded.embeddings)])
    found = np.array(embed(model.decoder, spans, [encoded.embeddings])[0], np.float64)
    assert found.shape == right[f"{name}.{kind}"].shape
    # The reference is stored in float16, which rounds by up to 4.9e-4 of a value.
    np.testing.assert_allclose(found, right[f"{name}.{kind}"], rtol=6e-4, atol=1e-4)
    assert relative_l2(found, right[f"{name}.{kind}"]) <= 1e-3


@pytest.mark.parametrize("kind", MERGES)
@pytest.mark.parametrize("name", NAMES)
def test_positions_and_work(tiled, name, kind):
    """What is counted is what is prefilled; a second question encodes nothing and prefills its own words."""
    model, tokens, tiles = with_merge(tiled, kind), POSITIONS[name][kind], len(reference()[f"{name}.tiles"])
    with counted(model) as work:
        first = model.generate(bytes_of(name), PROMPT, **SHORT)
    assert (first.image_tokens, first.prompt_tokens) == (tokens, tokens + 3)
    assert (work.images, work.passes) == (tiles, [tokens + 3])
    assert min(first.timings.vision, first.timings.projector, first.timings.preprocess) > 0
    with counted(model) as work:
        second = model.generate(bytes_of(name), [*PROMPT[:-1], 14, 15], **SHORT)
    assert (work.images, work.passes, second.cached_tokens) == (0, [2], tokens + 2)


def test_answers_are_those_of_a_first_question(tiled, forgetful):
    for name in NAMES:
        tiled.generate(bytes_of(name), PROMPT, **SHORT)
        again = tiled.generate(bytes_of(name), PROMPT, **SHORT)
        assert again.cached_tokens == again.prompt_tokens - 1
        assert again.token_ids == forgetful(tiled).generate(bytes_of(name), PROMPT, **SHORT).token_ids


def test_another_grid_or_merge_is_another_picture(tiled):
    tiled.generate(bytes_of("any_wide"), PROMPT, **SHORT)  # in 3 x 1 tiles
    with counted(tiled) as work:
        other = tiled.generate(bytes_of("any_wide"), PROMPT, grid="2x2", **SHORT)
        padded = tiled.generate(bytes_of("any_wide"), PROMPT, aspect="pad", **SHORT)
        small = tiled.generate(bytes_of("any_wide"), PROMPT, grid="3x1", resolution=128, **SHORT)
        flat = with_merge(tiled, "flat").generate(bytes_of("any_wide"), PROMPT, **SHORT)
    assert work.images == 5 + 1 + 4 + 4
    assert [r.cached_tokens for r in (other, padded, small, flat)] == [2, 2, 2, 2]  # the text before it
    assert [r.image_tokens for r in (padded, small, flat)] == [16, 4 + 2 * 5, 64]
    digests = {
        with_merge(tiled, kind).open_images([bytes_of("any_wide")], 256, "anyres", Clock(), grid)[0].digest
        for kind in MERGES
        for grid in (None, "2x2")
    }
    assert len(digests) == 6


def test_several_pictures_of_different_shapes(tiled, forgetful):
    shown, ids = [bytes_of(name) for name in NAMES], [1, -200, 2, -200, -200, 3]
    found = tiled.generate(shown, ids, **SHORT)
    assert found.image_tokens == 52 + 66 + 88
    pictures = [tiled.open_images([image], 256, "anyres", Clock())[0] for image in shown]
    pictures[1] = tiled.open_images([shown[1]], 128, "crop", Clock())[0]
    spans = tiled.expand(ids, [picture.tokens for picture in pictures])
    with counted(tiled) as work:
        *_, last = tiled.answer(spans, pictures, GenerationOptions(**SHORT), Clock())
    assert (work.images, last.result.image_tokens) == (1, 52 + 4 + 88)
    assert last.result.cached_tokens == 1 + 52 + 1
    bare = forgetful(tiled)
    assert (
        last.result.token_ids
        == last_result(bare.answer(spans, pictures, GenerationOptions(**SHORT), Clock())).token_ids
    )


def test_what_comes_out_of_encode_image(tiled):
    encoded = tiled.encode_image(bytes_of("any_tall"))
    assert encoded.features.shape == (4, 16, 512)
    assert encoded.embeddings.shape == (66, 128)
    assert encoded.size == (768, 256)
    square = tiled.encode_image(bytes_of("any_tall"), aspect="stretch")
    assert relative_l2(encoded.features[0], np.array(square.features)) <= 1e-5  # the whole picture comes first
    assert relative_l2(encoded.embeddings[:16], np.array(square.embeddings)) <= 1e-5


def test_a_batch(tiled, tmp_path):
    files = [tmp_path / f"{name}.png" for name in NAMES]
    for file in files:
        file.write_bytes(bytes_of(file.stem))
    right = [tiled.generate(file, PROMPT, **SHORT) for file in files]
    tiled.clear_cache()
    found = tiled.batch(files, PROMPT, batch_size=1, **SHORT)  # later ones are read again
    assert [(r.token_ids, r.image_tokens) for r in found] == [(r.token_ids, r.image_tokens) for r in right]
    grids = tiled.batch(files, PROMPT, grid="2x1", **SHORT)
    assert [r.image_tokens for r in grids] == [16 + 4 * columns for columns in (8 + 1, 2 + 1, 4 + 1)]


def test_rows_from_another_process(tiled, bundle, tmp_path):
    tiled.generate(bytes_of("any_wide"), PROMPT, **SHORT)
    tiled.save_prefix(tmp_path / "rows")
    fresh = load(bundle("tiny-newline"))
    fresh.load_prefix(tmp_path / "rows")
    with counted(fresh) as work:
        fresh.generate(bytes_of("any_wide"), PROMPT, **SHORT)
    assert (work.images, work.passes) == (0, [1])


def test_the_picture_that_warms_it_up_is_tiled_too(tiled):
    tiled.warm_up()


def test_large_tiles_are_encoded_in_parts(tiled, monkeypatch):
    """2 x 2 tiles of 512 px and the whole picture, two at a time; features are those of one batch."""
    encoder, seen = tiled.engine.vision.encoder, []
    network = type(encoder.network).__call__

    def watched(self, x):
        seen.append(x.shape)
        return network(self, x)

    monkeypatch.setattr(type(encoder.network), "__call__", watched)
    found, peaks = [], []
    for pixels in (5 << 18, 2 << 18, 1):
        monkeypatch.setattr(fastvithd, "BATCH_PIXELS", pixels)
        tiled.clear_cache()
        mx.reset_peak_memory()
        found.append(tiled.encode_image(bytes_of("any_square"), resolution=512, grid="2x2"))
        peaks.append(mx.get_peak_memory())
    assert [shape[0] for shape in seen] == [5, 2, 2, 1, 1, 1, 1, 1, 1]
    assert {shape[1:] for shape in seen} == {(512, 512, 3)}
    assert peaks[0] > 1.5 * peaks[1] > 1.5 * peaks[2]
    for other in found[1:]:
        assert relative_l2(other.embeddings, np.array(found[0].embeddings)) <= 1e-5
    assert len(found[0].embeddings) == 64 + 16 * 17


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
    assert model.load_chat(path, aspect="pad").view == (64, "pad", None)


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
        with pytest.raises(ContextLengthError, match="the prompt has"):
            tiled.generate([bytes_of("any_square")] * 100, [-200] * 100)
        with pytest.raises(PromptError, match="2 image sentinels"):
            tiled.generate(bytes_of("any_wide"), [-200, -200])
    assert (work.images, work.rows) == (0, 0)
    with pytest.raises(InputError, match="has no grids of its own"):
        default_model.encode_image(bytes_of("any_wide"), aspect="anyres")
    with pytest.raises(ContextLengthError, match="choose a smaller grid or lower the resolution"):
        default_model.chat(aspect="anyres", grid="999x999")


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
    assert "a grid is for aspect='anyres', and aspect is 'crop'" in capsys.readouterr().err
    answers = tmp_path / "answers.jsonl"
    argv = ["caption", str(tmp_path), "-o", str(answers), "--max-tokens", "4", "--resolution", "64"]
    assert main([*argv, "--aspect", "anyres", "--grid", "2x1"]) == 0
    line = json.loads(answers.read_text())
    assert (line["text"], line["aspect"], line["grid"]) == (right.text, "anyres", "2x1")
