"""Frames of video files: the right ones, upright, from any container, by decoding no more than it takes."""

from __future__ import annotations

import io
import weakref
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import read_frames, video_file
from support.videos import CODEC_ERROR, COLOURS, copy_video, number_of, numbers_of, solid, write_video

av = pytest.importorskip("av", reason="the video extra isn't installed")

ONE = 1 << 16  # 1.0 in a display matrix


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        ("mp4", {}),
        ("mp4", {"b_frames": 2, "gop": 6}),
        ("mp4", {"gop": 1}),
        ("mov", {"gop": 12}),
        ("mkv", {"codec": "ffv1"}),
        ("mkv", {"b_frames": 2}),
        ("avi", {}),
        ("ts", {"b_frames": 2}),
    ],
)
@pytest.mark.parametrize("count", [4, 12, 100])
def test_containers(tmp_path, ending, options, count):
    frames = read_frames(write_video(tmp_path / f"clip.{ending}", **options), frames=count)
    right = [1, 4, 7, 10] if count == 4 else list(range(12))
    assert numbers_of(frames) == right
    assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in right], abs=1e-3)  # of a TS


def test_a_video_that_pillow_knows_by_name(tmp_path):
    path = write_video(tmp_path / "clip.m1v", codec="mpeg1video")
    with Image.open(path) as picture:
        assert picture.format == "MPEG"
    assert numbers_of(read_frames(path, 12)) == list(range(12))


def test_timestamps_decide_where_frames_do_not_last_equally_long(tmp_path):
    times = [0, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500, 2500]
    path = write_video(tmp_path / "clip.mkv", times_ms=times, codec="ffv1")
    frames = read_frames(path, frames=4)
    # It ends at 2500 and the last frame's time, so the centres are beyond 312, 937, 1562 and 2187.
    assert numbers_of(frames) == [6, 10]
    assert [frame.time for frame in frames] == [0.3, 0.5]
    assert numbers_of(read_frames(path, frames=12)) == list(range(12)), "the last one can be reached"


def test_scenes(tmp_path):
    shots = [0] * 5 + [7] * 2 + [3] * 9 + [5] * 4
    path = write_video(tmp_path / "clip.mp4", shots, gop=50)
    found = [read_frames(path, count, "scene") for count in (4, 4, 1)]
    assert [numbers_of(frames) for frames in found] == [[0, 7, 3, 5]] * 2 + [[0]]
    assert [frame.time for frame in found[0]] == pytest.approx([0, 0.5, 0.7, 1.6], abs=1e-3)
    # Of 0 -> 7 all channels change, of 7 -> 3 and 3 -> 5 one and two of them.
    assert numbers_of(read_frames(path, 2, "scene")) == [0, 7]
    # Two more: of scenes of 5, 2, 9 and 4 the third gets one, then the first, 5 to a frame, the third having 4.5.
    more = read_frames(path, 6, "scene")
    assert [frame.time for frame in more] == pytest.approx([0, 0.2, 0.5, 0.7, 1.1, 1.6], abs=1e-3)


