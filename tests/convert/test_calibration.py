"""Calibration pictures: what they are, the caller's own, and that they keep other pictures within float16."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_convert.calibration import MAX_PICTURES, Pictures, built_in, from_folder, verification
from fastvlm_convert.calibration.pictures import HERE
from fastvlm_convert.calibration.rendered import noise
from fastvlm_convert.calibration.sets import OTHER_PHOTOGRAPHS, PHOTOGRAPHS, RECIPE
from fastvlm_convert.coreml_vision import Size
from fastvlm_mlx.errors import ImageError, InputError
from support.folded import folded_vision

SIZES = (Size(256, 256), Size(576, 1024), Size(1536, 64), Size(64, 64))


def both(size: Size) -> list[np.ndarray]:
    return [*built_in().at(size), *verification().at(size)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three pictures, named against the order in which they are written."""
    path = tmp_path / "mine"
    path.mkdir()
    for name, colour in (("c.png", "blue"), ("a.jpg", "red"), ("b.webp", "lime")):
        Image.new("RGB", (90, 70), colour).save(path / name, lossless=True, quality=100)
    return path


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.function)
def test_shapes(size):
    pictures = both(size)
    assert len(pictures) == built_in().count + verification().count == 7 + 2
    for picture in pictures:
        assert (picture.shape, picture.dtype) == ((size.height, size.width, 3), np.uint8)
        assert picture.flags.writeable  # torch.from_numpy warns of others


def test_the_same_on_every_call():
    for make in (built_in, verification):
        assert make() == make()
        assert make().digest == make().digest
        for one, two in zip(make().at(Size(128, 192)), make().at(Size(128, 192)), strict=True):
            np.testing.assert_array_equal(one, two)
    assert built_in().digest != verification().digest
    assert (built_in().name, verification().name) == ("built-in", "verification")
    assert built_in().note == ""
    assert built_in().skipped == ()


def test_every_picture_is_another():
    """Pairwise, calibration and verification alike: nowhere near each other, at the smallest size too."""
    for size in (Size(64, 64), Size(256, 256)):
        for one, two in combinations(both(size), 2):
            assert np.abs(one.astype(int) - two).mean() > 20


def test_hard_content():
    """Text, saturated colours, noise, and the ends of the range beside each other."""
    *_, page, screen, random, extremes = built_in().at(Size(256, 256))
    assert np.median(page) == 255
    assert 0.05 < (page < 128).mean() < 0.4  # the share of ink
    for picture in (screen, extremes):
        colours = {tuple(colour) for colour in picture.reshape(-1, 3).tolist()}
        assert {(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)} <= colours
    assert set(np.unique(extremes)) == {0, 255}
    assert (np.abs(np.diff(extremes.astype(int), axis=1)) == 255).mean() > 0.1
    counts = np.bincount(random.ravel(), minlength=256)
    assert counts.min() > 0.8 * counts.mean()


def test_text_is_as_sharp_at_every_size():
    """Drawn, not scaled: at 1024 px a page holds as much ink, and steps from black to white as steep."""
    for size in (Size(256, 256), Size(1024, 1024), Size(576, 1024)):
        page = list(built_in().at(size))[3].astype(int)
        assert np.abs(np.diff(page, axis=1)).max() > 200
        assert (page[-size.height // 6 :] < 128).any()  # down to the edge


def test_rendered_pictures_and_their_recipe():
    """Whoever changes a rendered picture raises RECIPE, or packages made before would pass as up to date."""
    brightness = [round(float(p.mean()), 1) for p in both(Size(256, 256))]
    expected = {1: [114.6, 112.3, 92.6, 230.7, 147.6, 127.5, 127.4, 71.8, 179.0]}
    np.testing.assert_allclose(brightness, expected[RECIPE], atol=1.0)  # Pillow's versions differ by less


def test_embedded_photographs():
    files = sorted(HERE.glob("*.jpg"))
    assert [file.name for file in files] == sorted((*PHOTOGRAPHS, *OTHER_PHOTOGRAPHS))
    assert sum(file.stat().st_size for file in files) <= 250_000
    credits = (HERE / "README.md").read_text("utf-8")
    for file in files:
        with Image.open(file) as picture:
            assert max(picture.size) <= 512
        assert f"`{file.name}`" in credits


def test_light_to_import():
    code = "import sys, fastvlm_convert.calibration; assert not {'torch', 'coremltools', 'mlx'} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_folder_in_order_of_names(folder):
    pictures = from_folder(folder)
    assert (pictures.name, pictures.count, pictures.skipped, pictures.note) == ("mine", 3, (), "")
    for size in (Size(64, 128), Size(128, 64)):
        red, green, blue = pictures.at(size)
        assert red.shape == (size.height, size.width, 3)
        assert [int(p.mean((0, 1)).argmax()) for p in (red, green, blue)] == [0, 1, 2]


def test_folder_pictures_are_upright_and_cropped_to_the_middle(folder):
    stripes = np.zeros((30, 90, 3), np.uint8)
    stripes[:, 30:60] = 255
    picture = Image.fromarray(stripes)
    picture.save(folder / "0.png")
    turned = picture.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned.save(folder / "1.png", exif=exif)
    for cropped in list(from_folder(folder).at(Size(64, 64)))[:2]:
        assert cropped[:, 4:-4].min() == 255  # the white third alone, undistorted
    wide = next(from_folder(folder).at(Size(64, 192)))
    assert (wide[:, :56].max(), wide[:, 72:120].min(), wide[:, 136:].max()) == (0, 255, 0)


def test_digest_of_a_folder(folder, tmp_path):
    first = from_folder(folder).digest
    assert first == from_folder(folder).digest
    folder.rename(tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    assert from_folder(folder).digest == first  # the same pictures
    (folder / "notes.txt").write_text("not a picture")
    assert from_folder(folder).digest == first
    Image.new("RGB", (90, 70), "white").save(folder / "d.png")
    more = from_folder(folder).digest
    Image.new("RGB", (90, 70), "black").save(folder / "d.png")
    other = from_folder(folder).digest
    assert len({first, more, other, built_in().digest}) == 4


def test_unreadable_files_are_left_out(folder):
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "inner").mkdir()
    Image.new("RGB", (64, 64)).save(folder / "inner" / "deep.png")
    Image.fromarray(noise(70, 90, seed=0)).save(folder / "cut.jpg")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])  # what it begins with is right
    pictures = from_folder(folder)
    assert pictures.count == len(list(pictures.at(Size(64, 64)))) == 3
    text, cut = pictures.skipped
    assert text == "notes.txt is no image that Pillow reads; left out"
    assert "cut.jpg can't be decoded" in cut
    assert cut.endswith("; left out")


