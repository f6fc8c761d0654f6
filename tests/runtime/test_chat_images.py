"""Several images anywhere in a conversation, against ids that are put together by hand and images in their order."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastvlm_mlx.errors import PromptError
from support.chats import BLUE, RED
from support.work import counted

SHORT = {"max_tokens": 5, "ignore_eos": True}
PHOTO = np.random.default_rng(1).integers(0, 256, (40, 70, 3), np.uint8)
GREEN = np.full((30, 90, 3), (0, 200, 0), np.uint8)


@pytest.fixture
def plain(speaking_model, forgetful):
    forgetful(speaking_model)
    speaking_model.clear_cache()
    return speaking_model


def ids_of(model, *parts: str | tuple[int, ...]) -> list[int]:
    """Ids of a conversation as it is written down; answers as ids. `<image>` and what begins with <| are one id."""
    ids: list[int] = []
    text = ""
    for part in [*parts, ""]:
        if isinstance(part, str):
            text += part
            if part:
                continue
        for piece in re.split(r"(<image>|<\|im_start\|>|<\|im_end\|>)", text):
            if piece == "<image>":
                ids.append(-200)
            elif piece.startswith("<|"):
                ids.append(model.tokenizer.special_id(piece))
            elif piece:
                ids += model.tokenizer.encode(piece)
        text = ""
        ids += part if isinstance(part, tuple) else ()
    return ids


SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def ask(text: str, first: bool = False) -> str:
    before = SYSTEM if first else "<|im_end|>\n"
    return f"{before}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_images_in_any_turn(plain, forgetful):
    """None in the first turn, one, then several between words, the same again, none; each answer as from scratch."""
    chat, scratch = plain.chat(resolution=128), forgetful(plain)
    turns = [
        ("Hello", [], "Hello"),
        ("What is this?", [RED], "<image>\nWhat is this?"),
        ("Is <image> like<image>, or <image>?", [BLUE, PHOTO, RED], "Is <image> like<image>, or <image>?"),
        ("And why?", [], "And why?"),
        ("<image>", [GREEN], "<image>"),
        ("Which differ?", [PHOTO, GREEN], "<image>\n<image>\nWhich differ?"),
    ]
    written: list[str | tuple[int, ...]] = []
    images: list[np.ndarray] = []
    seen: set[bytes] = set()
    for question, added, shown in turns:
        with counted(plain) as work:
            for image in added:
                chat.add_image(image)
            found = chat.ask(question, **SHORT)
        fresh = {image.tobytes() for image in added} - seen
        assert work.images == len(fresh), "each is encoded once, whenever it comes"
        seen |= fresh
        images += added
        written.append(ask(shown, first=not written))
        ids = ids_of(plain, *written)
        assert found.token_ids == scratch.generate(images, ids, resolution=128, **SHORT).token_ids
        assert found.image_tokens == 4 * len(images)
        written.append(found.token_ids)
    swapped = [images[1], images[0], *images[2:]]
    assert scratch.generate(swapped, ids, resolution=128, **SHORT).token_ids != found.token_ids, "their order counts"


def test_saved_between_an_image_and_its_question(plain, forgetful, tmp_path):
    """A text first, images in the second turn and images that wait: all come back, in their order."""
    path = tmp_path / "talk.json"
    chat = plain.chat(resolution=128)
    first = chat.ask("Hello", **SHORT)
    chat.add_image(RED, PHOTO)
    second = chat.ask("Is <image> like <image>?", **SHORT)
    chat.add_image(BLUE)
    chat.add_image(RED)
    chat.save(path)
    plain.clear_cache()
    other = plain.load_chat(path)
    found = other.ask("Put <image> before <image>.", **SHORT)
    written = [ask("Hello", first=True), first.token_ids, ask("Is <image> like <image>?"), second.token_ids]
    ids = ids_of(plain, *written, ask("Put <image> before <image>."))
    right = forgetful(plain).generate([RED, PHOTO, BLUE, RED], ids, resolution=128, **SHORT)
    assert found.token_ids == right.token_ids
    assert chat.ask("Put <image> before <image>.", **SHORT).token_ids == right.token_ids
    assert path.read_text().count("iVBOR") == 3, "a picture that comes twice is written once"
    other.reset()
    assert (other.unseen, other.exchanges) == ((), ())


def test_placeholders_of_a_later_turn_are_its_own(plain):
    """Images of earlier turns aren't placed again, and a mistake changes nothing."""
    chat = plain.chat([RED, BLUE], resolution=128)
    chat.ask("Is <image> like <image>?", **SHORT)
    chat.add_image(PHOTO)
    for wrong in ("<image> and <image> and <image>?", "<image> and <image>?"):
        with pytest.raises(PromptError, match="for 1 image; write one <image> for each, or none"):
            chat.ask(wrong, **SHORT)
    assert (len(chat.exchanges), len(chat.unseen)) == (1, 1)
    assert chat.ask("And <image>?", **SHORT).image_tokens == 12
    with pytest.raises(PromptError, match="has 1 <image> for 0 images"):
        chat.ask("And <image>?", **SHORT)


def test_several_at_once_are_as_one_after_another(plain):
    together, apart = plain.chat(resolution=128), plain.chat(resolution=128)
    with counted(plain) as work:
        together.add_image(RED, BLUE, RED)
    assert work.images == 2
    assert len(work.passes) == 1
    for image in (RED, BLUE, RED):
        apart.add_image(image)
    assert [p.digest for p in together.unseen] == [p.digest for p in apart.unseen]
    assert together.ask("What?", **SHORT).token_ids == apart.ask("What?", **SHORT).token_ids


def test_a_system_prompt_that_spells_a_placeholder_shows_nothing(plain, forgetful):
    found = plain.chat(RED, system="Never say <image>.", resolution=128).ask("What?", **SHORT)
    spelt = tuple(plain.tokenizer.encode("system\nNever say <image>."))
    asked = "<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    ids = ids_of(plain, "<|im_start|>", spelt, asked)
    assert found.token_ids == forgetful(plain).generate(RED, ids, resolution=128, **SHORT).token_ids


def test_placeholders_in_generate(plain, forgetful):
    question = "<image> is first, <image><image> come next, the last is<image>"
    images = [RED, PHOTO, BLUE, GREEN]
    ids = ids_of(plain, ask(question, first=True))
    right = forgetful(plain).generate(images, ids, resolution=128, **SHORT)
    assert plain.generate(images, question, resolution=128, **SHORT).token_ids == right.token_ids
    (batched,) = plain.batch([images], question, resolution=128, **SHORT)
    assert batched.token_ids == right.token_ids
    assert forgetful(plain).generate(images[::-1], ids, resolution=128, **SHORT).token_ids != right.token_ids
