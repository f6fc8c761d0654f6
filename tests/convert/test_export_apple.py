"""`--layout apple-app`: Apple's own names, and a Core ML package with Apple's interface that stays within float16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer

from fastvlm_convert import export as module
from fastvlm_convert.cli import main
from fastvlm_convert.coreml_vision import Size
from fastvlm_convert.export import ExportPackage, export
from fastvlm_convert.options import Options
from fastvlm_convert.pipeline import convert
from fastvlm_convert.vision_package import Gates
from fastvlm_mlx.bundle import Bundle, read_tensors
from fastvlm_mlx.errors import CheckpointError, VerificationError
from fastvlm_mlx.loading import assemble
from fastvlm_mlx.manifest import CoreMLRecord, Manifest
from support.layouts import to_apple_mlx
from support.seeded import golden, golden_prompt, relative_l2

pytest.importorskip("torch", reason="the convert extra isn't installed")
pytest.importorskip("coremltools", reason="the convert extra isn't installed")

from fastvlm_convert.gates import unit_pixels
from fastvlm_convert.mil_check import Execution, execute, open_package
from fastvlm_convert.mil_check.runtime import CheckerRuntime

PACKAGE = "fastvithd.mlpackage"
# Each op rounded to float16, against float32: the converter's own gate.
HALF_GATE = 5e-3


@pytest.fixture(scope="module")
def written(worded: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Preset -> what the command writes, every check included; don't change it."""
    made: dict[str, Path] = {}

    def get(preset: str) -> Path:
        if preset not in made:
            target = tmp_path_factory.mktemp("written") / preset
            with pytest.MonkeyPatch.context() as patch:
                if preset == "tiny-untied":
                    give_again(get("tiny"), patch)
                # tiny-hot misses the gate at 256 px by chance, in bundles too: see test_coreml_vision.py.
                flags = ["--force"] if preset == "tiny-hot" else ["--verify"]
                assert main([str(worded(preset)), "--layout", "apple-app", "-o", str(target), *flags]) == 0
            made[preset] = target
        return made[preset]

    return get


def give_again(folder: Path, patch: pytest.MonkeyPatch, record: CoreMLRecord | None = None) -> None:
    """Take the package of another export, whose making takes seconds; tiny-untied has tiny's FastViTHD."""
    record = record or Manifest.from_file(folder / "manifest.json").coreml

    def add_package(target: Path, *_: object) -> object:
        shutil.copytree(folder / PACKAGE, target / PACKAGE)
        return record

    patch.setattr(module, "add_package", add_package)


