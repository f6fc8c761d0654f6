"""Folders of images for `fastvlm caption`, and what it wrote about them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

OPTIONS = ["--resolution", "64", "--max-tokens", "4"]


def write_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for seed in range(count):
        pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed:03}.png")
    return folder


def entries(path: Path) -> dict[str, str]:
    """Answers by image; each image once."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["image"] for line in lines}) == len(lines)
    return {line["image"]: line["text"] for line in lines}


def damaged_avif() -> bytes:
    """A file whose header is right; Pillow's decoder raises RuntimeError at the rest."""
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "avif")
    data = out.getvalue()
    start = data.index(b"mdat") + 4
    return data[:start] + b"\xff" * (len(data) - start)
