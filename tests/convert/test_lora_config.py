"""The config.json that LLaVA's training leaves beside an adapter: the model is the one that it describes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_convert.pipeline import convert
from fastvlm_mlx.bundle import Bundle, read_tensors
from fastvlm_mlx.config import ModelConfig
from support.adapters import (
    LAYER,
    deltas,
    factors,
    merged_by_hand,
    pair,
    refused,
    write_adapter,
    write_rest,
    write_trained,
)
from support.layouts import to_apple_mlx, to_mlx_vlm, to_transformers

# What train_qwen.py writes over the base's, and what nobody would guess from the base.
RUN = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": "[[256, 512], [512, 512]]",
    "mm_patch_merge_type": "spatial",
    "tokenizer_model_max_length": 4096,
}


@pytest.fixture
def tuned(checkpoint, tmp_path):
    """(an adapter of tiny whose folder has the config of its run, changed further) -> its folder."""

    def write(**changes: object):
        base = checkpoint("tiny")
        tensors, _ = deltas(base, [LAYER])
        return write_trained(write_adapter(tmp_path / "tuned", tensors, base), base, **(RUN | changes))

    return write


def nameless(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, name="")


def test_images_and_length_are_those_of_the_training(tuned, tmp_path):
    opened = Bundle.open(convert(tuned(), tmp_path / "bundle").path)
    config, source = opened.config, opened.manifest.source
    assert (config.aspect, config.grid_pinpoints) == ("anyres", ((256, 512), (512, 512)))
    assert (config.patch_merge_type, config.context_length) == ("spatial", 4096)
    assert source.adapter
    assert set(source.adapter.files) == {"adapter_config.json", "adapter_model.safetensors", "config.json"}
    assert opened.manifest.changes[0].endswith("merged into 1 matrices (rank 4, alpha 8), with its config.json")


def test_training_at_another_resolution(tuned, tmp_path):
    found = convert(tuned(mm_vision_tower="mobileclip_l_512", image_aspect_ratio="square"), tmp_path / "bundle").path
    config = Bundle.open(found).config
    assert (config.aspect, config.image_size) == ("crop", 512)  # the official code crops what it calls square


def test_warnings_name_the_file_that_asks(tuned, tmp_path):
    adapter = tuned(image_grid_pinpoints=None)
    [warning] = [w for w in convert(adapter, tmp_path / "bundle").warnings if "AnyRes" in w]
    assert warning.startswith(f"{adapter / 'config.json'} asks for AnyRes tiles")


def test_another_config_makes_the_bundle_again(tuned, checkpoint, tmp_path):
    adapter = tuned()
    assert not convert(adapter, tmp_path / "bundle").up_to_date
    assert convert(adapter, tmp_path / "bundle").up_to_date
    write_trained(adapter, checkpoint("tiny"), image_aspect_ratio="pad")
    again = convert(adapter, tmp_path / "bundle")
    assert not again.up_to_date
    assert Bundle.open(again.path).config.aspect == "pad"


@pytest.mark.parametrize("to_layout", [to_transformers, to_mlx_vlm])
def test_a_base_of_another_layout(tuned, checkpoint, tmp_path, to_layout):
    """The file is LLaVA's, whatever the base's is."""
    adapter = tuned()
    right = convert(adapter, tmp_path / "right").path
    other = to_layout(checkpoint("tiny"), tmp_path / "base")
    found = convert(adapter, tmp_path / "found", base=other).path
    assert nameless(Bundle.open(found).config) == nameless(Bundle.open(right).config)


def test_how_the_base_is_stored_stays(checkpoint, tmp_path):
    """A quantised base, of which the adapter changes what isn't quantised."""
    base = checkpoint("tiny-untied")
    packed = to_apple_mlx(base, tmp_path / "packed", bits=8)
    norm = np.full(128, 0.5, np.float32)
    adapter = write_adapter(tmp_path / "adapter", {"base_model.model.model.norm.weight": norm}, packed)
    write_trained(adapter, base, **RUN)
    found = convert(adapter, tmp_path / "bundle").path
    config = Bundle.open(found).config
    assert config.quantization
    assert (config.quantization.bits, config.quantization.group_size) == (8, 64)
    assert config.context_length == 4096
    assert mx.array_equal(read_tensors(found / "decoder.safetensors")["model.norm.weight"], mx.full(128, 0.5))


@pytest.mark.parametrize("to_layout", [None, to_transformers])
def test_a_line_break_that_the_base_lacks(checkpoint, tmp_path, to_layout):
    """A run that unpads tiles, on a base as published: the learnt line break is beside the adapter."""
    pytest.importorskip("torch", reason="the convert extra isn't installed")
    base = checkpoint("tiny")
    tensors, added = deltas(base, [LAYER])
    adapter = write_adapter(tmp_path / "adapter", tensors)
    run = RUN | {"mm_patch_merge_type": "spatial_unpad"}
    newline = np.random.default_rng(3).standard_normal(128).astype(np.float32)  # not one that bfloat16 holds
    write_trained(write_rest(adapter, {"model.image_newline": newline}), base, **run)
    given = to_layout(base, tmp_path / "base") if to_layout else base
    found = convert(adapter, tmp_path / "found", base=given).path

    merged = merged_by_hand(base, tmp_path / "merged", added)
    write_trained(merged, base, **run)
    weights = mx.load(str(merged / "model.safetensors"))
    weights["model.image_newline"] = mx.array(newline).astype(mx.bfloat16)
    mx.save_safetensors(str(merged / "model.safetensors"), weights)
    right = convert(merged, tmp_path / "right").path
    config = Bundle.open(found).config
    assert nameless(config) == nameless(Bundle.open(right).config)
    assert (config.image_newline, config.patch_merge_type, config.aspect) == (True, "spatial_unpad", "anyres")
    ours, theirs = (read_tensors(folder / "decoder.safetensors") for folder in (found, right))
    assert ours.keys() == theirs.keys()
    assert [n for n in theirs if ours[n].dtype != theirs[n].dtype or not mx.array_equal(ours[n], theirs[n])] == []
    assert Bundle.open(found).manifest.changes[0].endswith("1 tensors taken from it whole, with its config.json")