@pytest.fixture
def made_before(written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export gets tiny's package."""
    give_again(written("tiny"), monkeypatch)


def same_tensors(found: Path, right: Path) -> None:
    ours, theirs = read_tensors(found), read_tensors(right)
    assert ours.keys() == theirs.keys()
    assert [n for n in theirs if ours[n].dtype != theirs[n].dtype or not mx.array_equal(ours[n], theirs[n])] == []


@pytest.mark.parametrize("preset", ["tiny", "tiny-untied"])
def test_apples_own_tensors_and_config(worded, written, tmp_path, preset):
    """Those of a writer that knows nothing of the converter's rules: float16, the head there where it is tied."""
    right = to_apple_mlx(worded(preset), tmp_path / "right")
    same_tensors(written(preset) / "model.safetensors", right / "model.safetensors")
    found, wanted = (json.loads((folder / "config.json").read_text()) for folder in (written(preset), right))
    assert found | {"image_token_index": 0} == wanted | {"image_token_index": 0}
    assert found["tie_word_embeddings"] is False
    assert found["vision_config"] == {}


def test_what_the_app_reads_besides(written):
    """`<image>` is a token: the app repeats it, and puts the features where its id is."""
    folder = written("tiny")
    config = json.loads((folder / "config.json").read_text())
    assert config["image_token_index"] == 1023
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("<image><image>a").ids[:2] == [1023, 1023]
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokens["added_tokens_decoder"]["1023"]["content"] == "<image>"
    assert tokens["tokenizer_class"] == "Qwen2Tokenizer"
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    assert pictures["processor_class"] == "LlavaProcessor"
    assert pictures["crop_size"] == {"height": 256, "width": 256}
    assert json.loads((folder / "processor_config.json").read_text()) == {
        "image_token": "<image>", "num_additional_image_tokens": 0, "patch_size": 64,
        "processor_class": "LlavaProcessor",
    }  # fmt: skip


def test_the_packages_interface(written):
    package = open_package(written("tiny") / PACKAGE)
    assert package.specification_version == 7  # iOS 16, macOS 13
    [function] = package.functions.values()
    [given], [made] = function.inputs, function.outputs
    assert (given.name, given.kind, given.shape, given.dtype) == ("images", "tensor", (1, 3, 256, 256), "fp32")
    assert (made.name, made.shape, made.dtype) == ("image_features", (1, 16, 512), "fp32")
    types = [op.type for op in package.program().operations]
    assert types[:2] == ["mul", "cast"]  # whole pixels before they are rounded
    assert "layer_norm" not in types


def features(package: Path, preset: str) -> Execution:
    """Of the golden picture, with every op rounded to float16."""
    pixels = golden(preset)["pixels_256x256"]
    return execute(open_package(package).program(), {"images": unit_pixels(pixels)}, "float16")


def test_its_features(written):
    """Against the official code's."""
    ran = features(written("tiny") / PACKAGE, "tiny")
    assert ran.first_overflow is None
    assert relative_l2(ran.outputs["image_features"][0], golden("tiny")["features_256x256"]) <= HALF_GATE


def test_it_stays_within_float16(written):
    """tiny-hot overflows without powers of two. Its distance says little: see test_coreml_vision.py."""
    ran = features(written("tiny-hot") / PACKAGE, "tiny-hot")
    assert ran.first_overflow is None
    assert np.isfinite(ran.outputs["image_features"]).all()


def test_unit_pixels():
    image = np.zeros((2, 3, 3), np.uint8)
    image[1, 2] = (255, 51, 0)
    made = unit_pixels(image)
    assert (made.shape, made.dtype) == ((1, 3, 2, 3), np.float32)
    assert made[0, :, 1, 2].tolist() == [1.0, np.float32(0.2), 0.0]


def test_what_the_manifest_says(written):
    manifest = Manifest.from_file(written("tiny") / "manifest.json")
    record = manifest.coreml
    assert record
    assert [check.executor for check in record.checks] == ["checker, float32", *["checker, float16"] * 2]
    assert all(check.passed for check in record.checks)
    assert (
        "FastViTHD folded into a Core ML package: float16 weights, stages scaled by powers of two" in manifest.changes
    )
    assert f"{PACKAGE}/Manifest.json" in manifest.files


@pytest.mark.parametrize("preset", ["tiny", "tiny-untied"])
@pytest.mark.parametrize("kind", ["one image", "two images", "text"])
def test_there_and_back(written, tmp_path, preset, kind):
    """The golden ids, the package run op by op in Core ML's place."""
    back = Bundle.open(convert(written(preset), tmp_path / "back").path)
    model = assemble(back, vision="coreml", runtime=CheckerRuntime())
    prompt = golden_prompt(preset, kind)
    answer = model.generate(prompt.images, prompt.ids, resolution=256, max_tokens=24, ignore_eos=True)
    assert list(answer.token_ids) == prompt.greedy_ids
    assert "Core ML" in answer.device


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(worded, tmp_path, made_before, bits):
    """As Apple's: embedding, head and projector too; read back it is the quantised bundle."""
    written = export(worded("tiny"), "apple-app", tmp_path / "written", Options(q_bits=bits)).path
    right = to_apple_mlx(worded("tiny"), tmp_path / "right", bits=bits)
    same_tensors(written / "model.safetensors", right / "model.safetensors")
    assert json.loads((written / "config.json").read_text())["quantization"] == {"group_size": 64, "bits": bits}
    plain = Options("float16", None, bits, quantize_projector=True)
    bundle, back = convert(worded("tiny"), tmp_path / "bundle", plain).path, convert(written, tmp_path / "back").path
    same_tensors(back / "decoder.safetensors", bundle / "decoder.safetensors")
    # The quantised bundle's ids; its features from the MLX encoder, the export's from the package.
    pixels = golden("tiny")["pixels_256x256"]
    ids = golden_prompt("tiny", "one image").ids
    answers = [
        assemble(Bundle.open(path), vision=vision, runtime=CheckerRuntime()).generate(
            [pixels], ids, resolution=256, max_tokens=24, ignore_eos=True
        )
        for path, vision in ((back, "coreml"), (bundle, "mlx"))
    ]
    assert answers[0].token_ids == answers[1].token_ids


def test_a_second_run_and_another_size(worded, tmp_path, made_before):
    target = tmp_path / "written"
    assert not export(worded("tiny"), "apple-app", target).up_to_date
    assert export(worded("tiny"), "apple-app", target).up_to_date
    argv = [str(worded("tiny")), "--layout", "apple-app", "-o", str(target), "--verify"]
    before = (target / "manifest.json").read_text()
    assert main(argv) == 0  # the checks again
    assert (target / "manifest.json").read_text() == before
    result = export(worded("tiny"), "apple-app", target, package=ExportPackage(Size(192, 192)))
    assert not result.up_to_date
    assert any("takes features of 256 x 3072 only, this model's are 9 x 512" in warning for warning in result.warnings)
    assert json.loads((target / "config.json").read_text())["mm_vision_tower"] == "mobileclip_l_192"


def test_a_package_that_fails_is_not_written(worded, tmp_path, monkeypatch):
    def fails(*_):
        raise VerificationError("fails a gate")

    monkeypatch.setattr(module, "add_package", fails)
    with pytest.raises(VerificationError):
        export(worded("tiny"), "apple-app", tmp_path / "written")
    assert list(tmp_path.iterdir()) == []


def test_what_was_forced_is_not_taken_for_good(worded, written, tmp_path, monkeypatch):
    record = Manifest.from_file(written("tiny") / "manifest.json").coreml
    assert record
    failed = replace(record, checks=(replace(record.checks[0], passed=False),))
    give_again(written("tiny"), monkeypatch, failed)
    for again in (False, True):
        assert export(worded("tiny"), "apple-app", tmp_path / "out", gates=Gates(force=True)).up_to_date == again
    assert not export(worded("tiny"), "apple-app", tmp_path / "out").up_to_date


def test_weights_beyond_float16(worded, tmp_path):
    given = shutil.copytree(worded("tiny"), tmp_path / "given")
    weights = mx.load(str(given / "model.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1e6
    mx.save_safetensors(str(given / "model.safetensors"), weights)
    with pytest.raises(
        CheckpointError, match=r"model.norm.weight is beyond the range of float16; give --dtype bfloat16"
    ):
        export(given, "apple-app", tmp_path / "written")
    assert not (tmp_path / "written").exists()


def test_a_bundle_is_a_source_too(worded, written, tmp_path, made_before, capsys):
    """Nothing of it is rounded again: the same tensors as from the checkpoint, and the gates pass with its weights."""
    bundle = convert(worded("tiny"), tmp_path / "bundle").path
    assert main([str(bundle), "--layout", "apple-app", "-o", str(tmp_path / "out"), "--verify"]) == 0
    assert main([str(bundle), "--layout", "apple-app", "-o", str(tmp_path / "out"), "--verify"]) == 0
    same_tensors(tmp_path / "out" / "model.safetensors", written("tiny") / "model.safetensors")
    assert (tmp_path / "out" / "config.json").exists()
    manifest = Manifest.from_file(tmp_path / "out" / "manifest.json")
    assert (manifest.source.id, manifest.source.layout) == ("tiny", "bundle")
    assert "decoder.safetensors" in manifest.source.files
    assert manifest.changes[0] == Bundle.open(bundle).manifest.changes[0]
    rounded = convert(worded("tiny"), tmp_path / "rounded", Options(vision_dtype="bfloat16")).path
    assert main([str(rounded), "--layout", "apple-app", "-o", str(tmp_path / "c")]) == 2
    assert "are rounded; give the checkpoint that it was made from" in capsys.readouterr().err


def test_a_quantised_bundle(worded, tmp_path, made_before):
    bundle = convert(worded("tiny-untied"), tmp_path / "bundle", Options("float16", None, 4)).path
    written = export(bundle, "apple-app", tmp_path / "out").path
    back = convert(written, tmp_path / "back").path
    same_tensors(back / "decoder.safetensors", bundle / "decoder.safetensors")
