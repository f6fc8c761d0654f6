"""The sets that come with the converter."""

from __future__ import annotations

import hashlib
from functools import partial

from fastvlm_convert.calibration.pictures import HERE, Maker, Pictures, file_picture
from fastvlm_convert.calibration.rendered import extremes, noise, noisy_page, page, screen

# Goes up when the rendered pictures change: their pixels depend on Pillow's version, so they aren't hashed.
RECIPE = 1
PHOTOGRAPHS = ("astronaut.jpg", "chelsea.jpg", "coffee.jpg")
OTHER_PHOTOGRAPHS = ("rocket.jpg",)
_SEED, _OTHER_SEED = 20250728, 592


def built_in() -> Pictures:
    """Seven pictures to calibrate with: three photographs and four rendered ones, the same on every call."""
    return _pictures("built-in", PHOTOGRAPHS, (page, screen, partial(noise, seed=_SEED), partial(extremes, seed=_SEED)))


def verification() -> Pictures:
    """Two pictures that `built_in` lacks: a photograph, and text under noise of another seed."""
    return _pictures("verification", OTHER_PHOTOGRAPHS, (partial(noisy_page, seed=_OTHER_SEED),))


def _pictures(name: str, photographs: tuple[str, ...], rendered: tuple[Maker, ...]) -> Pictures:
    digest = hashlib.sha256(f"{name} recipe {RECIPE}".encode())
    for file in photographs:
        digest.update(hashlib.sha256((HERE / file).read_bytes()).digest())
    makers = tuple(file_picture(HERE / file) for file in photographs)
    return Pictures(name, digest.hexdigest(), (*makers, *rendered))