def test_pictures_beyond_pillows_limit_are_open_images_affair(folder, monkeypatch):
    """Pillow warns above its limit and refuses above twice that; open_image has a limit of its own."""
    for limit in (90 * 70 - 1, 90 * 70 // 2 - 1):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert from_folder(folder).count == 3


def test_big_folders_are_thinned(tmp_path):
    for i in range(MAX_PICTURES * 2):
        Image.new("L", (1, 1), i).save(tmp_path / f"{i:03}.png")
    pictures = from_folder(tmp_path)
    assert pictures.count == MAX_PICTURES
    assert pictures.note == f"{MAX_PICTURES} of the {MAX_PICTURES * 2} images in {tmp_path} were taken, evenly spread"
    taken = [int(picture[0, 0, 0]) for picture in pictures.at(Size(64, 64))]
    assert (taken[0], taken[-1]) == (0, MAX_PICTURES * 2 - 1)
    assert set(np.diff(taken)) == {2, 3}
    for i in range(MAX_PICTURES, MAX_PICTURES * 2):
        (tmp_path / f"{i:03}.png").unlink()
    assert (from_folder(tmp_path).count, from_folder(tmp_path).note) == (MAX_PICTURES, "")


def test_folders_that_cant_be_used(tmp_path, folder, monkeypatch):
    with pytest.raises(InputError, match=r"folder .*nowhere doesn't exist; check the path"):
        from_folder(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"needs a folder of images, but .*a\.jpg is a file; give its folder"):
        from_folder(folder / "a.jpg")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="must hold images, but it is empty; put JPEG or PNG files into it"):
        from_folder(empty)
    (empty / "notes.txt").write_text("not a picture")
    (empty / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(InputError, match="but none of its 2 files can be read as one; put JPEG or PNG"):
        from_folder(empty)

    def denied(self: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(InputError, match=r"can't be read \(.*Permission denied\); check its permissions"):
        from_folder(folder)


def test_files_are_opened_when_their_picture_is_made(folder):
    pictures = from_folder(folder).at(Size(64, 64))
    (folder / "b.webp").unlink()
    next(pictures)
    with pytest.raises(ImageError, match=r"b\.webp doesn't exist"):
        next(pictures)


def test_the_built_in_set_keeps_other_pictures_within_float16(checkpoint):
    """Exponents chosen on the built-in set, applied to the maxima of pictures that it lacks."""
    pytest.importorskip("torch", reason="the convert extra isn't installed")
    from fastvlm_convert.coreml_vision import measure_ranges
    from fastvlm_convert.ranges import FLOAT16_MAX, Ranges

    config, weights = folded_vision(checkpoint("tiny-hot"))
    sizes = (Size(128, 128), Size(256, 256))

    def images(pictures: Pictures) -> list[np.ndarray]:
        return [picture for size in sizes for picture in pictures.at(size)]

    chosen = measure_ranges(config, weights, images(built_in()))
    assert chosen.streams[4] >= 10
    others = images(verification())
    others += [noise(size.height, size.width, seed) for size in sizes for seed in (1, 2, 3)]
    maxima = measure_ranges(config, weights, others).maxima
    assert maxima["stages.4.stream"] > 100 * FLOAT16_MAX  # it isn't for tame pictures that nothing overflows
    headroom = Ranges(chosen.streams, chosen.norms, chosen.hidden, maxima).headroom
    assert set(headroom) == set(chosen.headroom)
    assert min(headroom.values()) > 0
    held = [name for name in headroom if name.startswith("stages.4") and name.endswith((".stream", ".fc1"))]
    assert min(headroom[name] for name in held) > 2  # bits; 3 are left free on the set itself
    for block, own in chosen.norms.items():  # LayerNorm's squares
        stage = int(block.split(".")[1])
        difference = maxima[f"{block}.norm.difference"] * 2.0 ** -(chosen.streams.get(stage, 0) + own)
        assert difference**2 < FLOAT16_MAX
