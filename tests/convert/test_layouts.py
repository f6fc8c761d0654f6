"""Every published layout of the same weights becomes the same model."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_convert.pipeline import Options, convert
from fastvlm_mlx import load
from fastvlm_mlx.bundle import Bundle, read_tensors
from fastvlm_mlx.loading import assemble
from support.layouts import to_apple_mlx, to_bin_shards, to_mlx_vlm, to_sharded, to_transformers
from support.seeded import PROMPTS, golden_prompt

LAYOUTS = {
    "transformers": to_transformers,
    "transformers, padded vocabulary": lambda src, dst: to_transformers(src, dst, pad_vocabulary=True),
    "mlx-vlm": to_mlx_vlm,
    "sharded": lambda src, dst: to_sharded(src, dst, 500_000),
    "bin shards": lambda src, dst: to_bin_shards(src, dst, 500_000),
}


@pytest.mark.parametrize("preset", ["tiny", "tiny-untied"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_ids_from_every_layout(checkpoint, tmp_path, layout, preset):
    if layout == "bin shards":
        pytest.importorskip("torch", reason="the convert extra isn't installed")
    source = LAYOUTS[layout](checkpoint(preset), tmp_path / "source")
    result = convert(source, tmp_path / "bundle")
    model = load(result.path)
    for kind in PROMPTS:
        prompt = golden_prompt(preset, kind)
        answer = model.generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
        assert list(answer.token_ids) == prompt.greedy_ids


@pytest.mark.parametrize("layout", ["transformers", "mlx-vlm", "sharded", "bin shards"])
def test_same_tensors_from_every_layout(checkpoint, bundle, tmp_path, layout):
    """Bit for bit, so that nothing hides in the noise of 24 ids."""
    converted = convert(LAYOUTS[layout](checkpoint("tiny"), tmp_path / "source"), tmp_path / "bundle").path
    for name in ("decoder.safetensors", "vision.safetensors"):
        found, right = read_tensors(converted / name), read_tensors(bundle("tiny") / name)
        assert found.keys() == right.keys()
        assert all(found[key].dtype == right[key].dtype for key in right)
        assert all(mx.array_equal(found[key], right[key]) for key in right)


def test_apple_mlx_text(checkpoint, tmp_path):
    """Apple's MLX exports hold vision weights only in a package, which comes along: text only."""
    source = to_apple_mlx(checkpoint("tiny"), tmp_path / "source")
    result = convert(source, tmp_path / "bundle")
    prompt = golden_prompt("tiny", "text")
    answer = load(result.path).generate(None, prompt.ids, max_tokens=24, ignore_eos=True)
    assert list(answer.token_ids) == prompt.greedy_ids
    package = [f for f in (source / "fastvithd.mlpackage").rglob("*") if f.is_file()]
    assert package
    for file in package:
        copied = result.path / "vision.mlpackage" / file.relative_to(source / "fastvithd.mlpackage")
        assert copied.read_bytes() == file.read_bytes()
    opened = Bundle.open(result.path)
    assert opened.config.vision is None
    assert any(name.startswith("vision.mlpackage/") for name in opened.manifest.files)
    assert not opened.has("vision.safetensors")


@pytest.mark.parametrize("bits", [4, 8])
def test_apple_mlx_quantised(checkpoint, tmp_path, bits):
    """The packed matrices are taken as they are, embedding, head and projector included."""
    source = to_apple_mlx(checkpoint("tiny-untied"), tmp_path / "source", bits=bits)
    result = convert(source, tmp_path / "bundle")
    config = Bundle.open(result.path).config
    assert config.quantization
    assert (config.quantization.bits, config.quantization.group_size) == (bits, 64)
    stored, mine = (mx.load(str(f)) for f in (source / "model.safetensors", result.path / "decoder.safetensors"))
    for part in ("weight", "scales", "biases"):
        head = mine[f"lm_head.{part}"]
        assert mx.array_equal(head, stored[f"language_model.lm_head.{part}"])
        assert mx.array_equal(mine[f"projector.linear_1.{part}"], stored[f"multi_modal_projector.linear_0.{part}"])
    # The same answer through the packed kernels and from the unpacked values.
    prompt = golden_prompt("tiny-untied", "text")
    packed, plain = (
        assemble(Bundle.open(result.path), unpack=unpack).generate(None, prompt.ids, max_tokens=24, ignore_eos=True)
        for unpack in (False, True)
    )
    assert packed.token_ids == plain.token_ids
    if bits == 8:  # close enough to the plain weights to begin as they do
        assert packed.token_ids[0] == prompt.greedy_ids[0]


