"""Core ML packages and bundles as the converter makes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvlm_convert import export, verify, vision_package
from fastvlm_convert.cli import main
from fastvlm_convert.coreml_vision import PackageOptions, Size, convert_package
from fastvlm_convert.gates import Subject
from fastvlm_convert.ranges import Ranges
from support.folded import folded_vision
from support.tokenizers import with_tokenizer
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


@pytest.fixture(scope="session", autouse=True)
def _without_core_ml() -> Iterator[None]:
    """On a Mac too: what Core ML itself makes of a package is for the tests marked `apple`."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (vision_package, verify, export):
            patch.setattr(module, "core_ml", lambda: None)
        yield


@pytest.fixture(scope="session")
def converted(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fastvlm-convert` makes of tiny, with three sizes and every gate; don't change it."""
    target = tmp_path_factory.mktemp("converted") / "tiny"
    argv = [str(checkpoint("tiny")), "-o", str(target), "--resolutions", "128,256,128x192", "--verify"]
    assert main(argv) == 0
    return target


@pytest.fixture(scope="session")
def worded(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Preset -> its checkpoint with a tokenizer that has a place for `<image>`; don't change it."""
    made: dict[str, Path] = {}

    def get(preset: str) -> Path:
        if preset not in made:
            made[preset] = with_tokenizer(checkpoint(preset), tmp_path_factory.mktemp("sources") / preset)
        return made[preset]

    return get
