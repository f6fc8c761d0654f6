"""Bad checkpoints and bad arguments: one clear error, nothing written."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_convert import mlx_weights
from fastvlm_convert.pipeline import Options, convert
from fastvlm_mlx import files
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import CheckpointError, DiskSpaceError, FastVLMError, InputError, WeightsError
from support.layouts import to_bin_shards, to_mlx_vlm, to_sharded, to_transformers


@pytest.fixture
def source(checkpoint, tmp_path):
    """A checkpoint that the test may damage."""
    return shutil.copytree(checkpoint("tiny"), tmp_path / "source")


def refuse(source, tmp_path, error: type[FastVLMError], message: str, options: Options | None = None) -> str:
    """Conversion raises this, with exit code 2, and leaves nothing behind."""
    target = tmp_path / "out" / "bundle"
    with pytest.raises(error, match=message) as caught:
        convert(source, target, options)
    assert caught.value.exit_code == 2
    assert not target.exists()
    assert not target.parent.exists() or list(target.parent.iterdir()) == []
    return str(caught.value)


def change_weights(source, change) -> None:
    weights = mx.load(str(source / "model.safetensors"))
    change(weights)
    mx.save_safetensors(str(source / "model.safetensors"), weights)


def change_config(source, **changes: object) -> None:
    config = json.loads((source / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    (source / "config.json").write_text(json.dumps(config))


def test_all_wrong_tensors_are_listed_at_once(source, tmp_path):
    def change(weights):
        del weights["model.norm.weight"]
        del weights["model.vision_tower.vision_tower.model.conv_exp.se.reduce.bias"]
        weights["model.layers.9.mlp.up_proj.weight"] = mx.zeros((2, 2))
        weights["something.else"] = mx.zeros((1,))
        weights["model.mm_projector.0.bias"] = mx.zeros((127,))

    change_weights(source, change)
    text = refuse(source, tmp_path, WeightsError, "doesn't fit its config")
    assert "missing (2): model.norm.weight, model.vision_tower.vision_tower.model.conv_exp.se.reduce.bias" in text
    assert "unexpected (2): model.layers.9.mlp.up_proj.weight, something.else" in text
    assert "wrong shape (1): model.mm_projector.0.bias (127,) instead of (128,)" in text


def test_a_truncated_safetensors_file(source, tmp_path):
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refuse(source, tmp_path, CheckpointError, "model.safetensors is damaged")


def test_a_safetensors_file_of_noise(source, tmp_path):
    (source / "model.safetensors").write_bytes(np.random.default_rng(0).bytes(1000))
    refuse(source, tmp_path, CheckpointError, "model.safetensors is damaged")


def test_an_index_that_names_a_missing_shard(checkpoint, tmp_path):
    source = to_sharded(checkpoint("tiny"), tmp_path / "sharded", 500_000)
    gone = sorted(source.glob("*.safetensors"))[1]
    gone.unlink()
    refuse(source, tmp_path, CheckpointError, f"names {gone.name}, not there; download the checkpoint again")


def test_a_bin_shard_that_runs_code_is_refused(checkpoint, tmp_path):
    """A pickle may name any function; only tensors are let in."""
    torch = pytest.importorskip("torch", reason="the convert extra isn't installed")
    source = to_bin_shards(checkpoint("tiny"), tmp_path / "bin", 10_000_000)
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"weight": Evil()}, next(source.glob("*.bin")))
    refuse(source, tmp_path, CheckpointError, "damaged or holds more than tensors")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llava_mpt"},
            "model_type is 'llava_mpt', expected one of llava_qwen2, llava_llama, llava, fast_vlm",
        ),
        ({"model_type": ...}, "model_type is None"),
        ({"hidden_size": ...}, "lacks 'hidden_size'"),
        (
            {"mm_projector_type": "resampler"},
            "mm_projector_type: projector.kind is 'resampler'; this version knows linear, mlpNx_gelu .*, identity",
        ),
        (
            {"mm_vision_tower": "openai/clip-vit"},
            r"this version knows mobileclip_l_SIDE \(FastViTHD\), mobileclip_s0_SIDE \(MCi0\)",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is of type 'yarn'; this version knows default, linear"),
        ({"head_dim": 64}, "head_dim is 64; this version knows 32"),
        (
            {"mm_projector_type": "identity"},
            "mm_projector_type: an identity projector passes 512 channels on, and the decoder takes 128",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"mm_hidden_size": 3072}, r"mm_hidden_size is 3072, FastViTHD of .* gives 512"),
        ({"num_attention_heads": 3}, "heads don't divide"),
        ({"hidden_size": "big"}, "another type than published"),
        ({"mm_vision_config": [1]}, "config.json: a value has another type than published"),
        ({"mm_vision_config": "x"}, "config.json: a value has another type than published"),
        ({"num_attention_heads": 0}, "a size is 0|at least 1"),
        ({"num_hidden_layers": 0}, "at least 1, got num_hidden_layers 0"),
    ],
)
def test_configs(source, tmp_path, changes, message):
    change_config(source, **changes)
    refuse(source, tmp_path, CheckpointError, message)


@pytest.mark.parametrize(
    "changes", [{"text_config": [1]}, {"text_config": "x"}, {"text_config": None}, {"vision_config": None}]
)
def test_nested_configs(checkpoint, tmp_path, changes):
    nested = to_transformers(checkpoint("tiny"), tmp_path / "source")
    change_config(nested, **changes)
    refuse(nested, tmp_path, CheckpointError, "config.json: a value has another type than published")


def test_not_a_checkpoint(tmp_path, checkpoint):
    refuse(tmp_path / "nowhere", tmp_path, CheckpointError, "no checkpoint folder at")
    empty = tmp_path / "empty"
    empty.mkdir()
    refuse(empty, tmp_path, CheckpointError, r"config.json is missing")
    shutil.copy(checkpoint("tiny") / "config.json", empty)
    refuse(empty, tmp_path, CheckpointError, "has no weights")
    (empty / "config.json").write_text("[]")
    refuse(empty, tmp_path, CheckpointError, "should hold a JSON object")


def test_foreign_tensor_names(source, tmp_path):
    mx.save_safetensors(str(source / "model.safetensors"), {"bert.pooler": mx.zeros((2,))})
    refuse(source, tmp_path, CheckpointError, "follows no known FastVLM layout.*found such as bert.pooler")


def test_a_damaged_tokenizer(source, tmp_path):
    (source / "tokenizer.json").write_text("{")
    refuse(source, tmp_path, CheckpointError, "tokenizer files of .* are damaged")


def test_no_disk_space_is_known_before_anything_is_written(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 1000))
    refuse(source, tmp_path, DiskSpaceError, r"needs \d+ MB, .* has 0 MB free; free some space or .* -o")


def test_a_disk_that_fills_up_while_writing(source, tmp_path, monkeypatch):
    """The old bundle stays, the half-written one goes."""
    target = tmp_path / "out" / "bundle"
    before = convert(source, target).path
    stamp = (before / "manifest.json").read_text()

    def full(value):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(mlx_weights, "raw_bytes", full)
    with pytest.raises(DiskSpaceError, match="no space left while writing"):
        convert(source, target, Options(dtype="float16"))
    assert (target / "manifest.json").read_text() == stamp
    assert [entry.name for entry in target.parent.iterdir()] == ["bundle"]


def test_what_stands_in_the_way_is_not_replaced(source, tmp_path):
    target = tmp_path / "precious"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    (target / "manifest.json").write_text('{"name": "a web app"}')
    with pytest.raises(InputError, match="exists and is no bundle"):
        convert(source, target)
    for place in (source, source.parent):
        with pytest.raises(InputError, match="is or holds the checkpoint itself"):
            convert(source, place)
    assert (target / "thesis.txt").read_text() == "years of work"
    assert (source / "model.safetensors").exists()


@pytest.mark.parametrize("change", [{"eos_token_id": "im_end"}, {"hidden_size": 128.0}, {"num_hidden_layers": "2"}])
def test_values_of_another_type_are_found_now(source, tmp_path, change):
    """Not by the user who loads the bundle."""
    change_config(source, **change)
    refuse(source, tmp_path, FastVLMError, "another type|expected int")


@pytest.mark.parametrize("index", ['{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}', "{}"])
def test_a_damaged_index(source, tmp_path, index):
    (source / "model.safetensors.index.json").write_text(index)
    refuse(source, tmp_path, CheckpointError, "has no weight_map of names")


@pytest.mark.parametrize("content", ["nested", "list", "int32"])
def test_bin_files_of_another_kind(checkpoint, tmp_path, content):
    torch = pytest.importorskip("torch", reason="the convert extra isn't installed")
    source = to_bin_shards(checkpoint("tiny"), tmp_path / "bin", 10_000_000)
    zeros = torch.zeros(2)
    saved = {"nested": {"model": {"a": zeros}}, "list": [zeros], "int32": {"a": zeros.to(torch.int32)}}[content]
    torch.save(saved, next(source.glob("*.bin")))
    refuse(source, tmp_path, CheckpointError, "should hold a dictionary of tensors|tensors of type torch.int32")


def test_a_target_without_the_right_to_write(source, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"can't write to .*choose another place with -o"):
        convert(source, tmp_path / "file" / "bundle")


def test_anyres_without_grids_is_warned_about(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint("tiny-newline"), tmp_path / "source")
    assert not any("AnyRes" in warning for warning in convert(source, tmp_path / "bundle").warnings)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"image_grid_pinpoints": None}))
    warnings = convert(source, tmp_path / "other").warnings
    assert any("AnyRes tiles and names no grid: images are padded" in warning for warning in warnings)


def test_anyres_that_can_not_be_run_is_warned_about(checkpoint, tmp_path):
    source, bundle = shutil.copytree(checkpoint("tiny-newline"), tmp_path / "source"), tmp_path / "bundle"
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"image_grid_pinpoints": [[300, 512]]}))
    (warning,) = (text for text in convert(source, bundle).warnings if "tiles" in text)
    assert warning.startswith("images are padded, not cut into tiles, as ")
    assert "300 x 512 px, no grid of whole tiles of the model's 256 px" in warning
    assert ModelConfig.from_file(bundle / "config.json").aspect == "pad"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_bits": 7}, "--q-bits must be one of 2, 3, 4, 5, 6, 8, got 7"),
        ({"q_bits": 4, "q_group_size": 48}, "--q-group-size must be one of 32, 64, 128, got 48"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"quantize_vision": True}, "needs -q"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        Options(**options)


def test_packed_vision_matrices_are_reported(checkpoint, tmp_path):
    """mlx-vlm can be told to quantise FastViTHD too; those can't be folded."""
    source = to_mlx_vlm(checkpoint("tiny"), tmp_path / "packed")
    name = "vision_tower.vision_model.network.10.0.token_mixer.proj"

    def change(weights):
        parts = mx.quantize(weights[f"{name}.weight"], group_size=64, bits=8)
        weights |= dict(zip((f"{name}.weight", f"{name}.scales", f"{name}.biases"), parts, strict=True))

    change_weights(source, change)
    change_config(source, quantization={"bits": 8, "group_size": 64})
    text = refuse(source, tmp_path, WeightsError, "wrong shape")
    assert f"{name}.scales" in text
