"""What an export keeps of its source: stretched positions, cropping, a package that is carried along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fastvlm_convert import export as module
from fastvlm_convert import export_source
from fastvlm_convert.cli import main
from fastvlm_convert.export import export
from fastvlm_convert.pipeline import convert
from fastvlm_convert.vision_package import Gates
from fastvlm_mlx.bundle import Bundle
from support.layouts import to_apple_mlx, to_transformers

pytest.importorskip("torch", reason="the convert extra isn't installed")
pytest.importorskip("coremltools", reason="the convert extra isn't installed")

PACKAGE = "fastvithd.mlpackage"
EVERY = Gates(every_size=True)
LINEAR = {"rope_type": "linear", "factor": 2.0}


def changed(source: Path, target: Path, **settings: object) -> Path:
    """A copy of a checkpoint whose config says something else."""
    copy = shutil.copytree(source, target)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | settings))
    return copy


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """apple-app without the seconds that a package takes."""

    def add_package(target: Path, *_: object) -> None:
        (target / PACKAGE).mkdir()
        (target / PACKAGE / "Manifest.json").write_text("{}")

    monkeypatch.setattr(module, "add_package", add_package)


@pytest.fixture
def stretched(worded: Callable[[str], Path], tmp_path: Path) -> Path:
    """transformers' layout, where the text's config has it."""
    given = to_transformers(worded("tiny"), tmp_path / "stretched")
    config = config_of(given)
    config["text_config"]["rope_scaling"] = LINEAR
    (given / "config.json").write_text(json.dumps(config))
    return given


def test_stretched_positions_go_to_mlx_vlm(stretched, worded, tmp_path):
    """Under both names of the type: mlx-vlm looks for `type` first, LLaVA's newer readers for `rope_type`."""
    written = export(stretched, "mlx-vlm", tmp_path / "written", gates=EVERY).path
    assert config_of(written)["rope_scaling"] == {"type": "linear", **LINEAR}
    back = Bundle.open(convert(written, tmp_path / "back").path).config
    right = Bundle.open(convert(stretched, tmp_path / "right").path).config
    assert back.decoder == right.decoder
    assert (back.decoder.rope_factor, back.context_length) == (2.0, right.context_length)
    assert "rope_scaling" not in config_of(export(worded("tiny"), "mlx-vlm", tmp_path / "plain").path)


@pytest.mark.parametrize("nested", [{"rope_scaling": LINEAR}, {"rope_parameters": {"rope_theta": 1e6, **LINEAR}}])
def test_stretched_positions_stop_apples_app(worded, tmp_path, capsys, nested):
    given = changed(worded("tiny"), tmp_path / "given", **nested)
    assert main([str(given), "--layout", "apple-app", "-o", str(tmp_path / "out")]) == 2
    assert "stretches positions by rope_scaling 2, at which Apple's app stops; convert it into a bundle" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    written = export(given, "mlx-vlm", tmp_path / "written", gates=EVERY).path
    assert config_of(written)["rope_scaling"] == {"type": "linear", **LINEAR}
    assert "rope_parameters" not in config_of(written)


@pytest.mark.usefixtures("stand_in")
def test_a_scaling_that_changes_nothing_is_left_out(worded, tmp_path):
    """The app stops at any that isn't null."""
    given = changed(worded("tiny"), tmp_path / "given", rope_scaling={"rope_type": "default"}, rope_parameters={})
    written = export(given, "apple-app", tmp_path / "written", gates=EVERY).path
    assert config_of(written).keys().isdisjoint({"rope_scaling", "rope_parameters"})


@pytest.mark.parametrize("layout", ["mlx-vlm", "apple-app"])
@pytest.mark.usefixtures("stand_in")
def test_a_model_that_crops_goes_on_cropping(worded, tmp_path, layout):
    given = changed(worded("tiny"), tmp_path / "given", image_aspect_ratio=None)
    written = export(given, layout, tmp_path / "written", gates=EVERY).path
    assert config_of(written)["image_aspect_ratio"] is None
    assert Bundle.open(convert(written, tmp_path / "back").path).config.aspect == "crop"
    padded = export(worded("tiny"), layout, tmp_path / "padded").path
    assert config_of(padded)["image_aspect_ratio"] == "pad"


@pytest.mark.parametrize("flags", ["--resolutions 128", "--attention batched", "--calibration nowhere"])
def test_a_package_that_is_carried_along_is_not_described(worded, tmp_path, capsys, flags):
    given = to_apple_mlx(worded("tiny"), tmp_path / "given")
    assert main([str(given), "--layout", "apple-app", "-o", str(tmp_path / "out"), *flags.split()]) == 2
    err = capsys.readouterr().err
    assert "has no vision weights to make a Core ML package of, its own is carried along as it is; leave" in err
    assert not (tmp_path / "out").exists()


def test_the_side_of_a_package_that_is_carried_along(subject, worded, tmp_path, monkeypatch):
    """It decides, whatever the tower is called."""
    from fastvlm_convert.coreml_vision import PackageOptions, Size, convert_package
    from fastvlm_convert.ranges import Ranges

    made = subject("tiny")
    given = to_apple_mlx(worded("tiny"), tmp_path / "given")
    shutil.rmtree(given / PACKAGE)
    options = PackageOptions((Size(128, 128),), min_target="macOS13", interface="tensor", range_safety=False)
    convert_package(made.config, made.weights, given / PACKAGE, options, Ranges())
    assert config_of(given)["mm_vision_tower"] == "mobileclip_l_256"
    written = export(given, "apple-app", tmp_path / "written", gates=EVERY).path
    assert config_of(written)["mm_vision_tower"] == "mobileclip_l_128"
    pictures = json.loads((written / "preprocessor_config.json").read_text())
    assert pictures["crop_size"] == {"height": 128, "width": 128}
    assert export_source.package_side(tmp_path / "nowhere") is None


@pytest.mark.usefixtures("stand_in")
def test_a_head_that_equals_the_embedding_is_no_fault(worded, tmp_path):
    """Apple's files have it beside a tied embedding, and say that it isn't tied: true of the file."""
    written = export(worded("tiny"), "apple-app", tmp_path / "written").path
    assert config_of(written)["tie_word_embeddings"] is False
    back = convert(written, tmp_path / "back")
    assert [warning for warning in back.warnings if "tie_word_embeddings" in warning] == []
    assert Bundle.open(back.path).config.decoder.tie_word_embeddings
    without = changed(worded("tiny"), tmp_path / "without", tie_word_embeddings=False)
    [warning] = [w for w in convert(without, tmp_path / "c").warnings if "tie_word_embeddings" in w]
    assert "says tie_word_embeddings=False, but the checkpoint has no head besides the embedding" in warning
