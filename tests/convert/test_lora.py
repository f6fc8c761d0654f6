"""LoRA adapters: what the converter merges is what numpy merges by hand, byte for byte."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_convert.cli import main
from fastvlm_convert.lora import open_checkpoint
from fastvlm_convert.options import Options
from fastvlm_convert.pipeline import convert
from fastvlm_convert.source import Checkpoint
from fastvlm_mlx import load
from fastvlm_mlx.bundle import Bundle, read_tensors
from support.adapters import LAYER, PREFIX, VISION, deltas, factors, merged_by_hand, pair, shape_of, write_adapter
from support.layouts import to_mlx_vlm, to_transformers
from support.seeded import golden_prompt

MODULES = (LAYER, "model.layers.1.mlp.down_proj", "model.mm_projector.0")


def same_bundles(found, right) -> None:
    for name in ("decoder.safetensors", "vision.safetensors"):
        ours, theirs = read_tensors(found / name), read_tensors(right / name)
        assert ours.keys() == theirs.keys()
        assert all(ours[key].dtype == theirs[key].dtype for key in theirs)
        assert [key for key in theirs if not mx.array_equal(ours[key], theirs[key])] == []


def same_reading(adapter, merged) -> None:
    """An adapter's base reads as the checkpoint that was merged by hand: types and values of every tensor."""
    found, right = open_checkpoint(adapter), Checkpoint(merged)
    assert found.tensors.keys() == right.tensors.keys()
    for name in right.tensors:
        value, wanted = found.read(name), right.read(name)
        assert (name, value.dtype) == (name, wanted.dtype)
        assert mx.array_equal(value, wanted), name


def test_merged_as_by_hand(checkpoint, bundle, tmp_path):
    base = checkpoint("tiny")
    tensors, added = deltas(base, MODULES)
    adapter = write_adapter(tmp_path / "adapter", tensors, base)
    found = convert(adapter, tmp_path / "found").path
    right = convert(merged_by_hand(base, tmp_path / "merged", added), tmp_path / "right").path
    same_bundles(found, right)
    changed = "model.layers.0.self_attn.q_proj.weight"
    plain = read_tensors(bundle("tiny") / "decoder.safetensors")[changed]
    assert not mx.array_equal(read_tensors(found / "decoder.safetensors")[changed], plain)
    # Another answer than the base's, and the one of the weights that were merged by hand.
    prompt = golden_prompt("tiny", "one image")
    answers = [
        list(load(path).generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True).token_ids)
        for path in (found, right)
    ]
    assert answers[0] == answers[1] != prompt.greedy_ids


def test_ranks_and_alphas_of_single_layers(checkpoint, tmp_path):
    """By the end of a name, or a regular expression; the first that fits counts."""
    base = checkpoint("tiny")
    deep, wide = "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.v_proj"
    tensors, added = deltas(base, [LAYER])  # alpha 8 over rank 4
    for module, rank, scale in ((deep, 2, 4.0), (wide, 8, 4.0)):
        more, delta = deltas(base, [module], rank, scale)
        tensors |= more
        added |= delta
    patterns = {
        "rank_pattern": {"down_proj": 2, r"layers\.\d+\.self_attn\.v_proj": 8, "v_proj": 16},
        "alpha_pattern": {"v_proj": 32},
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, base, **patterns)
    same_reading(adapter, merged_by_hand(base, tmp_path / "merged", added))


def test_rslora_divides_by_the_root(checkpoint, tmp_path):
    base = checkpoint("tiny")
    tensors, added = deltas(base, MODULES, rank=16, scale=2.0)  # 8 / sqrt(16); by the rank it would be 0.5
    adapter = write_adapter(tmp_path / "adapter", tensors, base, r=16, use_rslora=True)
    same_reading(adapter, merged_by_hand(base, tmp_path / "merged", added))


@pytest.mark.parametrize("prefix", ["base_model.model.", "base_model.", "model.", ""])
def test_prefixes_that_were_taken_off(checkpoint, tmp_path, prefix):
    """Of LLaVA's other tensors the loader takes off one part, or both; people save them like that."""
    base = checkpoint("tiny")
    bias = np.arange(128, dtype=np.float32) / 64
    adapter = write_adapter(tmp_path / "adapter", {f"{prefix}model.mm_projector.0.bias": bias}, base)
    assert mx.array_equal(open_checkpoint(adapter).read("model.mm_projector.0.bias"), mx.array(bias))


def test_names_of_older_files(checkpoint, tmp_path):
    base = checkpoint("tiny")
    a, b = factors(LAYER, shape_of(base, f"{LAYER}.weight"), 4)
    adapter = write_adapter(tmp_path / "adapter", pair(LAYER, a, b, ".default"), base)
    same_reading(adapter, merged_by_hand(base, tmp_path / "merged", {f"{LAYER}.weight": 2 * b @ a}))


