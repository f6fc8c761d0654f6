"""Frames of animations, folders and lists; what is refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import Frame, image, read_frames, video
from fastvlm_mlx.errors import ImageError, InputError
from fastvlm_mlx.image import preprocess
from fastvlm_mlx.types import SAMPLINGS
from fastvlm_mlx.video import _CHOICES
from support.videos import COLOURS, numbers_of, solid, write_animation


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_animations(tmp_path, ending):
    path = write_animation(tmp_path / f"clip.{ending}", [100] * 12)
    frames = read_frames(path, 4)
    assert numbers_of(frames) == [1, 4, 7, 10]
    assert [frame.time for frame in frames] == [0.1, 0.4, 0.7, 1.0]
    assert numbers_of(read_frames(path.read_bytes(), 20)) == list(range(12))
    assert numbers_of(read_frames(path, 12, "scene")) == list(range(12))


def test_durations_of_an_animation(tmp_path):
    # Until 2000 ms: the centres of two parts are 500 and 1500.
    path = write_animation(tmp_path / "clip.gif", [400, 700, 100, 100, 700])
    frames = read_frames(path, 2)
    assert numbers_of(frames) == [1, 4]
    assert [frame.time for frame in frames] == [0.4, 1.3]


def test_a_duration_of_0_is_a_tenth_of_a_second(tmp_path):
    frames = read_frames(write_animation(tmp_path / "clip.gif", [0, 0, 0]), 3)
    assert [frame.time for frame in frames] == [0, 0.1, 0.2]


def test_the_picture_for_programs_without_animations_is_left_out(tmp_path):
    path = write_animation(tmp_path / "clip.png", [100] * 3, default_image=True)
    assert numbers_of(read_frames(path, 3)) == [1, 2]


@pytest.mark.parametrize("ending", ["png", "jpg", "tiff", "gif"])
def test_a_still_picture_is_its_only_frame(tmp_path, ending):
    path = tmp_path / f"one.{ending}"
    pages = {"save_all": True, "append_images": [solid(COLOURS[3])]} if ending == "tiff" else {}
    solid(COLOURS[2]).save(path, **pages)
    for sampling in SAMPLINGS:
        (frame,) = read_frames(path, 8, sampling)
        assert numbers_of([frame]) == [2]
        assert frame.time == 0


def test_transparency_is_composited(tmp_path):
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    clear.save(tmp_path / "clip.png", save_all=True, append_images=[Image.new("RGBA", (20, 20), "red")], duration=100)
    first, second = read_frames(tmp_path / "clip.png")
    assert (first.image.getpixel((9, 9)), second.image.getpixel((9, 9))) == ((255, 255, 255), (255, 0, 0))


def test_a_damaged_animation(tmp_path):
    data = write_animation(tmp_path / "clip.gif", [100] * 12).read_bytes()
    with pytest.raises(ImageError, match=r"the video \(.* bytes\) can't be decoded .*truncated or damaged"):
        read_frames(data[: len(data) // 2])


@pytest.fixture
def folder(tmp_path):
    """Twelve frames whose names are in another order than their numbers, and other files."""
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, colour in enumerate(COLOURS):
        solid(colour).save(folder / f"Frame{number}.png" if number % 2 else folder / f"frame{number}.png")
    (folder / ".hidden.png").write_bytes(b"")
    (folder / "notes.txt").write_text("no picture")
    (folder / "below.png").mkdir()
    return folder


def test_a_folder_in_natural_order(folder):
    assert numbers_of(read_frames(folder, 4)) == [1, 4, 7, 10]
    frames = read_frames(str(folder), 12)
    assert numbers_of(frames) == list(range(12))
    assert [frame.time for frame in frames] == [None] * 12


def test_scenes_of_a_folder(tmp_path):
    shots = [2, 2, 2, 9, 9, 9, 9, 5]
    for number, shot in enumerate(shots):
        solid(COLOURS[shot]).save(tmp_path / f"{number}.png")
    assert numbers_of(read_frames(tmp_path, 3, "scene")) == [2, 9, 5]
    assert numbers_of(read_frames(tmp_path, 4, "scene")) == [2, 9, 9, 5]


def test_what_changes_a_little_is_no_cut():
    """Light that grows by 2% a frame, and one cut: two frames of each half, where its halves begin."""
    greys = (0, 5, 10, 15, 200, 205, 210, 215)
    frames = read_frames([solid([grey] * 3) for grey in greys], 4, "scene")
    assert [frame.image.getpixel((0, 0))[0] for frame in frames] == [0, 10, 200, 210]


def test_only_the_chosen_files_are_read(folder):
    (folder / "frame0.png").write_bytes(b"")
    assert len(read_frames(folder, 4)) == 4
    with pytest.raises(ImageError, match=r"frame0\.png is empty or no image"):
        read_frames(folder, 12)


def test_images_one_after_another(folder):
    images = [solid(colour) for colour in COLOURS]
    arrays = np.stack([np.asarray(image) for image in images])
    for source in (images, iter(images), arrays, [folder / f"frame{n}.png" for n in range(0, 12, 2)]):
        found = numbers_of(read_frames(source, 2))
        assert found == ([2, 8] if isinstance(source, list) and len(source) == 6 else [3, 9])
    timed = [Frame(image, number / 2) for number, image in enumerate(images)]
    assert [frame.time for frame in read_frames(timed, 2)] == [1.5, 4.5]


def test_a_frame_is_an_image():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8))
    np.testing.assert_array_equal(preprocess(Frame(image, 1.0), 128), preprocess(image, 128))


class Pipe(io.BytesIO):
    """It can be read once."""

    def seekable(self):
        return False

    def seek(self, *_):
        raise io.UnsupportedOperation


class Bare:
    """It can be read, and that is all."""

    def __init__(self, data):
        self.read = io.BytesIO(data).read


@pytest.mark.parametrize("kind", [Pipe, Bare, io.BytesIO])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_images_from_pipes(folder, kind, sampling):
    shots = [2, 2, 9, 9]
    pipes = [
        kind((folder / f"frame{shot}.png" if not shot % 2 else folder / f"Frame{shot}.png").read_bytes())
        for shot in shots
    ]
    assert numbers_of(read_frames(pipes, 2, sampling)) == [2, 9]


def test_an_animation_from_a_file_that_can_only_be_read(tmp_path):
    path = write_animation(tmp_path / "clip.gif", [100] * 12)
    assert numbers_of(read_frames(Bare(path.read_bytes()), 4)) == [1, 4, 7, 10]


def test_a_file_that_gives_text(tmp_path):
    class Text(io.StringIO):
        def seekable(self):
            return False

    with pytest.raises(ImageError, match="a file object must be binary, this one gives str; open it with mode 'rb'"):
        read_frames(Text("hello"))


def test_no_limit_of_pillows(tmp_path, monkeypatch):
    """Which refuses a picture of twice its number of pixels, and warns of one above it."""
    path = write_animation(tmp_path / "clip.gif", [100] * 3, disposal=2)
    solid(COLOURS[2]).save(tmp_path / "one.png")
    for limit in (1000, 3000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert numbers_of(read_frames(tmp_path / "one.png")) == [2]
        assert numbers_of(read_frames(path)) == [0, 1, 2]
        assert limit == Image.MAX_IMAGE_PIXELS


def test_our_limit_holds_before_anything_is_decoded(tmp_path, monkeypatch):
    solid(COLOURS[2]).save(tmp_path / "one.png")
    monkeypatch.setattr(image, "MAX_PIXELS", 3000)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(ImageError, match=r"video .*one.png is too large, 64 x 48 px"):
        read_frames(tmp_path / "one.png")


def sources(folder, tmp_path):
    """Twelve frames of 64 x 48 pixels, as a folder, as an animation and as pictures."""
    return folder, write_animation(tmp_path / "clip.gif", [100] * 12), [solid(colour) for colour in COLOURS]


def test_all_frames_together_are_bounded(folder, tmp_path):
    for source in sources(folder, tmp_path):
        for count, most, size in (
            (12, 12 * 64 * 48, (64, 48)),  # as they are
            (4, 4 * 64 * 48, (64, 48)),  # of those that are chosen
            (100, 12 * 64 * 48, (64, 48)),  # of those that there are
            (12, 12 * 64 * 48 - 1, (63, 47)),
            (12, 12 * 64 * 48 // 4, (32, 24)),
            (12, 12, (1, 1)),
            (12, 1, (1, 1)),
        ):
            frames = read_frames(source, count, max_pixels=most)
            assert {frame.image.size for frame in frames} == {size}
            assert numbers_of(frames) == ([1, 4, 7, 10] if count == 4 else list(range(12)))


def test_frames_are_bounded_by_themselves(tmp_path, monkeypatch):
    """To more than any model shows: 134 million pixels are 32,768 positions of 64 x 64."""
    assert video.MAX_PIXELS > 32768 * 64 * 64
    noise = np.random.default_rng(0).integers(0, 256, (12, 30, 40, 3), np.uint8)
    monkeypatch.setattr(read_frames, "__defaults__", (*read_frames.__defaults__[:-1], 12 * 300))
    for frame, picture in zip(read_frames(noise, 12), noise, strict=True):
        assert frame.image.size == (20, 15)
        whole = np.asarray(Image.fromarray(picture).resize((20, 15), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(np.asarray(frame.image), whole)


def test_no_pixels_asked(folder):
    for most in (0, -1, True, 2.5, "8", None):
        with pytest.raises(InputError, match="max_pixels must be a whole number, 1 or more, got"):
            read_frames(folder, max_pixels=most)


@pytest.mark.parametrize("frames", [0, -1, True, 2.5, "8", None])
def test_no_frames_asked(folder, frames):
    with pytest.raises(InputError, match="frames must be a whole number, 1 or more, got"):
        read_frames(folder, frames)


def test_a_numpy_number_of_frames(folder):
    assert len(read_frames(folder, np.int64(3))) == 3


def test_bad_sources(tmp_path, folder):
    with pytest.raises(InputError, match="sampling must be one of uniform, scene, got 'random'"):
        read_frames(folder, 8, "random")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"empty has no pictures; known endings are \.avif \.bmp"):
        read_frames(empty)
    with pytest.raises(InputError, match="there are no frames to choose from; give at least one image"):
        read_frames(iter([]))
    with pytest.raises(InputError, match="the name of the video is empty; give a file or a folder of frames"):
        read_frames("")
    with pytest.raises(InputError, match=r"frames come from a video file, .*; got int"):
        read_frames(5)
    with pytest.raises(InputError, match="got Image"):
        read_frames(solid(COLOURS[0]))
    with pytest.raises(ImageError, match=r"an image is a path, .*; got NoneType"):
        read_frames([None])


def test_each_sampling_has_its_choice():
    assert tuple(_CHOICES) == SAMPLINGS
