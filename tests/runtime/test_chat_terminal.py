"""`fastvlm chat`: whatever is typed, the conversation goes on."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import FastVLM
from fastvlm_mlx.cache import PrefixCache
from fastvlm_mlx.cli import main
from fastvlm_mlx.cli_chat import Terminal
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.pictures import Vision
from support.chats import RED, short_of_context


@pytest.fixture
def plain(speaking_model):
    speaking_model.clear_cache()
    return speaking_model


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 120, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def typed(capsys):
    """Lines -> what is said on stderr about each; the answers go nowhere."""

    def run(chat, *lines, show=lambda _: None):
        capsys.readouterr()
        Terminal(chat, {"max_tokens": 5, "ignore_eos": True}, str, show).run(iter(lines))
        return capsys.readouterr().err.splitlines()

    return run


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_mistake_is_told_and_the_conversation_goes_on(plain, typed, tmp_path, photo):
    chat, file = plain.chat(RED), tmp_path / "file"
    file.write_text("")
    wrong = (f"/save {tmp_path}", f"/save {file}/talk.json", f"/image {tmp_path}", f"/image {photo}.jpg", "/nonsense")
    said = typed(chat, "One?", *wrong, "Two?")
    assert [exchange.question for exchange in chat.exchanges] == ["<image>\nOne?", "Two?"]
    assert len(said) == len(wrong)
    for line, part in zip(said, ("can't save", "can't save", "folder", "doesn't exist", "is no command"), strict=True):
        assert line.startswith("fastvlm: ")
        assert part in line


def test_an_image_where_nothing_can_look_at_it(plain, typed, photo):
    engine = plain.engine
    blind = Engine(engine.decoder, Vision(None, engine.vision.projector, 0), PrefixCache(0))
    chat = FastVLM(plain.config, blind, plain.tokenizer, plain.resolution).chat()
    said = typed(chat, f"/image {photo}", "One?")
    assert "no vision weights" in said[0]
    assert len(chat.exchanges) == len(said) == 1


def test_other_failures_of_the_system_are_told(plain, typed, photo, monkeypatch):
    def failing(*_):
        raise OSError("no such device")

    chat = plain.chat()
    monkeypatch.setattr(plain, "open_images", failing)
    assert typed(chat, f"/image {photo}", "One?") == ["fastvlm: no such device"]
    assert len(chat.exchanges) == 1


def test_ctrl_c_ends_what_is_being_done_and_no_more(plain, typed, photo, monkeypatch):
    chat = plain.chat()
    with monkeypatch.context() as patch:
        patch.setattr(plain, "look", interrupted)
        assert typed(chat, f"/image {photo}") == ["fastvlm: stopped"]
    assert chat.unseen == ()
    at = iter([False, True])  # the second piece
    said = typed(chat, "One?", "Two?", show=lambda _: interrupted() if next(at, False) else None)
    assert said == ["fastvlm: stopped; the question is not part of the conversation"]
    assert [exchange.question for exchange in chat.exchanges] == ["Two?"]


@pytest.mark.parametrize("kind", [BrokenPipeError, OSError])
def test_answers_that_cannot_be_written_end_it(plain, typed, kind):
    def gone(_):
        raise kind

    with pytest.raises(kind):
        typed(plain.chat(), "One?", show=gone)


def test_undo_says_what_it_took_back(plain, typed, photo):
    chat = plain.chat(RED)
    assert typed(chat, f"/image {photo}", "/undo", "One?", f"/image {photo}", "Two?", *["/undo"] * 4) == [
        f"fastvlm: the next question shows {photo}",
        "fastvlm: taken back: 1 image that no question has shown",
        f"fastvlm: the next question shows {photo}",
        "fastvlm: taken back: <image> Two?; the next question shows its 1 image",
        "fastvlm: taken back: 1 image that no question has shown",
        "fastvlm: taken back: <image> One?; the next question shows its 1 image",
        "fastvlm: there is nothing to undo: nothing was said or added yet",
    ]
    assert chat.unseen == chat.first


def test_a_full_context_is_told_when_more_is_left_out(plain, typed, photo, monkeypatch):
    chat = plain.chat(overflow="drop")
    short_of_context(plain, monkeypatch, 130)
    said = []
    while not chat.left_out:
        assert not said
        said = typed(chat, "And?")
    told = "fastvlm: the context is full: the model no longer sees"
    assert said == [f"{told} 1 earlier question; /save keeps them"]
    assert typed(chat, "/undo", "/nonsense")[-1].endswith("/help lists them")
    said = typed(chat, f"/image {photo}", f"/image {photo}", f"/image {photo}")
    assert any(line.startswith(told) for line in said)
    assert typed(chat, "/stats") == ["fastvlm: there is no answer yet"], "not said again"


def test_saved_and_gone_on_with(photo, tmp_path, monkeypatch, capsys):
    """The flags beside --load count, or are refused."""
    file, chats = tmp_path / "talk.json", []
    run = Terminal.run
    monkeypatch.setattr(Terminal, "run", lambda self, lines: (chats.append(self.chat), run(self, lines)))

    def chat(*flags, lines=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        return main(["chat", "--max-tokens", "3", *flags])

    assert chat("--resolution", "128", "--aspect", "crop", lines=f"What?\n/save {file}\n") == 0
    assert (chats[-1].overflow, chats[-1].view) == ("drop", (128, "crop", None))
    assert chat("--load", str(file), lines="And?") == 0
    assert (chats[-1].overflow, chats[-1].view, len(chats[-1].exchanges)) == ("drop", (128, "crop", None), 2)
    assert chat("--load", str(file), "--overflow", "error", "--aspect", "pad", "--resolution", "64") == 0
    assert (chats[-1].overflow, chats[-1].view) == ("error", (64, "pad", None))
    capsys.readouterr()
    for system in ("Be brief.", ""):
        assert chat("--load", str(file), "--system", system) == 2
        assert "--load goes on with the system prompt of that conversation; leave --system" in capsys.readouterr().err
    assert len(chats) == 3
