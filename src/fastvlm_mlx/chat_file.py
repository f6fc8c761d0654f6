"""A conversation as a file: JSON, with the pictures as the encoder sees them, wherever they came from."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fastvlm_mlx import prompt as prompts
from fastvlm_mlx.chat import Chat, Exchange
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import write_text
from fastvlm_mlx.pictures import Picture, picture_of
from fastvlm_mlx.vision.anyres import NO_NEWLINE, Layout

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM

FORMAT = 1


def write_chat(path: Path, chat: Chat) -> None:
    """Write a conversation; a file that is there is replaced at once, or not at all.

    Raises:
        InputError: it can't be written there.
    """
    pictures = {p.digest.hex(): p for p in (*chat.pictures, *chat.unseen, *chat.first)}
    data = {
        "fastvlm_chat": FORMAT,
        "tokenizer": chat.tokenizer_digest,
        "template": chat.template,
        "system": chat.system[0].text if chat.system else "",
        "overflow": chat.overflow,
        "view": chat.view,
        "exchanges": [
            {
                "question": exchange.question,
                "pictures": _names(exchange.pictures),
                "asked": exchange.asked,
                "answer": exchange.answer,
                "answered": exchange.answered,
            }
            for exchange in chat.exchanges
        ],
        "unseen": _names(chat.unseen),
        "first": _names(chat.first),
        "png": {name: _to_png(picture.make_pixels()) for name, picture in pictures.items()},
        "tiles": {name: asdict(picture.layout) for name, picture in pictures.items() if picture.layout},
    }
    text = json.dumps(data, ensure_ascii=False) + "\n"
    try:
        write_text(path, text)
    except (OSError, ValueError) as exc:  # ValueError: a name that no file can have
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else exc
        raise InputError(f"can't save the conversation as {path}: {why}; choose another file") from exc


def read_chat(
    path: Path,
    model: FastVLM,
    resolution: int | None = None,
    aspect: str | None = None,
    overflow: str | None = None,
    grid: str | None = None,
) -> Chat:
    """Read a conversation.

    Args:
        path: of the file.
        model: goes on with it.
        resolution: as in `FastVLM.chat`; default what the file says, as with the others.
        aspect: likewise.
        overflow: likewise.
        grid: likewise, where `aspect` isn't given.

    Raises:
        InputError: no such file, not one of ours, damaged, or of a model with another tokenizer.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise InputError(f"there is no conversation {path}; check the path") from exc
    except (OSError, ValueError) as exc:
        raise InputError(f"can't read the conversation {path}: {exc}") from exc
    if not isinstance(data, dict) or data.get("fastvlm_chat") != FORMAT:
        raise InputError(f"{path} is no conversation of this version; expected one that Chat.save wrote")
    try:
        side, shape, *tiles = data.get("view", (None, None))  # older files have none, or one without a grid
        tiled = tiles[0] if grid is None and aspect in (None, shape) and tiles else grid
        side, shape = side if resolution is None else resolution, shape if aspect is None else aspect
        chat = Chat(model, (), data["system"], side, shape, data["overflow"] if overflow is None else overflow, tiled)
        return _restore(chat, data, model, path)
    except (KeyError, TypeError, ValueError, OSError) as exc:
        raise InputError(f"the conversation {path} is damaged ({type(exc).__name__}: {exc}); begin a new one") from exc


def _restore(chat: Chat, data: dict[str, Any], model: FastVLM, path: Path) -> Chat:
    if data["tokenizer"] != chat.tokenizer_digest:
        raise InputError(f"{path} is of a model with another tokenizer; load that model, or begin a new conversation")
    if (written := data.get("template", "chatml")) != chat.template:  # older files are all in ChatML
        raise InputError(
            f"{path} is written as {written}, this model's prompts are {chat.template}; load its own model"
        )
    layouts = dict(data.get("tiles", {}))  # older files have none
    known = {name: _from_png(text, layouts.get(name), model.config.downsampling) for name, text in data["png"].items()}
    if model.engine.vision.projector.newline is None and any(p.needs_newline for p in known.values()):
        raise InputError(f"{path} has images whose {NO_NEWLINE.partition(';')[0]}; load the model that it began with")
    if wrong := [name for name, picture in known.items() if picture.digest.hex() != name]:
        raise ValueError(f"picture {wrong[0]} is another one")

    def pictures(names: Sequence[str]) -> tuple[Picture, ...]:
        return tuple(known[name] for name in names)

    chat.exchanges = tuple(
        Exchange(
            str(entry["question"]),
            pictures(entry["pictures"]),
            tuple(map(int, entry["asked"])),
            str(entry["answer"]),
            tuple(map(int, entry["answered"])),
        )
        for entry in data["exchanges"]
    )
    chat.unseen, chat.first = pictures(data["unseen"]), pictures(data["first"])
    # Not against the context: what no longer fits is there as well.
    prompts.expand(chat.token_ids, [picture.tokens for picture in chat.pictures], model.config.decoder.vocab_size)
    return chat


def _names(pictures: Sequence[Picture]) -> list[str]:
    return [picture.digest.hex() for picture in pictures]


def _to_png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.reshape(-1, *pixels.shape[-2:])).save(file, "PNG")  # tiles below each other
    return base64.b64encode(file.getvalue()).decode()


def _from_png(text: str, tiles: dict[str, Any] | None, downsampling: int) -> Picture:
    with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    if tiles is None:
        return picture_of(pixels, downsampling=downsampling)
    layout = Layout(**{**tiles, "size": tuple(tiles["size"])})
    return picture_of(pixels.reshape(layout.tiles, layout.side, layout.side, 3), layout)