def test_what_the_adapter_holds_whole(checkpoint, tmp_path):
    """A head that was trained whole, a bias, and the two names that PEFT gives them."""
    base = checkpoint("tiny-untied")
    head = np.full((1024, 128), 0.25, np.float32)
    bias = np.arange(128, dtype=np.float32) / 64
    tensors, added = deltas(base, [LAYER])
    tensors |= {
        f"{PREFIX}lm_head.modules_to_save.default.weight": head,
        f"{PREFIX}{LAYER}.base_layer.bias": bias,
        f"{PREFIX}model.layers.1.self_attn.q_proj.bias": bias,
    }
    adapter = write_adapter(tmp_path / "adapter", tensors, base, bias="all", modules_to_save=["lm_head"])
    merged = merged_by_hand(base, tmp_path / "merged", added)
    weights = mx.load(str(merged / "model.safetensors"))
    weights["lm_head.weight"] = mx.array(head).astype(mx.bfloat16)
    for layer in (0, 1):
        weights[f"model.layers.{layer}.self_attn.q_proj.bias"] = mx.array(bias).astype(mx.bfloat16)
    mx.save_safetensors(str(merged / "model.safetensors"), weights)
    same_reading(adapter, merged)


def test_an_embedding_of_its_own_head(checkpoint, tmp_path):
    """Its factors are those of the transpose; PEFT saves the whole embedding beside them."""
    base = checkpoint("tiny-untied")
    name = "model.embed_tokens"
    b, a = factors(name, (128, 1024), 4)[::-1]  # (128, 4) and (4, 1024)
    tensors = {f"{PREFIX}{name}.lora_embedding_A": a, f"{PREFIX}{name}.lora_embedding_B": b}
    whole = mx.load(str(base / "model.safetensors"))[f"{name}.weight"].astype(mx.float32)
    tensors[f"{PREFIX}{name}.base_layer.weight"] = np.array(whole) + 0.5
    adapter = write_adapter(tmp_path / "adapter", tensors, base)
    added = {f"{name}.weight": 0.5 + 2 * (b @ a).T}
    # One addition instead of two: exact, as the sums have few bits.
    same_reading(adapter, merged_by_hand(base, tmp_path / "merged", added))


def test_convolutions_and_matrices_of_the_vision_tower(checkpoint, tmp_path):
    base = checkpoint("tiny")
    modules = [
        VISION + "patch_embed.0.reparam_conv",  # 3x3
        VISION + "network.0.0.convffn.fc1",  # 1x1
        VISION + "network.7.0.token_mixer.qkv",  # a matrix
    ]
    tensors, added = deltas(base, modules)
    adapter = write_adapter(tmp_path / "adapter", tensors, base)
    right = convert(merged_by_hand(base, tmp_path / "merged", added), tmp_path / "right").path
    same_bundles(convert(adapter, tmp_path / "found").path, right)


def test_what_llava_trains_beside_the_adapter(checkpoint, tmp_path):
    """non_lora_trainables.bin: the projector, whole."""
    torch = pytest.importorskip("torch", reason="the convert extra isn't installed")
    base = checkpoint("tiny")
    tensors, added = deltas(base, [LAYER])
    adapter = write_adapter(tmp_path / "adapter", tensors, base)
    rng = np.random.default_rng(7)
    whole = {f"model.mm_projector.{i}.bias": rng.integers(-9, 9, 128) / 16 for i in (0, 2)}
    torch.save(
        {f"base_model.model.{n}": torch.tensor(v, dtype=torch.bfloat16) for n, v in whole.items()},
        adapter / "non_lora_trainables.bin",
    )
    merged = merged_by_hand(base, tmp_path / "merged", added)
    weights = mx.load(str(merged / "model.safetensors"))
    weights |= {name: mx.array(value.astype(np.float32)).astype(mx.bfloat16) for name, value in whole.items()}
    mx.save_safetensors(str(merged / "model.safetensors"), weights)
    found = convert(adapter, tmp_path / "found").path
    same_bundles(found, convert(merged, tmp_path / "right").path)
    recorded = Bundle.open(found).manifest.source.adapter
    assert recorded
    assert "non_lora_trainables.bin" in recorded.files


def test_llavas_names_on_a_base_of_another_layout(checkpoint, tmp_path):
    base = checkpoint("tiny")
    tensors, added = deltas(base, MODULES)
    right = convert(merged_by_hand(base, tmp_path / "merged", added), tmp_path / "right").path
    adapter = write_adapter(tmp_path / "adapter", tensors)
    for to_layout in (to_transformers, to_mlx_vlm):
        other = to_layout(base, tmp_path / to_layout.__name__)
        same_bundles(convert(adapter, tmp_path / f"found {to_layout.__name__}", base=other).path, right)


def test_names_of_transformers_own_model(checkpoint, tmp_path):
    base = checkpoint("tiny")
    _, added = deltas(base, [LAYER])
    a, b = factors(LAYER, shape_of(base, f"{LAYER}.weight"), 4)
    names = pair("model.language_model.layers.0.self_attn.q_proj", a, b)
    adapter = write_adapter(tmp_path / "adapter", names, to_transformers(base, tmp_path / "base"))
    right = convert(merged_by_hand(base, tmp_path / "merged", added), tmp_path / "right").path
    same_bundles(convert(adapter, tmp_path / "found").path, right)


