"""What is no video, or a damaged one: a sentence each, and whatever can still be decoded."""

from __future__ import annotations

import contextlib
import io
import sys
import wave

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import read_frames
from fastvlm_mlx.errors import ImageError, MissingDependencyError
from support.videos import COLOURS, solid, write_video

av = pytest.importorskip("av", reason="the video extra isn't installed")


def write_sound(path):
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(4000))


def song_with_a_cover(path):
    """An MP3 after an ID3 tag with a picture, which FFmpeg takes for a video stream."""
    jpeg = io.BytesIO()
    solid(COLOURS[1]).save(jpeg, "JPEG")
    content = b"\0image/jpeg\0\x03\0" + jpeg.getvalue()
    tag = b"APIC" + len(content).to_bytes(4, "big") + b"\0\0" + content
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp3", options={"id3v2_version": "0"}) as out:
        stream = out.add_stream("libmp3lame", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), format="s16", layout="mono")
        frame.rate = 44100
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    size = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
    path.write_bytes(b"ID3\x03\0\0" + size + tag + sound.getvalue())


def test_what_is_no_video(tmp_path):
    good = write_video(tmp_path / "good.mp4").read_bytes()
    write_sound(tmp_path / "sound.mp4")
    song_with_a_cover(tmp_path / "song.mp3")
    write_video(tmp_path / "video.h264", codec="libx264")
    for name, data in {"empty.mp4": b"", "text.mp4": b"hello world" * 50, "cut.mp4": good[: len(good) // 2]}.items():
        (tmp_path / name).write_bytes(data)
    wrong = {
        "none.mp4": "video .*none.mp4 doesn't exist; check the path",
        "empty.mp4": "video .*empty.mp4 is empty or no video that PyAV reads",
        "text.mp4": "is empty or no video that PyAV reads",
        "cut.mp4": "no video that PyAV reads|it may be truncated",  # what it holds stands at the end of an MP4
        "sound.mp4": "has no pictures, only sound or other data; give a file with a video track",
        "song.mp3": "has no pictures, only sound or other data",
        "video.h264": "has no timestamps; put it into a container such as MP4",
        "a\0b.mp4": "can't be read .*check the path",
    }
    for name, message in wrong.items():
        with pytest.raises(ImageError, match=message):
            read_frames(tmp_path / name)
    with pytest.raises(ImageError, match="the video file object "):
        read_frames(io.BytesIO(b"GIF89a"))
    with pytest.raises(ImageError, match="is an address; download"):
        read_frames("https://example.com/clip.mp4")


def test_a_damaged_file(tmp_path):
    """What can be decoded of it, or a sentence; never another error."""
    data = bytearray(write_video(tmp_path / "clip.mkv").read_bytes())
    rng = np.random.default_rng(0)
    for _ in range(30):
        bad = data.copy()
        for place in rng.integers(0, len(bad), 20):
            bad[place] = rng.integers(256)
        for sampling in ("uniform", "scene"):
            with contextlib.suppress(ImageError):
                assert len(read_frames(bytes(bad), 4, sampling)) <= 4


def test_without_the_extra(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"needs PyAV: pip install 'fastvlm-mlx\[video\]'"):
        read_frames(path)
    Image.new("RGB", (8, 8)).save(tmp_path / "one.gif")
    assert len(read_frames(tmp_path / "one.gif")) == 1
