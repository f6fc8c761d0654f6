"""A bundle exported: ours -> theirs -> ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from fastvlm_convert import unfolding
from fastvlm_convert.cli import main
from fastvlm_convert.export import export
from fastvlm_convert.options import Options
from fastvlm_convert.pipeline import convert
from fastvlm_mlx import load
from fastvlm_mlx.bundle import read_tensors
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.manifest import Manifest
from support.seeded import PROMPTS, golden, golden_prompt, relative_l2
from support.tokenizers import with_tokenizer

# Features of the same network in float32: the bias of qkv has been found again to float32's rounding.
FEATURES = 1e-5
# Computed anew on the way; all else comes back bit for bit.
COMPUTED = ("stem.conv.weight", "qkv.bias", "proj.bias")


@pytest.fixture(scope="module")
def bundled(checkpoint, tmp_path_factory):
    """(preset, options) -> a bundle; don't change it."""
    made: dict[tuple[str, Options | None], Path] = {}

    def get(preset: str, options: Options | None = None) -> Path:
        if (preset, options) not in made:
            folder = tmp_path_factory.mktemp("bundled")
            given = with_tokenizer(checkpoint(preset), folder / "given" / preset, 1024)
            made[preset, options] = convert(given, folder / preset, options).path
        return made[preset, options]

    return get


@pytest.mark.parametrize("preset", ["tiny", "tiny-untied"])
def test_ours_theirs_ours(bundled, tmp_path, preset):
    ours = bundled(preset)
    written = export(ours, "mlx-vlm", tmp_path / preset)
    back = convert(written.path, tmp_path / "back").path
    before, after = read_tensors(ours / "decoder.safetensors"), read_tensors(back / "decoder.safetensors")
    assert before.keys() == after.keys()
    assert all(mx.array_equal(after[name], value) for name, value in before.items())
    before, after = read_tensors(ours / "vision.safetensors"), read_tensors(back / "vision.safetensors")
    assert {n: v.dtype for n, v in before.items()} == {n: v.dtype for n, v in after.items()}
    assert [n for n, v in before.items() if not n.endswith(COMPUTED) and not mx.array_equal(after[n], v)] == []
    texts = [(folder / "config.json").read_text() for folder in (ours, back)]
    assert texts[0] == texts[1]
    models = load(ours), load(back)
    for kind in PROMPTS:
        prompt = golden_prompt(preset, kind)
        answer = models[1].generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
        assert list(answer.token_ids) == prompt.greedy_ids
    right, found = (model.encode_image(golden(preset)["pixels_256x256"], resolution=256).features for model in models)
    assert relative_l2(found, right) <= FEATURES
    manifest = Manifest.from_file(written.path / "manifest.json")
    assert "FastViTHD's folded batch norms and layer scales written as ones that change nothing" in manifest.changes


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_rounded_vision_weights(bundled, tmp_path, kind):
    """Their bias came from no shift; the features are those of the rounded weights, not of the checkpoint's."""
    ours = bundled("tiny", Options(vision_dtype=kind))
    written = tmp_path / "written"
    assert main([str(ours), "--layout", "mlx-vlm", "-o", str(written), "--verify"]) == 0
    types = {v.dtype for n, v in read_tensors(written / "model.safetensors").items() if n.startswith("vision_tower")}
    assert types - {mx.bfloat16} == {mx.float32}  # never float16
    back = convert(written, tmp_path / "back").path
    image = golden("tiny")["pixels_256x256"]
    right, found = (
        load(folder, vision_dtype="float32").encode_image(image, resolution=256).features for folder in (ours, back)
    )
    assert relative_l2(found, right) <= FEATURES


def test_the_round_trip_is_checked(bundled, tmp_path, capsys, monkeypatch):
    argv = [str(bundled("tiny")), "--layout", "mlx-vlm", "-o"]
    assert main([*argv, str(tmp_path / "a"), "--verify"]) == 0
    assert main([*argv, str(tmp_path / "a"), "--verify"]) == 0  # again, where nothing is written
    assert main([*argv, str(tmp_path / "b"), "--vision-dtype", "bfloat16", "--verify"]) == 0
    capsys.readouterr()
    monkeypatch.setitem(unfolding._CONSTANTS, ".bn.weight", 1.001 * unfolding.GAIN)
    assert main([*argv, str(tmp_path / "c"), "--verify"]) == 1
    err = capsys.readouterr().err
    assert "FastViTHD as written gives stages.0.blocks.0.ffn.depthwise.weight with a relative error of 1.0e-03" in err
    assert err.endswith("please report it with this line\n")
    assert not (tmp_path / "c").exists()


def test_a_quantised_bundle(bundled, tmp_path):
    ours = bundled("tiny-untied", Options(q_bits=4))
    written = export(ours, "mlx-vlm", tmp_path / "written").path
    assert json.loads((written / "config.json").read_text())["quantization"] == {"bits": 4, "group_size": 64}
    back = convert(written, tmp_path / "back").path
    before, after = (read_tensors(folder / "decoder.safetensors") for folder in (ours, back))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(after[name], value) for name, value in before.items())
    with pytest.raises(CheckpointError, match=r"is quantised already \(4 bits\); convert it without -q"):
        export(ours, "mlx-vlm", tmp_path / "again", Options(q_bits=8))


def test_bundles_that_it_cannot_be_made_of(bundled, tmp_path, capsys):
    packed = bundled("tiny", Options(q_bits=8, quantize_vision=True))
    assert main([str(packed), "--layout", "mlx-vlm", "-o", str(tmp_path / "out")]) == 2
    assert (
        "has FastViTHD quantised, and mlx-vlm needs its weights; give what it was made from, or a bundle made without "
        "--quantize-vision" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_branches_of_training(bundled, checkpoint, tmp_path, capsys):
    """They are written fused, by way of a bundle."""
    given = shutil.copytree(with_tokenizer(checkpoint("tiny"), tmp_path / "plain", 1024), tmp_path / "tiny")
    weights = mx.load(str(given / "model.safetensors"))
    [name] = [n for n in weights if n.endswith("network.6.reparam_conv.weight")]
    kernel = weights.pop(name).astype(mx.float32)
    kernel[:, :, 3, 3] -= 1  # the input is added to what this branch gives
    stem = name.removesuffix("reparam_conv.weight")
    weights |= {f"{stem}pe.weight": kernel, f"{stem}pe.bias": weights.pop(f"{stem}reparam_conv.bias")}
    mx.save_safetensors(str(given / "model.safetensors"), weights)
    assert main([str(given), "--layout", "mlx-vlm", "-o", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "has convolutions in the branches of training, which mlx-vlm doesn't know; convert it into a bundle" in err
    folded = convert(given, tmp_path / "bundle").path
    back = convert(export(folded, "mlx-vlm", tmp_path / "tiny-out").path, tmp_path / "back").path
    image = golden("tiny")["pixels_256x256"]
    right, found = (load(f).encode_image(image, resolution=256).features for f in (bundled("tiny"), back))
    assert relative_l2(found, right) <= FEATURES