def test_a_line_break_that_cannot_be_added(checkpoint, tmp_path, capsys):
    pytest.importorskip("torch", reason="the convert extra isn't installed")
    base = checkpoint("tiny")
    tensors, _ = deltas(base, [LAYER])
    adapter = write_rest(write_adapter(tmp_path / "one", tensors, base), {"model.image_newline": np.ones(896)})
    assert "model.image_newline is (896,) instead of (128,)" in refused(adapter, tmp_path, capsys)
    write_rest(adapter, {"model.image_newline": np.ones(128)})
    other = to_mlx_vlm(base, tmp_path / "mlx-vlm")
    err = refused(adapter, tmp_path, capsys, "--base", str(other))
    assert "a base in the mlx-vlm layout has no place for model.image_newline" in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 896, "num_attention_heads": 14, "num_hidden_layers": 24},
            "decoder.hidden_size is 896 instead of 128; decoder.num_hidden_layers is 24 instead of 2; "
            "decoder.num_attention_heads is 14 instead of 4; give the base that the adapter was trained on with "
            "--base, or correct that file",
        ),
        ({"mm_projector_type": "linear"}, "projector.kind is linear instead of mlp2x_gelu; give"),
        (
            {"mm_vision_config": {"layers": [1, 2, 2, 1, 2], "embed_dims": [16, 32, 64, 128, 256]}},
            "vision.layers is (1, 2, 2, 1, 2) instead of (1, 2, 2, 1, 1)",
        ),
        ({"mm_use_im_start_end": True}, "tuned/config.json: mm_use_im_start_end is True"),
        ({"model_type": "qwen2"}, "tuned/config.json: model_type is 'qwen2'"),
        ({"mm_vision_config": [1]}, "tuned/config.json: a value has another type than published"),
    ],
)
def test_a_config_of_another_model(tuned, tmp_path, capsys, changes, message):
    err = refused(tuned(**changes), tmp_path, capsys)
    assert message in err
    assert err.count("tuned/config.json") == 1


def test_a_config_that_is_none(tuned, tmp_path, capsys):
    adapter = tuned()
    (adapter / "config.json").write_text("[]")
    assert "tuned/config.json should hold a JSON object" in refused(adapter, tmp_path, capsys)


def resized(base) -> dict[str, object]:
    """The ways in which a vocabulary of 1030 instead of 1024 tokens shows."""
    head, embedding = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
    a, b = factors("head", (1030, 128), 4)
    layer, _ = deltas(base, [LAYER])
    return {
        "a whole head": {f"{head}.weight": np.ones((1030, 128), np.float32)},
        "a whole embedding": {f"{embedding}.weight": np.ones((1030, 128), np.float32)},
        "factors of the head": pair("lm_head", a, b),
        "factors of the embedding": {f"{embedding}.lora_embedding_A": b.T, f"{embedding}.lora_embedding_B": a.T},
        "the config": layer,
    }


@pytest.mark.parametrize(
    "case", ["a whole head", "a whole embedding", "factors of the head", "factors of the embedding", "the config"]
)
def test_a_vocabulary_that_was_resized(checkpoint, tmp_path, capsys, case):
    base = checkpoint("tiny-untied")
    adapter = write_adapter(tmp_path / "adapter", resized(base)[case], base)
    if case == "the config":
        write_trained(adapter, base, vocab_size=1030)
    err = refused(adapter, tmp_path, capsys)
    assert "was trained with a vocabulary of 1030 tokens and" in err
    assert "has 1024, which merging can't change; give a base of 1030 tokens with --base, or merge in PyTorch" in err
    assert "doesn't fit" not in err


def test_a_wrong_head_is_no_resized_one(checkpoint, tmp_path, capsys):
    base = checkpoint("tiny-untied")
    head = {"base_model.model.lm_head.weight": np.ones((1030, 96), np.float32)}
    err = refused(write_adapter(tmp_path / "adapter", head, base), tmp_path, capsys)
    assert "lm_head.weight is (1030, 96) instead of the base's (1024, 128)" in err


def test_the_head_is_tied_if_the_training_says_so(checkpoint, tmp_path, capsys):
    """The official loader goes by the adapter's config."""
    base = shutil.copytree(checkpoint("tiny-untied"), tmp_path / "base")
    adapter = write_adapter(
        tmp_path / "adapter", {"base_model.model.lm_head.weight": np.zeros((1024, 128), np.float32)}, base
    )
    write_trained(adapter, base, tie_word_embeddings=True)
    assert "the base's head is its embedding" in refused(adapter, tmp_path, capsys)
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is False
