"""Packages as the converter makes them, for the tests of their gates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm_convert.coreml_vision import PackageOptions, Size, convert_package
from fastvlm_convert.gates import Subject
from fastvlm_convert.ranges import Ranges
from support.folded import folded_vision
from support.wrong_packages import SQUARE, WIDE


@pytest.fixture(scope="session")
def subject(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Subject]:
    """(preset, bits, sizes) -> a package without range safety; made once, don't change it."""
    made: dict[tuple[str, int, tuple[Size, ...]], Subject] = {}

    def get(preset: str = "tiny", bits: int = 16, sizes: tuple[Size, ...] = (SQUARE, WIDE)) -> Subject:
        key = (preset, bits, sizes)
        if key not in made:
            config, weights = folded_vision(checkpoint(preset))
            options = PackageOptions(sizes=sizes, bits=bits, range_safety=False)
            target = tmp_path_factory.mktemp("packages") / f"{preset}.mlpackage"
            convert_package(config, weights, target, options, Ranges())
            made[key] = Subject(target, config, weights, options, Ranges())
        return made[key]

    return get