@pytest.mark.parametrize(
    ("a", "b", "c", "d"),
    [
        (1, 0, 0, 1),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (-1, 0, 0, -1),
        (0, 1, -1, 0),
        (0, -1, 1, 0),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
    ],
)
def test_turned_as_the_phone_recorded_it(tmp_path, a, b, c, d):
    """A point (x, y) of what is stored goes to (ax + cy, bx + dy); quarters of a picture go where their centres go."""
    quarters = {(-1, -1): COLOURS[4], (1, -1): COLOURS[2], (-1, 1): COLOURS[1], (1, 1): COLOURS[7]}
    picture = solid(COLOURS[0], (96, 32))
    for (x, y), colour in quarters.items():
        picture.paste(colour, (48 * (x > 0), 16 * (y > 0), 48 + 48 * (x > 0), 16 + 16 * (y > 0)))
    matrix = [a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30]
    path = write_video(tmp_path / "clip.mov", [picture] * 2, codec="mpeg4", matrix=matrix)
    (frame,) = read_frames(path, frames=1)
    assert frame.image.size == ((96, 32) if a else (32, 96))
    width, height = frame.image.size
    for (x, y), colour in quarters.items():
        shown = a * x + c * y, b * x + d * y
        found = frame.image.getpixel((width * (2 + shown[0]) // 4, height * (2 + shown[1]) // 4))
        assert np.abs(np.subtract(found, colour)).max() <= CODEC_ERROR


def test_pixels_that_are_not_square(tmp_path):
    path = write_video(tmp_path / "clip.mkv", range(3), pixel=Fraction(3, 2))
    assert [frame.image.size for frame in read_frames(path, 3)] == [(96, 48)] * 3


def test_turned_and_not_square(tmp_path):
    """Its pixels are made square as they are stored; then it is turned."""
    matrix = [0, ONE, 0, -ONE, 0, 0, 0, 0, 1 << 30]
    (frame, *_) = read_frames(write_video(tmp_path / "clip.mov", range(3), pixel=Fraction(3, 2), matrix=matrix))
    assert frame.image.size == (48, 96)


# Frames that follow each other are stored in another order: 0 3 1 2 and so on.
SHUFFLED = {"codec": "libx264", "b_frames": 2, "gop": 6}


@pytest.mark.parametrize("container", ["avi", "mkv"])
@pytest.mark.parametrize(("count", "right"), [(4, [1, 4, 7, 10]), (12, [*range(12)]), (1, [6])])
def test_times_that_are_not_those_of_the_frames(tmp_path, container, count, right):
    """AVI has none, and what is copied from one has those that FFmpeg made up."""
    path = write_video(tmp_path / "clip.avi", **SHUFFLED)
    path = path if container == "avi" else copy_video(path, tmp_path / "clip.mkv")
    with av.open(str(path)) as file:
        times = [frame.pts for frame in file.decode(video=0)]
    assert times != sorted(times), "or nothing is shown here"
    for sampling in ("uniform", "scene") if count == 12 else ("uniform",):
        frames = read_frames(path, count, sampling)
        assert numbers_of(frames) == right
        assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in right], abs=1e-3)


def test_frames_that_come_out_of_order_later_on(tmp_path, monkeypatch):
    """What has no place in time is left out."""
    monkeypatch.setattr(video_file, "_PROBED", 1)
    film = write_video(tmp_path / "clip.avi", **SHUFFLED)
    path = copy_video(film, tmp_path / "clip.mkv")
    for sampling in ("uniform", "scene"):
        assert numbers_of(read_frames(film, 100, sampling)) == list(range(12)), "of an AVI it needn't be seen"
        found = numbers_of(read_frames(path, 100, sampling))
        assert found == sorted(set(found))
        assert 6 < len(found) < 12
    with path.open("rb") as file, video_file.open_video(file, "it", 16) as film:
        times = [time for time, _ in film.thumbnails()]
    assert times == sorted(set(times))


def test_times_in_order_are_believed(tmp_path, monkeypatch):
    """Of a codec that may store frames in another order, and didn't: it is sought in."""
    sought, seek = [], video_file._Cursor.seek
    monkeypatch.setattr(video_file._Cursor, "seek", lambda self, *a: sought.append(a) or seek(self, *a))
    path = copy_video(write_video(tmp_path / "clip.mp4", **SHUFFLED | {"gop": 1}), tmp_path / "clip.mkv")
    monkeypatch.setattr(video_file, "_has_delay", lambda stream: True)
    assert numbers_of(read_frames(path, 4)) == [1, 4, 7, 10]
    assert sought


def test_frames_are_scaled_down_one_by_one(tmp_path, monkeypatch):
    """Never are two of them held as they were stored."""
    made_so_far, alive, make = [], [], video_file.VideoFile._frame

    def made(self, stored):
        frame = make(self, stored)
        made_so_far.append(weakref.ref(frame.image))
        alive.append(sum(made() is not None for made in made_so_far))
        return frame

    monkeypatch.setattr(video_file.VideoFile, "_frame", made)
    path = write_video(tmp_path / "clip.mp4")
    frames = read_frames(path, 12, max_pixels=12 * 64 * 48 // 4)
    assert [frame.image.size for frame in frames] == [(32, 24)] * 12
    assert numbers_of(frames) == list(range(12))
    assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in range(12)], abs=1e-3)
    assert len(alive) == 12
    assert max(alive) <= 2, "the one before it is let go after it is made"


