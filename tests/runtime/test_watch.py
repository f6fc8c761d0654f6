"""A live source: always the newest frame, nothing queued, an end to the reading."""

from __future__ import annotations

import io
import itertools
import threading

import numpy as np
import pytest

from fastvlm_mlx import Frame, watch
from fastvlm_mlx.errors import ImageError, InputError, PromptError, ResolutionError
from support.camera import PATIENCE_S, Camera
from support.chats import BLUE, RED
from support.work import counted

PROMPT = [5, 6, 7, -200, 8, 9]
SHORT = {"max_tokens": 3, "ignore_eos": True, "resolution": 128}  # 4 tokens an image
GREY = [np.full((40, 40, 3), value, np.uint8) for value in (0, 50, 100, 150, 200)]


class Capture:
    """As OpenCV's."""

    def read(self):
        return True, RED


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "fastvlm-watch"]


@pytest.fixture
def camera(monkeypatch):
    """It shows nothing by itself, so nobody need wait for it when a watch is closed."""
    monkeypatch.setattr(watch, "PATIENCE_S", 0.0)
    camera = Camera()
    yield camera
    if camera.thread:
        camera.put(StopIteration())
        camera.join()
    assert not readers()


def test_the_newest_frame_is_answered_and_those_before_it_are_dropped(tiny, forgetful, camera):
    camera.put(RED)
    with counted(tiny) as work:
        watching = tiny.watch(camera, PROMPT, **SHORT)
        first = next(watching)
        camera.show(GREY[1], GREY[2], BLUE)
        second = next(watching)
    assert [(answer.index, answer.dropped) for answer in (first, second)] == [(0, 0), (3, 2)]
    assert work.images == 2, "what is dropped costs nothing"
    assert first.frame is RED
    assert second.frame is BLUE
    for answer, image in ((first, RED), (second, BLUE)):
        assert answer.result.token_ids == forgetful(tiny).generate(image, PROMPT, **SHORT).token_ids


def test_frames_that_come_while_an_answer_is_under_way(tiny, camera):
    """Here, while its question is being made."""

    def prompt(index):
        if index == 0:
            camera.show(*GREY[1:4])
        return PROMPT

    camera.put(GREY[0])
    watching = tiny.watch(camera, prompt, **SHORT)
    assert [(answer.index, answer.dropped) for answer in (next(watching), next(watching))] == [(0, 0), (3, 2)]
    camera.put(GREY[4], StopIteration())
    assert [(answer.index, answer.dropped) for answer in watching] == [(4, 0)]


def test_the_last_frame_is_answered(tiny, camera):
    camera.put(GREY[0])
    watching = tiny.watch(camera, PROMPT, **SHORT)
    next(watching)
    camera.show(*GREY[1:4])
    camera.end()
    assert [(answer.index, answer.dropped) for answer in watching] == [(3, 2)]
    assert list(tiny.watch([], PROMPT)) == []


def test_latency_counts_from_the_arrival(tiny, camera, monkeypatch):
    time_s = [100.0]
    monkeypatch.setattr(watch, "now_s", lambda: time_s[0])

    def prompt(index):
        time_s[0] += 0.25  # making the question is a part of answering
        if index == 0:
            camera.show(GREY[1])
            time_s[0] += 1
        return PROMPT

    def show_late():
        camera.settle()
        time_s[0] = 102.0
        camera.put(GREY[0])

    watching = tiny.watch(camera, prompt, **SHORT)
    shower = threading.Thread(target=show_late)
    shower.start()
    first = next(watching)
    shower.join(PATIENCE_S)
    time_s[0] += 4  # somebody looks at the answer
    second = next(watching)
    assert (first.arrived, first.latency) == (2.0, 1.25)
    assert first.ttft == first.result.timings.ttft  # it was asked about at once
    assert (second.arrived, second.latency) == (2.25, 5.25)  # it came during the first answer, at 102.25
    assert second.ttft == 5.0 + second.result.timings.ttft


def test_a_question_for_each_frame(tiny, forgetful, camera):
    camera.put(RED)
    watching = tiny.watch(camera, lambda index: [index + 3, -200, 4], **SHORT)
    next(watching)
    camera.show(RED)
    found = next(watching)
    assert found.result.token_ids == forgetful(tiny).generate(RED, [4, -200, 4], **SHORT).token_ids


def test_an_error_of_the_source_comes_after_its_frames(tiny, camera):
    camera.put(GREY[0])
    watching = tiny.watch(camera, PROMPT, **SHORT)
    next(watching)
    camera.show(GREY[1])
    camera.end(OSError("unplugged"))
    assert next(watching).index == 1
    with pytest.raises(OSError, match="unplugged"):
        next(watching)
    assert list(watching) == []


BROKEN = [np.zeros((4, 4), np.uint8), b"\xff\xd8\xff broken", None]


def test_frames_that_are_no_images_are_dropped(tiny, forgetful, monkeypatch, caplog):
    """As cameras and networks give them at times."""
    monkeypatch.setattr(watch, "Newest", Patient)
    numpys, jpeg, nothing = BROKEN
    found = list(tiny.watch([GREY[0], nothing, RED, jpeg, numpys, RED, BLUE, nothing], PROMPT, **SHORT))
    assert [(answer.index, answer.dropped) for answer in found] == [(0, 0), (2, 1), (5, 2), (6, 0)]
    for answer in found:
        assert answer.result.token_ids == forgetful(tiny).generate(answer.frame, PROMPT, **SHORT).token_ids
    messages = [record.getMessage() for record in caplog.records if record.name == "fastvlm_mlx"]
    assert len(messages) == 3, "one for each row of them"
    assert all(message.startswith("a frame is left out: ") for message in messages)


