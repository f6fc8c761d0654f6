"""LoRA adapters that can't be merged: one sentence each, and nothing is written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from fastvlm_convert.cli import main
from support.adapters import LAYER, PREFIX, VISION, deltas, factors, pair, refused, write_adapter
from support.layouts import to_mlx_vlm


def test_an_adapter_for_another_base(checkpoint, tmp_path, capsys):
    """One error with the first three faults."""
    base = checkpoint("tiny")
    tensors, _ = deltas(base, [LAYER])
    big = {}
    for layer in range(2, 7):
        big |= pair(f"model.layers.{layer}.self_attn.q_proj", *factors("big", (896, 896), 4))
    big |= pair("model.layers.1.self_attn.q_proj", *factors("big", (896, 896), 4))
    adapter = write_adapter(tmp_path / "adapter", tensors | big, "apple/FastVLM-0.5B")
    err = refused(adapter, tmp_path, capsys, "--base", str(base))
    assert "doesn't fit" in err
    assert "(128, 128) can't take factors of (4, 896) and (896, 4) with rank 4" in err
    assert "the base has no model.layers.2.self_attn.q_proj.weight" in err
    assert "and 3 more" in err
    assert "give the base that it was trained on with --base, which its config calls 'apple/FastVLM-0.5B'" in err


def test_another_rank_than_the_config_says(checkpoint, tmp_path, capsys):
    tensors, _ = deltas(checkpoint("tiny"), [LAYER], rank=8)
    adapter = write_adapter(tmp_path / "adapter", tensors, checkpoint("tiny"))
    assert "can't take factors of (8, 128) and (128, 8) with rank 4" in refused(adapter, tmp_path, capsys)


def test_an_adapter_without_its_base(checkpoint, tmp_path, capsys):
    tensors, _ = deltas(checkpoint("tiny"), [LAYER])
    named = write_adapter(tmp_path / "named", tensors, "apple/FastVLM-0.5B")
    assert "trained on 'apple/FastVLM-0.5B', which is no folder here; give its base's folder with --base" in refused(
        named, tmp_path, capsys
    )
    nameless = write_adapter(tmp_path / "nameless", tensors)
    assert "of an unnamed base; give its base's folder with --base" in refused(nameless, tmp_path, capsys)
    assert "is an adapter itself" in refused(nameless, tmp_path, capsys, "--base", str(named))
    assert "no checkpoint folder at nowhere" in refused(nameless, tmp_path, capsys, "--base", "nowhere")
    base = str(checkpoint("tiny"))
    assert "is no adapter; leave --base out" in refused(base, tmp_path, capsys, "--base", base)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "sets use_dora, which this version can't merge; merge it with PEFT"),
        ({"lora_bias": True, "layer_replication": [[0, 2]]}, "sets layer_replication, lora_bias"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "olora"}, "'olora', which changes the base"),
        ({"init_lora_weights": "corda"}, "'corda', which changes the base"),
        ({"init_lora_weights": "loftq"}, "'loftq', which changes the base"),
        ({"init_lora_weights": "lora_ga"}, "'lora_ga', which changes the base"),
        ({"r": "four"}, "another type than PEFT writes"),
        ({"r": 4.7}, "a rank of 4.7"),
        ({"r": True}, "a rank of True"),
        ({"r": float("inf")}, "a rank of inf"),
        ({"rank_pattern": {"q_proj": 4.5}}, "a rank of 4.5"),
        ({"rank_pattern": ["q_proj"]}, "another type than PEFT writes"),
        ({"lora_alpha": float("nan")}, "an alpha of nan"),
        ({"lora_alpha": 10**400}, "another type than PEFT writes"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "an alpha of inf"),
        ({"lora_alpha": "16"}, "an alpha of '16'"),
        ({"use_rslora": "no"}, "use_rslora 'no'"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path 5"),
        ({"rank_pattern": {"(": 4}}, "another type than PEFT writes"),
        ({"r": 0}, "a rank of 0"),
    ],
)
def test_adapters_that_cannot_be_merged(checkpoint, tmp_path, capsys, settings, message):
    tensors, _ = deltas(checkpoint("tiny"), [LAYER])
    adapter = write_adapter(tmp_path / "adapter", tensors, checkpoint("tiny"), **settings)
    assert message in refused(adapter, tmp_path, capsys)


def test_files_that_are_no_adapter(checkpoint, tmp_path, capsys):
    base = checkpoint("tiny")
    a, b = factors(LAYER, (128, 128), 4)
    cases = {
        f"{PREFIX}{LAYER}.lora_magnitude_vector": "is no factor A or B",
        f"{PREFIX}{LAYER}.lora_B.bias": "is no factor A or B",
        f"{PREFIX}{LAYER}.lora_A.other.weight": "holds several adapters",
        f"{PREFIX}model.layers.1.mlp.up_proj.lora_A.weight": "has a factor A without the other",
        f"{PREFIX}model.norm.weight": "is (4, 128) instead of the base's (128,)",
        f"{PREFIX}model.vision_tower.vision_tower.model.patch_embed.1.reparam_conv.lora_A.weight": "without the other",
    }
    for number, (name, message) in enumerate(cases.items()):
        adapter = write_adapter(tmp_path / str(number), pair(LAYER, a, b) | {name: a}, base)
        assert message in refused(adapter, tmp_path, capsys)
    empty = write_adapter(tmp_path / "empty", pair(LAYER, a, b), base)
    (empty / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in refused(empty, tmp_path, capsys)


def test_depthwise_convolutions_are_refused(checkpoint, tmp_path, capsys):
    base, module = checkpoint("tiny"), VISION + "patch_embed.1.reparam_conv"
    tensors = pair(module, *factors(module, (16, 16, 3, 3), 4))
    adapter = write_adapter(tmp_path / "adapter", tensors, base)
    assert "(16, 1, 3, 3) can't take factors of (4, 16, 3, 3)" in refused(adapter, tmp_path, capsys)
    other = to_mlx_vlm(base, tmp_path / "mlx-vlm")
    assert "is stored channels last" in refused(adapter, tmp_path, capsys, "--base", str(other))


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_a_tied_head_stays(checkpoint, tmp_path, capsys, name):
    """By the config too: published ones have a head beside the embedding, and say that it is tied."""
    base = shutil.copytree(checkpoint("tiny-untied"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    tensors = {f"{PREFIX}{name}.weight": np.zeros((1024, 128), np.float32)}
    adapter = write_adapter(tmp_path / "adapter", tensors, base)
    assert f"changes {name}.weight, but the base's head is its embedding" in refused(adapter, tmp_path, capsys)


def test_a_quantised_base(checkpoint, tmp_path, capsys):
    from support.layouts import to_apple_mlx

    tensors, _ = deltas(checkpoint("tiny"), [LAYER])
    base = to_apple_mlx(checkpoint("tiny"), tmp_path / "base", bits=8)
    adapter = write_adapter(tmp_path / "adapter", tensors, base)
    assert f"the base's {LAYER}.weight is quantised" in refused(adapter, tmp_path, capsys)


@pytest.mark.parametrize("inside", ["adapter", "base"])
def test_a_bundle_that_holds_a_source_is_not_replaced(checkpoint, bundle, tmp_path, capsys, inside):
    """Whichever of the two lies in it: it would go with the old bundle."""
    old = shutil.copytree(bundle("tiny"), tmp_path / "old")
    base = shutil.copytree(checkpoint("tiny"), (old if inside == "base" else tmp_path) / "base")
    tensors, _ = deltas(base, [LAYER])
    adapter = write_adapter((old if inside == "adapter" else tmp_path) / "adapter", tensors, base)
    before = {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")}
    assert main([str(adapter), "-o", str(old), "--no-coreml"]) == 2
    assert f"the output {old} is or holds the checkpoint itself" in capsys.readouterr().err
    for place in (adapter, base):
        assert main([str(adapter), "-o", str(place), "--no-coreml"]) == 2
        assert "choose another place with -o" in capsys.readouterr().err
    assert {path: path.is_dir() or path.read_bytes() for path in tmp_path.rglob("*")} == before
