"""A run that begins with a checkpoint's weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import torch
from safetensors.torch import load_file, save_file

from fastvlm_mlx.errors import InputError
from nano import scenes
from nano.export import export
from nano.network import NanoVLM
from nano.schedule import STARTED
from nano.settings import NanoConfig
from nano.starting import load_weights, read_config
from nano.train import main
from nano.trainer import Trainer
from support.nano_run import CONFIG, SETTINGS, SIDE, make_trainer

PIXELS = torch.stack(
    [torch.from_numpy(scenes.make_scene(seed, side=SIDE).image.transpose(2, 0, 1)) for seed in range(32)]
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """One that was never trained."""
    return make_trainer(tmp_path_factory.mktemp("start") / "run")


def exported(run: Trainer, folder: Path, scales: tuple[int, ...]) -> tuple[NanoVLM, Path]:
    torch.manual_seed(1)
    model = NanoVLM(replace(run.model.config, scales=scales)).eval()
    export(model, run.tokenizer, folder, torch.float32)
    return model, folder


def start(checkpoint: Path, folder: Path) -> Trainer:
    return Trainer(folder, read_config(checkpoint), SETTINGS, scenes, lambda _: None, checkpoint)


@pytest.mark.parametrize("scales", [(2, 3), (3,)])
def test_the_sizes_and_all_weights_are_the_checkpoints(run, tmp_path, scales):
    model, checkpoint = exported(run, tmp_path / "checkpoint", scales)
    assert read_config(checkpoint) == model.config
    started = start(checkpoint, tmp_path / "run")
    assert started.model.config == model.config
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == run.tokenizer.read_bytes()
    for name, tensor in model.published_state().items():
        assert torch.equal(started.model.published_state()[name], tensor), name


def test_maps_that_were_not_pooled_change_nothing_at_first_and_can_be_learnt(run, tmp_path):
    old, checkpoint = exported(run, tmp_path / "checkpoint", ())
    model = start(checkpoint, tmp_path / "run").model.eval()
    assert model.config.scales == CONFIG.scales
    with torch.no_grad():
        features = model.encode(PIXELS)
        wide = old.config.feature_dim
        assert torch.allclose(features[..., :wide], old.encode(PIXELS))
        assert torch.allclose(model.projector(features), old.projector(old.encode(PIXELS)), atol=1e-5)
    model.requires_grad_(True)  # the stage has frozen it
    model.projector(model.encode(PIXELS)).square().sum().backward()
    added = model.projector[0].weight.grad[:, wide:]
    assert (added.abs().amax(0) > 0).all()


def test_new_filters_say_things_of_one_size(run, tmp_path):
    """Of the pictures they are scaled by: a map's channels differ by a factor of fifty."""
    old, checkpoint = exported(run, tmp_path / "checkpoint", ())
    model = NanoVLM(read_config(checkpoint))
    load_weights(model, checkpoint, PIXELS)
    said = model.encode(PIXELS).detach()[..., old.config.feature_dim :].flatten(0, 1)
    assert said.shape[1] == CONFIG.dims[2] + CONFIG.dims[3]
    assert torch.allclose(said.mean(0), torch.zeros(said.shape[1]), atol=1e-3)
    assert torch.allclose(said.std(0), torch.ones(said.shape[1]), atol=1e-3)