def test_apple_mlx_quantised_is_not_quantised_again(checkpoint, tmp_path):
    from fastvlm_mlx.errors import CheckpointError

    source = to_apple_mlx(checkpoint("tiny"), tmp_path / "source", bits=8)
    with pytest.raises(CheckpointError, match=r"quantised already \(8 bits\); convert it without -q"):
        convert(source, tmp_path / "bundle", Options(q_bits=4))


# What the config says -> what the tensors say.
TIES = {
    "tied, says so": ("tiny", {"tie_word_embeddings": True}, True, False),
    "tied, says otherwise": ("tiny", {"tie_word_embeddings": False}, True, True),
    "untied, says so": ("tiny-untied", {"tie_word_embeddings": False}, False, False),
    "untied, says otherwise": ("tiny-untied", {"tie_word_embeddings": True}, False, True),
}


@pytest.mark.parametrize("case", TIES)
def test_the_tensors_decide_whether_the_head_is_tied(checkpoint, tmp_path, case):
    preset, change, tied, warned = TIES[case]
    source = edited_copy(checkpoint(preset), tmp_path / "source", change)
    result = convert(source, tmp_path / "bundle")
    assert Bundle.open(result.path).config.decoder.tie_word_embeddings == tied
    assert any("tie_word_embeddings" in warning for warning in result.warnings) == warned
    prompt = golden_prompt(preset, "text")
    answer = load(result.path).generate(None, prompt.ids, max_tokens=24, ignore_eos=True)
    assert list(answer.token_ids) == prompt.greedy_ids


def test_a_head_with_the_embeddings_bytes_is_tied(checkpoint, tmp_path):
    source = edited_copy(checkpoint("tiny"), tmp_path / "source", {"tie_word_embeddings": True})
    weights = mx.load(str(source / "model.safetensors"))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    result = convert(source, tmp_path / "bundle")
    assert not any("tie_word" in warning for warning in result.warnings)
    assert "lm_head.weight" not in read_tensors(result.path / "decoder.safetensors")


def test_the_line_break_of_anyres_is_kept(checkpoint, tmp_path):
    source = checkpoint("tiny-newline")
    result = convert(source, tmp_path / "bundle")
    opened = Bundle.open(result.path)
    assert opened.config.image_newline
    assert opened.config.grid_pinpoints[0] == (256, 512)
    assert opened.config.patch_merge_type == "spatial_unpad"
    stored = mx.load(str(source / "model.safetensors"))["model.image_newline"]
    assert mx.array_equal(read_tensors(result.path / "decoder.safetensors")["projector.image_newline"], stored)


def test_folded_tensors_are_float32_and_the_others_as_stored(bundle):
    tensors = read_tensors(bundle("tiny") / "vision.safetensors")
    assert tensors["stages.0.blocks.0.ffn.fc1.weight"].dtype == mx.bfloat16  # untouched by folding
    assert tensors["stages.0.blocks.0.ffn.fc2.weight"].dtype == mx.float32  # holds the layer scale
    assert tensors["stem.conv.weight"].dtype == mx.float32  # holds 1/255


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(checkpoint, tmp_path, dtype):
    result = convert(checkpoint("tiny"), tmp_path / "bundle", Options(dtype=dtype, vision_dtype=dtype))
    for name in ("decoder.safetensors", "vision.safetensors"):
        assert {t.dtype for t in read_tensors(result.path / name).values()} == {getattr(mx, dtype)}
    prompt = golden_prompt("tiny", "text")
    # Every seeded value is exact in all three, so the text path doesn't change at all.
    answer = load(result.path).generate(None, prompt.ids, max_tokens=24, ignore_eos=True)
    assert list(answer.token_ids) == prompt.greedy_ids


def test_stop_ids_come_from_both_configs(checkpoint, tmp_path):
    source = edited_copy(checkpoint("tiny"), tmp_path / "source", {"eos_token_id": [7, 9]})
    (source / "generation_config.json").write_text('{"eos_token_id": 11}')
    assert Bundle.open(convert(source, tmp_path / "bundle").path).config.eos_token_ids == (7, 9, 11)


def edited_copy(source: Path, target: Path, config: dict[str, object]) -> Path:
    """A copy of a checkpoint with some of its config changed."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    merged = json.loads((source / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(merged))
    return target


def test_manifest_says_where_it_came_from(checkpoint, tmp_path):
    result = convert(checkpoint("tiny"), tmp_path / "b", Options(dtype="float16"), "org/name", "abc123")
    manifest = Bundle.open(result.path).manifest
    assert (manifest.source.id, manifest.source.revision, manifest.source.layout) == (
        "org/name",
        "abc123",
        "llava",
    )
    assert set(manifest.source.files) == {"model.safetensors", "config.json", "generation_config.json"}
    assert manifest.options["dtype"] == "float16"
    assert any("float16" in change for change in manifest.changes)
    assert np.sum([record.bytes for record in manifest.files.values()]) > 1e6
