"""Frames in questions, conversations and commands: encoded once, by their content."""

from __future__ import annotations

import io
import sys

import pytest

from fastvlm_mlx import load, read_frames, video
from fastvlm_mlx.cli import main
from fastvlm_mlx.cli_chat import Terminal
from fastvlm_mlx.errors import ContextLengthError
from fastvlm_mlx.image import preprocess
from fastvlm_mlx.pictures import picture_of
from support.chats import short_of_context
from support.videos import COLOURS, solid, write_animation, write_video
from support.work import counted

SHORT = {"max_tokens": 4, "ignore_eos": True, "resolution": 128}  # 4 tokens an image


@pytest.fixture
def plain(speaking_model):
    speaking_model.clear_cache()
    return speaking_model


@pytest.fixture
def clip(tmp_path):
    return write_animation(tmp_path / "clip.gif", [100] * 6)


def test_a_second_question_about_a_clip_encodes_nothing(plain, forgetful, clip):
    with counted(plain) as work:
        first = plain.generate(read_frames(clip, 4), "What happens?", **SHORT)
    assert (work.images, first.image_tokens) == (4, 16)
    with counted(plain) as work:
        second = plain.generate(read_frames(clip, 4), "What happens then?", **SHORT)  # read again
    assert work.images == 0
    assert second.cached_tokens > 16
    images = [solid(COLOURS[number]) for number in (0, 2, 3, 5)]  # centres 0.75, 2.25, 3.75, 5.25
    for found, question in ((first, "What happens?"), (second, "What happens then?")):
        assert found.token_ids == forgetful(plain).generate(images, question, **SHORT).token_ids


def test_a_second_question_about_a_video_encodes_nothing(plain, tmp_path):
    pytest.importorskip("av", reason="the video extra isn't installed")
    path = write_video(tmp_path / "clip.mp4")
    for images in (8, 0):
        with counted(plain) as work:
            assert plain.generate(read_frames(path), "What happens?", **SHORT).image_tokens == 32
        assert work.images == images


def test_equal_frames_are_encoded_once(plain, tmp_path):
    for number, colour in enumerate([0, 0, 5, 0, 5, 5]):
        solid(COLOURS[colour]).save(tmp_path / f"{number}.png")
    with counted(plain) as work:
        assert plain.generate(read_frames(tmp_path), "What happens?", **SHORT).image_tokens == 24
    assert work.images == 2


def test_frames_in_a_batch(plain, clip):
    frames = read_frames(clip, 3)
    together = plain.batch([frames, frames[0], None], "What is it?", **SHORT)
    assert [found.image_tokens for found in together] == [12, 4, 0]
    assert together[0].token_ids == plain.generate(frames, "What is it?", **SHORT).token_ids


def test_a_chat_about_a_clip(plain, forgetful, clip, tmp_path):
    frames = read_frames(clip, 3)
    chat = plain.chat(resolution=128)
    chat.ask("Hello", max_tokens=4)
    with counted(plain) as work:
        chat.add_image(*frames)
    assert work.images == 3
    before = chat.token_ids
    with counted(plain) as work:
        found = chat.ask("What happens?", max_tokens=4)
    assert work.images == 0
    chat.save(tmp_path / "talk.json")
    asked = chat.exchanges[-1].asked
    right = forgetful(plain).generate([f.image for f in frames], [*before, *asked], max_tokens=4, resolution=128)
    assert found.token_ids == right.token_ids
    assert [p.digest for p in plain.load_chat(tmp_path / "talk.json").pictures] == [p.digest for p in chat.pictures]
    assert len(chat.undo().pictures) == 3


def test_all_frames_are_added_or_none(plain, clip, monkeypatch):
    chat = plain.chat(resolution=128)
    short_of_context(plain, monkeypatch, 60)
    with pytest.raises(ContextLengthError):
        chat.add_image(*read_frames(clip, 6))
    assert chat.unseen == ()
    chat.add_image()
    assert chat.unseen == ()
    chat.add_image(*read_frames(clip, 2))
    assert len(chat.unseen) == 2


