"""Pictures in tiles, against what the official code computes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import load
from fastvlm_mlx.answer import last_result
from fastvlm_mlx.image import open_image
from fastvlm_mlx.prefill import embed
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.types import GenerationOptions
from fastvlm_mlx.views import View
from fastvlm_mlx.vision import fastvithd
from fastvlm_mlx.vision.anyres import MERGES, Layout, choose_grid, cut
from support.anyres import GRIDS, NAMES, POSITIONS, PROMPT, SHORT, SIDE, bytes_of, reference, with_merge
from support.seeded import relative_l2
from support.work import counted


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
    tiled.clear_cache()
    with counted(tiled) as work:
        tiled.warm_up()
    assert work.images > 1


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


def test_the_papers_grid(tiled):
    """2 x 2 tiles of 1024 px, no more than four encoded at once."""
    seen, network = [], tiled.engine.vision.encoder.network

    class Watched(type(network)):
        def __call__(self, x):
            seen.append(x.shape)
            return super().__call__(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "__class__", Watched)
        picture, view = bytes_of("any_square"), {"resolution": 1024, "grid": "2x2"}
        result = with_merge(tiled, "spatial").generate(picture, PROMPT, **view, **SHORT)
    assert result.image_tokens == 1280
    assert seen == [(4, 1024, 1024, 3), (1, 1024, 1024, 3)]