def test_a_source_without_images(tiny, monkeypatch, caplog):
    """A few are a camera's; many in a row, or nothing else, are a mistake. The log has the first of a row."""
    monkeypatch.setattr(watch, "MOST_UNREADABLE", 4)
    monkeypatch.setattr(watch, "Newest", Patient)
    with pytest.raises(ImageError, match=r"the image .* is empty or no image that Pillow reads"):
        list(tiny.watch([b"broken"], PROMPT, **SHORT))
    assert len(list(tiny.watch([b"", b"", b"", RED, b"", b"", b""], PROMPT, **SHORT))) == 1
    source = iter([RED, *[b"broken"] * 5])
    caplog.clear()
    with pytest.raises(ImageError, match="4 frames in a row can't be decoded; of the last one: the image"):
        list(tiny.watch(source, PROMPT, **SHORT))
    assert len(caplog.records) == 1
    assert len(list(source)) == 1


class Patient:
    """A source whose every frame is asked about."""

    def __init__(self, frames):
        self._frames = enumerate(frames)

    def take(self):
        found = next(self._frames, None)
        return found and watch._Arrival(*found, watch.now_s())

    def close(self):
        pass


def test_an_image_error_of_the_question_is_not_the_frames(tiny, monkeypatch):
    def prompt(index):
        raise ImageError("of another picture")

    monkeypatch.setattr(watch, "Newest", Patient)
    with pytest.raises(ImageError, match="of another picture"):
        list(tiny.watch([RED, RED], prompt, **SHORT))


def test_tiles(tiled):
    options = {"max_tokens": 3, "ignore_eos": True, "aspect": "anyres", "resolution": 64}
    tokens = {}
    for grid in ("2x2", "1x3"):
        (found,) = tiled.watch([RED], PROMPT, grid=grid, **options)
        right = tiled.generate(RED, PROMPT, grid=grid, **options)
        assert (found.result.token_ids, found.result.image_tokens) == (right.token_ids, right.image_tokens)
        tokens[grid] = right.image_tokens
    assert tokens["2x2"] != tokens["1x3"]


def test_closing_ends_the_reading(tiny, camera):
    camera.put(GREY[0])
    watching = tiny.watch(camera, PROMPT, **SHORT)
    next(watching)
    camera.settle()
    watching.close()
    assert camera.thread.is_alive(), "nobody can end a read that has begun"
    assert camera.thread.daemon, "and it doesn't keep the process from ending"
    camera.put(GREY[1])
    camera.join()
    assert camera.reads == 2


def test_closing_waits_for_a_read_that_is_under_way(tiny, monkeypatch):
    """Whoever has closed a watch may release the camera."""
    monkeypatch.setattr(watch, "PATIENCE_S", PATIENCE_S)
    reading, closing = threading.Event(), threading.Event()

    def source():
        yield GREY[0]
        reading.set()
        assert closing.wait(PATIENCE_S)
        yield GREY[1]

    close = watch.Newest.close
    monkeypatch.setattr(watch.Newest, "close", lambda self: (closing.set(), close(self)))
    watching = tiny.watch(source(), PROMPT, **SHORT)
    next(watching)
    assert reading.wait(PATIENCE_S)
    assert readers()
    watching.close()
    assert not readers()


def test_an_error_of_the_caller_ends_the_reading(tiny, camera):
    def look():
        for _ in tiny.watch(camera, PROMPT, **SHORT):
            raise KeyError

    camera.put(GREY[0])
    with pytest.raises(KeyError):
        look()
    camera.put(GREY[1])
    camera.join()


def test_texts_options_and_frames(default_model, forgetful):
    """As generate has them."""
    options = {"max_tokens": 4, "ignore_eos": True, "aspect": "crop", "system": "Hm.", "resolution": 64}
    frame = Frame(RED, 1.5)
    (found,) = default_model.watch([frame], "What <image> is it?", **options)
    assert found.frame is frame
    right = forgetful(default_model).generate(RED, "What <image> is it?", **options)
    assert found.result.token_ids == right.token_ids
    assert str(found) == right.text


def test_what_is_refused_at_once(tiny):
    for frames in ("clip.mp4", b"", bytearray(), io.BytesIO()):
        with pytest.raises(
            InputError, match=r"come from an iterable of images; got .*; read_frames has those of a file"
        ):
            tiny.watch(frames, PROMPT)
    for frames in (5, None, Capture()):
        with pytest.raises(
            InputError, match=r"got .*; give a generator that reads it and yields RGB images, for OpenCV's"
        ):
            tiny.watch(frames, PROMPT)
    camera, bgr = Capture(), RED[..., ::-1]
    frames = (camera.read()[1][..., ::-1] for _ in itertools.count())  # as the message has it
    np.testing.assert_array_equal(next(frames), bgr)
    with pytest.raises(ResolutionError):
        tiny.watch([RED], PROMPT, resolution=100)
    with pytest.raises(InputError, match="max_tokens"):
        tiny.watch([RED], PROMPT, max_tokens=0)
    with pytest.raises(PromptError):
        next(tiny.watch([RED], [5, 6]))
