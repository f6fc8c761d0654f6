"""Conversations as files: everything comes back, and what can't be read or written is told in a sentence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fastvlm_mlx.errors import InputError, ResolutionError
from support.chats import BLUE, LENGTH, RED

WIDE = np.random.default_rng(5).integers(0, 256, (50, 120, 3), np.uint8)


@pytest.fixture
def plain(speaking_model):
    speaking_model.clear_cache()
    return speaking_model


def test_saved_and_loaded(plain, tmp_path):
    chat, path = plain.chat(RED, system="Be brief.", overflow="drop"), tmp_path / "talk.json"
    chat.ask("One?", **LENGTH)
    chat.add_image(BLUE)
    chat.save(path)
    plain.clear_cache()
    other = plain.load_chat(path)
    assert (other.turns, other.token_ids, other.overflow) == (chat.turns, chat.token_ids, "drop")
    assert [p.digest for p in other.unseen] == [p.digest for p in chat.unseen]
    assert other.ask("Two?", **LENGTH).token_ids == chat.ask("Two?", **LENGTH).token_ids
    other.reset()
    assert [p.digest for p in other.unseen] == [p.digest for p in chat.first]


def test_bad_files_are_told(plain, tmp_path):
    path = tmp_path / "talk.json"
    chat = plain.chat(RED)
    chat.ask("One?", max_tokens=2)
    chat.save(path)
    right = json.loads(path.read_text())
    name = next(iter(right["png"]))
    wrong = {
        "no conversation": {"fastvlm_chat": 2},
        "another tokenizer": {"tokenizer": "0"},
        "damaged": {"exchanges": [{}]},
        "is damaged .*cannot identify": {"png": {name: right["png"][name][:40]}},
        "is damaged": {"png": {}},
    }
    for message, change in wrong.items():
        path.write_text(json.dumps(right | change))
        with pytest.raises(InputError, match=message):
            plain.load_chat(path)
    path.write_text("{")
    with pytest.raises(InputError, match="can't read"):
        plain.load_chat(path)
    with pytest.raises(InputError, match="there is no conversation"):
        plain.load_chat(tmp_path / "none.json")


def test_the_size_and_the_shape_of_images_are_kept(plain, tmp_path):
    chat, path = plain.chat(resolution=128, aspect="crop", overflow="drop"), tmp_path / "talk.json"
    chat.save(path)
    chat.add_image(WIDE)
    other = plain.load_chat(path)
    other.add_image(WIDE)
    assert other.unseen[0].digest == chat.unseen[0].digest
    changed = plain.load_chat(path, resolution=64, aspect="stretch", overflow="error")
    changed.add_image(WIDE)
    right = plain.chat(WIDE, resolution=64, aspect="stretch")
    assert changed.unseen[0].digest == right.unseen[0].digest
    assert changed.overflow == "error"
    with pytest.raises(ResolutionError, match="got 100"):
        plain.load_chat(path, resolution=100)
    with pytest.raises(InputError, match="aspect must be one of"):
        plain.load_chat(path, aspect="round")


def test_a_file_without_a_view_is_read(plain, tmp_path):
    path = tmp_path / "talk.json"
    plain.chat(RED).save(path)
    data = json.loads(path.read_text())
    del data["view"]
    path.write_text(json.dumps(data))
    assert plain.load_chat(path).view == (None, None, None)
    for wrong in ([1], 5, {}):
        path.write_text(json.dumps(data | {"view": wrong}))
        with pytest.raises(InputError, match="is damaged"):
            plain.load_chat(path)


def test_a_bad_view_is_told_before_there_is_an_image(plain):
    with pytest.raises(ResolutionError, match="got 100"):
        plain.chat(resolution=100)
    with pytest.raises(InputError, match="aspect must be one of"):
        plain.chat(aspect="round")


def test_home_is_understood(plain, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    chat = plain.chat()
    chat.ask("One?", max_tokens=2)
    chat.save("~/talks/talk.json")
    assert [path.name for path in tmp_path.iterdir()] == ["talks"]
    assert plain.load_chat("~/talks/talk.json").turns == chat.turns


def test_what_cannot_be_written_is_told(plain, tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path, tmp_path / "file" / "talk.json", tmp_path / "a\0b"):
        with pytest.raises(InputError, match=r"can't save the conversation as .*; choose another file"):
            plain.chat().save(bad)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