@pytest.fixture
def photo(tmp_path):
    solid(COLOURS[7]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_command(clip, photo, capsys):
    options = ["--prompt", "What is <image>, <image> and <image>?", "--max-tokens", "4", "--resolution", "128"]
    assert main(["generate", "--video", str(clip), "--frames", "2", "--image", str(photo), *options]) == 0
    images = [photo, solid(COLOURS[1]), solid(COLOURS[4])]  # images come first; centres 1.5 and 4.5
    right = load(resolution=128).generate(images, "What is <image>, <image> and <image>?", max_tokens=4)
    assert capsys.readouterr().out == right.text + "\n"


def test_the_command_by_scenes(tmp_path, capsys):
    for number, colour in enumerate([0, 0, 0, 0, 5, 7]):
        solid(COLOURS[colour]).save(tmp_path / f"{number}.png")
    argv = ["generate", "--video", str(tmp_path), "--frames", "3", "--max-tokens", "4", "--resolution", "128"]
    assert main([*argv, "--sampling", "scene"]) == 0
    images = [solid(COLOURS[number]) for number in (0, 5, 7)]
    right = load(resolution=128).generate(images, "Describe the image.", max_tokens=4)
    assert capsys.readouterr().out == right.text + "\n"


def test_what_the_command_refuses(clip, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastvlm_mlx.loading.load", lambda *_, **__: pytest.fail("a model was loaded for nothing"))
    (tmp_path / "folder").mkdir()
    for argv, message in (
        (["--video", str(tmp_path / "none.gif")], "none.gif doesn't exist; check the path"),
        (["--video", str(clip), "--frames", "0"], "frames must be a whole number, 1 or more, got 0"),
        (["--video", str(tmp_path / "folder")], "folder has no pictures"),
        ([], "give --image FILE, --prompt TEXT, or both; --video FILE"),
        (["--video", ""], "the name of the video is empty; give a file"),
        (["--image", ""], "--image has an empty name; give a file"),
        (["--prompt", "Hm?", "--frames", "8"], "--frames and --sampling choose frames of a video; give --video FILE"),
        (["--image", str(clip), "--sampling", "uniform"], "--frames and --sampling choose frames of a video"),
    ):
        assert main(["generate", *argv]) == 2
        assert message in capsys.readouterr().err
    assert main(["chat", "--load", "talk.json", "--video", str(clip)]) == 2
    assert "add others with /image or /video" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["generate", "--video", str(clip), "--sampling", "random"])
    assert "invalid choice: 'random'" in capsys.readouterr().err


def test_several_videos_share_the_memory_of_one(clip, tmp_path, monkeypatch):
    asked, read = [], video.read_frames
    monkeypatch.setattr(video, "read_frames", lambda *args: asked.append(args) or read(*args))
    argv = ["generate", "--video", str(clip), "--video", str(clip), "--max-tokens", "1", "--resolution", "64"]
    assert main(argv) == 0
    assert asked == [(str(clip), 8, "uniform", video.MAX_PIXELS // 2)] * 2


def test_help_says_what_the_weights_were_not_trained_for(capsys):
    for command in ("generate", "chat"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "trained on single ones, not on videos" in " ".join(capsys.readouterr().out.split())


def test_a_chat_at_the_terminal(plain, clip, photo, tmp_path, capsys):
    chat = plain.chat(resolution=128)
    lines = [f"/video {clip}", f"/image {photo}", "What?", f"/video {tmp_path}/no.gif", "/undo", "/undo", "/video"]
    Terminal(chat, {"max_tokens": 3}, str, lambda _: None, lambda name: read_frames(name, 2)).run(iter(lines))
    assert capsys.readouterr().err.splitlines() == [
        f"fastvlm: the next question shows 2 frames of {clip}",
        f"fastvlm: the next question shows {photo}",
        f"fastvlm: video {tmp_path}/no.gif doesn't exist; check the path",
        "fastvlm: taken back: <image> <image> <image> What?; the next question shows its 3 images",
        "fastvlm: taken back: 3 images that no question has shown",
        "fastvlm: /video is no command; /help lists them",
    ]


def test_flags_reach_the_chat(clip, monkeypatch, capsys):
    chats, run = [], Terminal.run
    monkeypatch.setattr(Terminal, "run", lambda self, lines: (chats.append(self.chat), run(self, lines)))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"/video {clip}\nWhat?\n"))
    argv = ["chat", "--video", str(clip), "--frames", "3", "--max-tokens", "2", "--resolution", "128"]
    assert main([*argv, "--sampling", "scene"]) == 0
    (exchange,) = chats[0].exchanges
    # Between frames 1 and 2 two channels change, between 3 and 4 all three, else one.
    right = [picture_of(preprocess(solid(COLOURS[number]), 128)).digest for number in (0, 2, 4)]
    assert [picture.digest for picture in exchange.pictures] == right * 2