def test_only_what_leads_to_a_frame_is_decoded(tmp_path, monkeypatch):
    """Of 120 frames, with a key frame every ten, those from a key frame to the chosen one."""
    decoded, made = [], []
    decode, frame_of = video_file._decode, video_file.VideoFile._frame
    monkeypatch.setattr(video_file, "_decode", lambda s: (decoded.append(frame.pts) or frame for frame in decode(s)))
    monkeypatch.setattr(video_file.VideoFile, "_frame", lambda self, frame: made.append(0) or frame_of(self, frame))
    path = write_video(tmp_path / "clip.mkv", [n // 10 for n in range(120)], codec="mpeg4", gop=10)
    assert numbers_of(read_frames(path, 4)) == [1, 4, 7, 10]  # frames 15, 45, 75, 105
    assert decoded == [100 * (10 * n + step) for n in (1, 4, 7, 10) for step in range(6)]
    assert len(made) == 4


def test_an_index_that_leads_elsewhere(tmp_path, monkeypatch):
    """Then it is decoded from its beginning, once."""
    seek, begun, asked = video_file._Cursor.seek, [], []
    init = video_file._Cursor.__init__
    monkeypatch.setattr(video_file._Cursor, "__init__", lambda self, *a: (begun.append(0), init(self, *a))[1])
    monkeypatch.setattr(
        video_file._Cursor, "seek", lambda self, place, time: asked.append(place) or seek(self, 1100, time)
    )
    frames = read_frames(write_video(tmp_path / "clip.mkv"), 4)
    assert numbers_of(frames) == [1, 4, 7, 10]
    assert (asked, len(begun)) == ([400, 400], 2)  # frame 4 is a key frame, stored as it is seen


def test_a_container_that_leads_into_the_middle(tmp_path, monkeypatch):
    """A transport stream with every frame taken for a key frame: what is decoded from there is no picture."""
    index = video_file._index

    def all_keys(stream, name):
        times, _, *rest = index(stream, name)
        return times, {time: time for time in times}, *rest

    monkeypatch.setattr(video_file, "_index", all_keys)
    assert numbers_of(read_frames(write_video(tmp_path / "clip.ts", [3] * 6 + [5] * 6, gop=50), 4)) == [3, 3, 5, 5]


def test_a_beginning_that_is_cut_off(tmp_path, monkeypatch):
    opened, rewind = [], video_file.VideoFile._rewind
    monkeypatch.setattr(video_file.VideoFile, "_rewind", lambda self: opened.append(0) or rewind(self))
    path = write_video(tmp_path / "clip.mp4", gop=5, cut_ms=300)
    frames = read_frames(path, 12)
    assert numbers_of(frames) == list(range(3, 12))
    assert [frame.time for frame in frames] == pytest.approx([number / 10 for number in range(9)], abs=1e-3)
    opened.clear()
    assert numbers_of(read_frames(path, 3)) == [4, 7, 10]
    assert len(opened) == 2, "for its index and for its frames: nothing led elsewhere"


def test_bytes_and_file_objects(tmp_path):
    path = write_video(tmp_path / "clip.mp4")

    class Pipe(io.BytesIO):
        def seekable(self):
            return False

        def seek(self, *_):
            raise io.UnsupportedOperation

    for source in (str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), Pipe(path.read_bytes())):
        assert numbers_of(read_frames(source, 2)) == [3, 9]
    with path.open("rb") as file:
        assert numbers_of(read_frames(file, 2)) == [3, 9]
        assert not file.closed


def test_a_name_that_ffmpeg_would_take_for_something_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "concat:a%03d|b.mp4"
    write_video(tmp_path / "clip.mp4").rename(tmp_path / name)
    assert numbers_of(read_frames(name, 1)) == [6]


def test_the_colours_are_told_apart():
    assert [number_of(solid(colour)) for colour in COLOURS] == list(range(12))
