"""LLaMA checkpoints in the layouts that they come in, and the settings of their configs."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest

from fastvlm_convert.configs import read_config
from fastvlm_convert.keymap import LAYOUTS
from fastvlm_convert.pipeline import convert
from fastvlm_mlx.bundle import Bundle, read_tensors
from fastvlm_mlx.errors import CheckpointError
from support.layouts import to_apple_mlx, to_bin_shards, to_mlx_vlm, to_sharded, to_transformers
from support.llama import Shape, write_llama

FILES = ("decoder.safetensors", "vision.safetensors")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_llama(tmp_path_factory.mktemp("llama") / "source", tokenizer=True)


@pytest.fixture(scope="module")
def bundle(source):
    return convert(source, source.parent / "bundle").path


def same_tensors(found, right, names=FILES):
    for name in names:
        mine, expected = read_tensors(found / name), read_tensors(right / name)
        assert mine.keys() == expected.keys()
        assert all(mx.array_equal(mine[key], expected[key]) for key in expected)


@pytest.mark.parametrize("layout", ["sharded", "bin shards", "mlx-vlm"])
def test_same_tensors_from_every_layout(source, bundle, tmp_path, layout):
    if layout == "bin shards":
        pytest.importorskip("torch", reason="the convert extra isn't installed")
    write = {"sharded": to_sharded, "bin shards": to_bin_shards, "mlx-vlm": to_mlx_vlm}[layout]
    made = write(source, tmp_path / "source", *([] if layout == "mlx-vlm" else [500_000]))
    found = convert(made, tmp_path / "bundle").path
    same_tensors(found, bundle)
    assert Bundle.open(found).config.decoder == Bundle.open(bundle).config.decoder
    assert (found / "tokenizer.json").read_bytes() == (bundle / "tokenizer.json").read_bytes()


def test_apple_mlx(source, bundle, tmp_path):
    """Its names, with LLaMA's tensors under them; nobody published one."""
    found = convert(to_apple_mlx(source, tmp_path / "source"), tmp_path / "bundle").path
    right = read_tensors(bundle / FILES[0])
    assert read_tensors(found / FILES[0]).keys() == right.keys()


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp3x_gelu"])
def test_projectors_of_mlx_vlm(tmp_path, kind):
    source = write_llama(tmp_path / "source", Shape(projector=kind))
    right = convert(source, tmp_path / "right").path
    same_tensors(convert(to_mlx_vlm(source, tmp_path / "mlx-vlm"), tmp_path / "bundle").path, right)


def test_transformers(checkpoint, tmp_path):
    """Its FastVlm takes any text model: the family is in text_config."""
    raw = json.loads((to_transformers(checkpoint("tiny"), tmp_path / "source") / "config.json").read_text())
    layout = next(layout for layout in LAYOUTS if layout.name == "transformers")
    for name, rope in (("rope_scaling", {"type": "linear", "factor": 2.0}), ("rope_parameters", {"rope_theta": 7e3})):
        text = {k: v for k, v in raw["text_config"].items() if k != "rope_theta"} | {"model_type": "llama", name: rope}
        config = read_config(raw | {"text_config": text}, layout, "name", "config.json", {})
        assert (config.decoder.model_type, config.decoder.qkv_bias, config.template) == ("llama", False, "vicuna_v1")
        assert config.decoder.rope_factor == rope.get("factor", 1.0)
        assert config.decoder.rope_theta == rope.get("rope_theta", 10_000.0)
    text = raw["text_config"] | {"model_type": "gemma"}
    with pytest.raises(CheckpointError, match=r"text_config.model_type is 'gemma'; this version knows qwen2, llama"):
        read_config(raw | {"text_config": text}, layout, "name", "config.json", {})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"rms_norm_eps": None}, {"rms_norm_eps": 1e-6}),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"max_position_embeddings": None}, {"max_position_embeddings": 2048}),
        ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
        ({"mlp_bias": True}, {"mlp_bias": True}),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8}}, {"rope_factor": 8.0}),
        ({"rope_scaling": {"type": "default"}}, {}),
        ({"model_type": "llava"}, {}),
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_takes(source, change, expected):
    raw = json.loads((source / "config.json").read_text()) | change
    decoder = read_config(raw, LAYOUTS[0], "name", "config.json", {}).decoder
    usual = {
        "model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_factor": 1.0,
        "max_position_embeddings": 4096, "qkv_bias": False, "output_bias": False, "mlp_bias": False,
    }  # fmt: skip
    assert {name: getattr(decoder, name) for name in usual} == usual | expected


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [(2, None, (2,)), (None, None, (2,)), (None, 7, (7,)), (5, [2, 7], (5, 2, 7))],
)
def test_stop_ids(source, own, generation, expected):
    """Never Qwen's, whatever the vocabulary has."""
    raw = json.loads((source / "config.json").read_text()) | {"eos_token_id": own, "vocab_size": 200_000}
    config = read_config(raw, LAYOUTS[0], "name", "config.json", {"eos_token_id": generation})
    assert config.eos_token_ids == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "of type 'dynamic'; this version knows default, linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "of type 'llama3'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"head_dim": 64}, "head_dim is 64; this version knows 32"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "this version knows mobileclip_l_SIDE"),
    ],
)
def test_what_is_refused(source, tmp_path, change, message):
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / "config.json").write_text(json.dumps(json.loads((copy / "config.json").read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        convert(copy, tmp_path / "bundle")