def test_names_of_transformers_on_its_older_files(checkpoint, tmp_path):
    """It loads `language_model.model.` as `model.language_model.`, and adapters are saved under the latter; or not."""
    base = checkpoint("tiny")
    newer = to_transformers(base, tmp_path / "newer")
    older = shutil.copytree(newer, tmp_path / "older")
    weights = mx.load(str(newer / "model.safetensors"))
    mx.save_safetensors(str(older / "model.safetensors"), {older_name(name): v for name, v in weights.items()})
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in Checkpoint(older).tensors
    projector, convolution = "model.mm_projector.2", VISION + "network.0.0.convffn.fc1"
    theirs = {  # in-memory names
        LAYER: "model.language_model.layers.0.self_attn.q_proj",
        projector: "model.multi_modal_projector.linear_2",
        convolution: "model.vision_tower.timm_model.stages.0.blocks.0.mlp.fc1",
    }
    _, added = deltas(base, theirs)
    right = convert(merged_by_hand(base, tmp_path / "merged", added), tmp_path / "right").path
    for number, (files, name_of) in enumerate(((older, str), (newer, older_name), (older, older_name))):
        tensors = {}
        for ours, name in theirs.items():
            tensors |= pair(name_of(name), *factors(ours, shape_of(base, f"{ours}.weight"), 4))
        adapter = write_adapter(tmp_path / f"adapter{number}", tensors, files)
        same_bundles(convert(adapter, tmp_path / f"found{number}").path, right)


def older_name(name: str) -> str:
    """What transformers called a tensor before its model was nested."""
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    return "language_model.lm_head.weight" if name == "lm_head.weight" else name.removeprefix("model.")


def test_quantised_after_merging(checkpoint, tmp_path):
    base = checkpoint("tiny")
    tensors, added = deltas(base, MODULES)
    adapter = write_adapter(tmp_path / "adapter", tensors, base)
    merged = merged_by_hand(base, tmp_path / "merged", added)
    found, right = (convert(s, tmp_path / f"b {s.name}", Options(q_bits=4)).path for s in (adapter, merged))
    same_bundles(found, right)


def test_the_command_and_what_it_records(checkpoint, tmp_path, monkeypatch, capsys):
    """The base is the one that is given; a second run does nothing; another adapter makes the bundle again."""
    base = checkpoint("tiny")
    tensors, _ = deltas(base, MODULES)
    adapter = write_adapter(tmp_path / "tuned", tensors, "org/somewhere")
    monkeypatch.chdir(tmp_path)
    argv = [str(adapter), "--base", str(base), "--no-coreml"]
    assert main(argv) == 0
    assert capsys.readouterr().out == "wrote models/converted/tuned\n"
    opened = Bundle.open(tmp_path / "models/converted/tuned")
    source = opened.manifest.source
    assert (source.id, source.adapter and source.adapter.id) == ("tiny", "tuned")
    assert set(source.files) == {"model.safetensors", "config.json", "generation_config.json"}
    assert source.adapter
    assert set(source.adapter.files) == {"adapter_config.json", "adapter_model.safetensors"}
    assert opened.config.name == "tiny with tuned"
    assert opened.manifest.changes[0] == "LoRA adapter tuned merged into 3 matrices (rank 4, alpha 8)"
    assert main(argv) == 0
    assert "is up to date" in capsys.readouterr().out
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 16}))
    assert main(argv) == 0
    assert "wrote" in capsys.readouterr().out


def test_a_merge_in_blocks(checkpoint, tmp_path, monkeypatch):
    """A block of three rows at a time: the last one is smaller."""
    base = checkpoint("tiny")
    tensors, _ = deltas(base, [LAYER])
    opened = open_checkpoint(write_adapter(tmp_path / "adapter", tensors, base))
    whole = opened.read(f"{LAYER}.weight")
    monkeypatch.setattr("fastvlm_convert.lora.ROWS_BYTES", 3 * 128 * 4)
    assert mx.array_equal(opened.read(f"{LAYER}.weight"), whole)


def test_verify_compares_with_the_merged_weights(checkpoint, tmp_path):
    """The vision weights that a package is checked against are those with the adapter in them."""
    from fastvlm_convert.verify import _weights_of_source
    from fastvlm_mlx.errors import InputError
    from support.folded import folded_vision

    base = checkpoint("tiny")
    tensors, added = deltas(base, [VISION + "network.0.0.convffn.fc1"])
    adapter = write_adapter(tmp_path / "adapter", tensors)
    bundle = Bundle.open(convert(adapter, tmp_path / "bundle", base=base).path)
    found = _weights_of_source(bundle, adapter, base)
    _, right = folded_vision(merged_by_hand(base, tmp_path / "merged", added))
    assert found.keys() == right.keys()
    assert all(np.array_equal(found[name], right[name]) for name in right)
    with pytest.raises(InputError, match=r"isn't what .* was made from: that is tiny with adapter"):
        _weights_of_source(bundle, base, None)