@pytest.mark.parametrize("stage", [1, 3])  # one that mixes, one that attends
def test_added_blocks_change_nothing_at_first_and_can_be_learnt(run, tmp_path, stage):
    old, checkpoint = exported(run, tmp_path / "checkpoint", (2, 3))
    depths = tuple(depth + 2 * (index == stage) for index, depth in enumerate(CONFIG.depths))
    config = read_config(checkpoint, depths=depths)
    assert config == replace(old.config, depths=depths)
    model = NanoVLM(config)
    load_weights(model, checkpoint, PIXELS)
    model.eval()
    features = model.encode(PIXELS)
    assert torch.equal(features, old.encode(PIXELS))
    features.square().sum().backward()
    index = [i for i, layer in enumerate(model.vision.network) if isinstance(layer, torch.nn.Sequential)][stage]
    for number in (1, 2):
        block = model.vision.network[index][number]
        mixer = block.token_mixer
        last = mixer.reparam_conv.weight if hasattr(mixer, "reparam_conv") else mixer.proj.weight
        for weight in (block.convffn.fc2.weight, last):
            assert weight.grad.abs().amax() > 0
        norm = block.convffn.conv.bn
        assert (norm.momentum, norm.training) == (torch.nn.BatchNorm2d(1).momentum, False)
        normed = norm(block.convffn.conv.conv(inputs_of(model, block)))
        assert torch.allclose(normed.mean((0, 2, 3)), torch.zeros(normed.shape[1]), atol=1e-3)
        # Both halves of the pictures, seen one after the other, have been averaged.
        assert torch.allclose(normed.std((0, 2, 3)), torch.ones(normed.shape[1]), atol=0.05)


def inputs_of(model: NanoVLM, block: torch.nn.Module) -> torch.Tensor:
    """What a block's ConvFFN gets of PIXELS."""
    seen: list[torch.Tensor] = []
    hook = block.convffn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.encode(PIXELS)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("stage", range(5))
def test_a_checkpoint_does_not_become_shallower(run, tmp_path, stage):
    _, checkpoint = exported(run, tmp_path / "checkpoint", (2, 3))
    config = json.loads((checkpoint / "config.json").read_text())
    config["mm_vision_config"]["layers"][stage] = 3
    (checkpoint / "config.json").write_text(json.dumps(config))
    depths = [2, 2, 2, 2, 2]
    found = ",".join(str(3 if index == stage else 1) for index in range(5))
    with pytest.raises(InputError, match=f"has stages of {found} blocks, not 2,2,2,2,2; give --depths as many"):
        read_config(checkpoint, depths=tuple(depths))


@pytest.mark.parametrize("layers", [[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, "3", 1, 1], "11111", []])
def test_stages_that_cannot_be_are_no_checkpoint_of_ours(run, tmp_path, layers):
    _, checkpoint = exported(run, tmp_path / "checkpoint", (2, 3))
    config = json.loads((checkpoint / "config.json").read_text())
    config["mm_vision_config"]["layers"] = layers
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config.json isn't one that train.py exported"):
        read_config(checkpoint)


def test_a_start_may_have_larger_pictures(run, tmp_path):
    old, checkpoint = exported(run, tmp_path / "checkpoint", (2, 3))
    assert (read_config(checkpoint).side, read_config(checkpoint, side=192).side) == (SIDE, 192)
    sides: list[int] = []

    def make_scene(seed: int, split: str = "train", side: int = 0, family: str | None = None) -> scenes.Scene:
        sides.append(side)
        return scenes.make_scene(seed, split, side, family)

    world: Any = SimpleNamespace(**{name: getattr(scenes, name) for name in scenes.__all__})
    world.make_scene = make_scene
    config = read_config(checkpoint, side=192)
    started = Trainer(tmp_path / "run", config, SETTINGS, world, lambda _: None, checkpoint)
    assert set(sides) == {192}  # those by which new filters and norms would be scaled
    assert started.model.config == replace(old.config, side=192)


def test_it_begins_with_what_reads_features_and_trains_to_the_end(run, tmp_path):
    _, checkpoint = exported(run, tmp_path / "checkpoint", ())
    started = start(checkpoint, tmp_path / "run")
    assert (started.stage, started.step) == (STARTED, 0)
    before = {name: tensor.clone() for name, tensor in started.model.state_dict().items()}
    started.run(lambda: len(started.losses) >= SETTINGS.stage_steps[STARTED])
    moved = {name.split(".")[0] for name, t in started.model.state_dict().items() if not torch.equal(before[name], t)}
    assert moved == {"projector", "decoder"}
    started.run()
    assert len(started.losses) == sum(SETTINGS.stage_steps[STARTED:])
    again = Trainer(tmp_path / "run", CONFIG, SETTINGS, scenes, lambda _: None, checkpoint)
    assert again.finished  # its own state comes before the checkpoint
    assert torch.equal(again.model.projector[0].weight, started.model.projector[0].weight)


