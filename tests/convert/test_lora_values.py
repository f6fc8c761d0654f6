"""What merging computes: rounded once, from float32; and values that can't be right are told."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_convert.cli import main
from fastvlm_convert.lora import open_checkpoint
from fastvlm_convert.lora_config import read_lora_config
from fastvlm_mlx.errors import CheckpointError
from support.adapters import LAYER, deltas, merged_by_hand, pair, shape_of, write_adapter, write_rest

NAME = f"{LAYER}.weight"


def bfloat16(value: np.ndarray) -> np.ndarray:
    return np.array(mx.array(value).astype(mx.bfloat16).astype(mx.float32))


def test_rounded_once(checkpoint, tmp_path):
    """Ordinary factors on a base in bfloat16: no value is further from the exact sum than rounding takes it."""
    base, rng = checkpoint("tiny"), np.random.default_rng(11)
    a, b = rng.standard_normal((4, 128)).astype(np.float32), rng.standard_normal((128, 4)).astype(np.float32) / 16
    found = open_checkpoint(write_adapter(tmp_path / "adapter", pair(LAYER, a, b), base)).read(NAME)
    assert found.dtype == mx.bfloat16
    plain = np.array(mx.load(str(base / "model.safetensors"))[NAME].astype(mx.float32), np.float64)
    exact = plain + 2 * (b.astype(np.float64) @ a.astype(np.float64))
    # Half of bfloat16's last place, which has 8 bits; and for sums in float32 (24 bits) of 5 values below 8, 2**-20.
    half = 2.0 ** (np.floor(np.log2(np.abs(exact))) - 8)
    assert (np.abs(np.array(found.astype(mx.float32)) - exact) <= half + 2**-20).all()
    # What it mustn't be differs widely: the product in bfloat16, or of factors that were rounded first.
    for wrong in (bfloat16((2 * (b @ a)).astype(np.float32)), 2 * (bfloat16(b) @ bfloat16(a))):
        rounded = bfloat16((plain + wrong).astype(np.float32))
        assert (np.abs(rounded - exact) > half + 2**-20).mean() > 0.1


def test_defaults_of_peft(checkpoint, tmp_path):
    """Rank 8 and alpha 8, where a config leaves them out: LoraConfig's in PEFT."""
    base = checkpoint("tiny")
    tensors, added = deltas(base, [LAYER], rank=8, scale=1.0)
    adapter = write_adapter(tmp_path / "adapter", tensors, base)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    del settings["r"], settings["lora_alpha"]
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    right = mx.load(str(merged_by_hand(base, tmp_path / "merged", added) / "model.safetensors"))[NAME]
    assert mx.array_equal(open_checkpoint(adapter).read(NAME), right)


def test_an_adapter_in_a_bin_file(checkpoint, tmp_path):
    torch = pytest.importorskip("torch", reason="the convert extra isn't installed")
    base = checkpoint("tiny")
    tensors, added = deltas(base, [LAYER])
    adapter = write_adapter(tmp_path / "adapter", tensors, base)
    torch.save({name: torch.tensor(value) for name, value in tensors.items()}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    found = open_checkpoint(adapter)
    right = mx.load(str(merged_by_hand(base, tmp_path / "merged", added) / "model.safetensors"))[NAME]
    assert mx.array_equal(found.read(NAME), right)
    assert found.adapter
    assert set(found.adapter.files) == {"adapter_config.json", "adapter_model.bin"}


@pytest.mark.parametrize(
    "patterns",
    [
        {"rank_pattern": {"self_attn": 16, r"layers\.0": 16}},  # of the middle of a name
        {"rank_pattern": {"proj": 16, "_proj": 16}},  # of a part's end
        {"alpha_pattern": {"self_attn": 64, r"model\.layers": 64}},
        {"alpha_pattern": {"proj": 64, "_proj": 64}},  # a wrong one would fit the shapes
    ],
)
def test_patterns_that_fit_no_whole_parts(checkpoint, tmp_path, patterns):
    folder = write_adapter(tmp_path / "adapter", deltas(checkpoint("tiny"), [LAYER])[0], **patterns)
    config = read_lora_config(folder)
    assert (config.rank_of(LAYER), config.scale_of(LAYER)) == (4, 2.0)


def test_values_that_are_not_finite(checkpoint, tmp_path, capsys):
    """Factors, whole tensors, and a sum that the base's type can't hold."""
    pytest.importorskip("torch", reason="the convert extra isn't installed")
    base = checkpoint("tiny")
    a, b = np.ones((4, 128), np.float32), np.ones((128, 4), np.float32)
    broken = np.where(np.arange(128)[:, None] == 127, np.nan, b)
    cases = {
        "nan": write_adapter(tmp_path / "nan", pair(LAYER, a, broken), base),
        "huge": write_adapter(tmp_path / "huge", pair(LAYER, 1e20 * a, 1e20 * b), base),
    }
    for adapter in cases.values():
        assert main([str(adapter), "-o", str(tmp_path / "out"), "--no-coreml"]) == 2
        err = capsys.readouterr().err
        assert f"{NAME} isn't finite with {adapter} merged into it" in err
        assert err.count("\n") == 1
        assert not (tmp_path / "out").exists()
    bias = np.where(np.arange(128) == 5, np.inf, 0)
    adapter = write_adapter(tmp_path / "rest", pair(LAYER, a, b), base)
    with pytest.raises(CheckpointError, match=r"mm_projector\.0\.bias isn't finite"):
        open_checkpoint(write_rest(adapter, {"model.mm_projector.0.bias": bias})).read("model.mm_projector.0.bias")


@pytest.mark.parametrize("shape", [(3, 128), (2, 128)])
def test_the_last_block_is_looked_at_too(checkpoint, tmp_path, monkeypatch, shape):
    """Blocks of as many rows as that: NaN in the last row is found."""
    base = checkpoint("tiny")
    assert shape_of(base, NAME) == (128, 128)
    a, b = np.ones((4, 128), np.float32), np.ones((128, 4), np.float32)
    b[127] = np.nan
    opened = open_checkpoint(write_adapter(tmp_path / "adapter", pair(LAYER, a, b), base))
    monkeypatch.setattr("fastvlm_convert.lora.ROWS_BYTES", 4 * shape[0] * shape[1])
    with pytest.raises(CheckpointError, match="isn't finite"):
        opened.read(NAME)