def test_a_folder_that_is_no_checkpoint_is_refused_in_a_sentence(run, tmp_path):
    _, checkpoint = exported(run, tmp_path / "checkpoint", ())
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        broken = Path(shutil.copytree(checkpoint, tmp_path / name))
        (broken / name).unlink()
        with pytest.raises(InputError, match=f"lacks {name}; give a folder"):
            read_config(broken)
    for text in ("no json", "[]", json.dumps({"vocab_size": 64})):
        (checkpoint / "config.json").write_text(text)
        with pytest.raises(InputError, match=r"config.json isn't one that train.py exported"):
            read_config(checkpoint)


def test_a_start_that_cannot_be_is_one_line_and_makes_no_folder(tmp_path, capsys):
    for options, message in (
        (["--start", str(tmp_path / "nothing")], "lacks config.json, model.safetensors, tokenizer.json;"),
        (["--start", str(tmp_path), "--dims", "16,48,96,192,192"], "leave --dims out"),
        (["--start", str(tmp_path), "--stage-steps", "9,9,9,0,0,0"], "--start leaves the first 3 stages out;"),
    ):
        assert main([str(tmp_path / "run"), *options]) == 2
        text = capsys.readouterr().err
        assert message in text
        assert text.count("\n") == 1
        assert not (tmp_path / "run").exists()


def test_the_command_begins_there(run, tmp_path, capsys):
    _, checkpoint = exported(run, tmp_path / "checkpoint", ())
    options = ["--start", str(checkpoint), "--stage-steps", "9,9,9,1,1,1", "--batch", "2"]
    assert main([str(tmp_path / "run"), *options, "--workers", "0", "--minutes", "1e-9"]) == 0
    assert f"goes on with stages of 1,1,1,1,1 blocks and {SIDE} px" in capsys.readouterr().out
    assert not (tmp_path / "run" / "state.pt").exists()  # no time for a step, so nothing to go on from
    assert main([str(tmp_path / "run"), *options, "--workers", "0"]) == 0
    assert (tmp_path / "run" / "checkpoint" / "model.safetensors").exists()


def test_the_command_takes_larger_pictures_and_more_blocks_where_it_is_told(run, tmp_path, capsys, monkeypatch):
    _, checkpoint = exported(run, tmp_path / "checkpoint", (2, 3))
    begun: list[NanoConfig] = []
    monkeypatch.setattr(Trainer, "run", lambda self, stop: begun.append(self.model.config) or stop())
    options = ["--start", str(checkpoint), "--side", "192", "--depths", "1,1,2,1,1"]
    assert main([str(tmp_path / "run"), *options, "--minutes", "1e-9"]) == 0
    assert "goes on with stages of 1,1,2,1,1 blocks and 192 px" in capsys.readouterr().out
    assert [(config.side, config.depths) for config in begun] == [(192, (1, 1, 2, 1, 1))]


def test_other_tensors_are_named(run, tmp_path):
    """What a checkpoint lacks of its own is not made up: a tensor, a block, a stage."""
    _, checkpoint = exported(run, tmp_path / "checkpoint", (2, 3))
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.mm_projector.2.bias"
    model = NanoVLM(read_config(checkpoint))
    block = "model.vision_tower.vision_tower.model.network.4.0."
    for lacking, other in ((name, {}), (name, {name: torch.zeros(3)}), (block, {})):
        rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(lacking)}
        save_file(rest | other, checkpoint / "model.safetensors")
        with pytest.raises(InputError, match=rf"other tensors than this model: {lacking}"):
            load_weights(model, checkpoint, PIXELS)
