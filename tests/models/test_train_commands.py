"""train.py and scenes.py as commands: what they refuse, and with which settings a run goes on."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import torch

from fastvlm_mlx.errors import InputError
from nano import scenes
from nano.record import STATE, load_state
from nano.settings import NanoConfig, Settings
from nano.train import main
from nano.trainer import Trainer
from support.nano_run import CONFIG, SETTINGS, make_trainer, stop_after

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped in stage 2, after a step of it."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    trainer = make_trainer(folder)
    trainer.run(stop_after(trainer, SETTINGS.stage_steps[0] + 1))
    return folder


@pytest.fixture
def begun(stopped: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--side", "100", "side needs a multiple of 64 from 64 on, not 100"),
        ("--side", "0", "side needs a multiple of 64"),
        ("--side", "-64", "side needs a multiple of 64"),
        ("--batch", "0", "batch needs a number from 1 on, not 0"),
        ("--questions", "0", "questions needs a number from 1 on"),
        ("--workers", "-1", "workers needs a number from 0 on"),
        ("--evaluate-every", "0", "evaluate_every needs a number from 1 on"),
        ("--rate", "0", "rate needs a number above 0, at most 10, not 0"),
        ("--rate", "11", "rate needs a number above 0, at most 10, not 11"),
        ("--rate", "nan", "rate needs a number above 0"),
        ("--stage-steps", "0,0,0,0,0,0", "stage_steps needs a stage with steps"),
        ("--seed", "-1", "seed needs a number from 0 on"),
        ("--minutes", "0", "minutes needs a number above 0"),
        ("--minutes", "nan", "minutes needs a number above 0"),
        ("--stage-steps", "1,2", "six numbers from 0 on"),
        ("--stage-steps", "1,2,3,4,5,-1", "six numbers from 0 on"),
        ("--dims", "16,48,96,192", "dims needs five positive numbers"),
        ("--dims", "0,48,96,192,192", "dims needs five positive numbers"),
        ("--dims", "16,40,96,192,192", "each a multiple of the one before"),
        ("--dims", "16,16,16,16,16", "of 32, too; got 16,16,16,16,16"),
        ("--depths", "1,2,3,2", "depths needs five positive numbers; got 1,2,3,2"),
        ("--depths", "1,2,0,2,1", "depths needs five positive numbers"),
        ("--device", "gpu", "can't use the device 'gpu'"),
        ("--device", "meta", "can't use the device 'meta'"),
        ("--export", "checkpoint", "no state.pt to export"),
    ],
)
def test_a_wrong_option_is_one_line_and_writes_nothing(tmp_path, capsys, option, value, message):
    assert main([str(tmp_path / "out"), option, value]) == 2
    assert message in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--stage-steps", "--dims", "--depths"])
def test_what_are_no_numbers_is_said_in_a_sentence(tmp_path, capsys, option):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "out"), option, "a,b"])
    assert stopped.value.code == 2
    assert f"argument {option}: needs whole numbers with commas between them, not 'a,b'" in capsys.readouterr().err


def test_help_and_mistakes_need_no_torch(tmp_path):
    code = "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'mlx.core', 'numpy')))\n"
    code += "from nano.train import main\n"
    code += f"assert main([{str(tmp_path / 'out')!r}, '--side', '100']) == 2\n"
    code += "main(['--help'])"
    paths = "import sys; sys.path[:0] = " + repr([str(ROOT / "models"), str(ROOT / "src")]) + "\n"
    result = subprocess.run([sys.executable, "-c", paths + code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    text = " ".join(result.stdout.split())
    for default in ("13000,6000,6000,350,4000,2000", "16,48,96,192,192", "1,2,5,2,1", "16", "250", "320"):
        assert f"(default {default})" in text
    assert "(default: at the end)" in text


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers that the command makes, which then train nothing."""
    trainers: list[Trainer] = []
    monkeypatch.setattr(Trainer, "run", lambda self, stop: trainers.append(self) or stop())
    return trainers


def test_a_run_that_is_there_is_not_begun_anew(begun, capsys):
    before = (begun / STATE).read_bytes()
    assert main([str(begun)]) == 2
    assert "--resume" in one_line(capsys)
    assert (begun / STATE).read_bytes() == before


def test_a_new_run_has_the_defaults_and_what_was_given(tmp_path, monkeypatch):
    seen: list[tuple[NanoConfig, Settings]] = []

    def stand_in(folder: Path, config: NanoConfig, settings: Settings, *_: Any) -> Any:
        seen.append((config, settings))
        raise InputError("enough")

    monkeypatch.setattr("nano.trainer.Trainer", stand_in)
    assert main([str(tmp_path)]) == 2
    options = "--seed 3 --stage-steps 5,6,7,8,9,0 --batch 4 --questions 2 --workers 0 --evaluate-every 9 --device cpu"
    options += " --rate 0.5 --side 128 --dims 8,24,48,96,96 --depths 1,1,1,1,2"
    assert main([str(tmp_path), "--resume", *options.split()]) == 2
    assert seen[0] == (NanoConfig(), Settings())
    given = Settings(3, (5, 6, 7, 8, 9, 0), rate=0.5, batch=4, questions=2, workers=0, evaluate_every=9)
    assert seen[1] == (NanoConfig(side=128, dims=(8, 24, 48, 96, 96), depths=(1, 1, 1, 1, 2)), given)


def test_a_run_goes_on_with_its_own_settings(begun, made):
    assert main([str(begun), "--resume"]) == 0
    assert made[0].settings == SETTINGS != Settings()
    assert replace(made[0].model.config, vocabulary=CONFIG.vocabulary) == CONFIG
    assert (made[0].stage, made[0].step, made[0].changes) == (1, 1, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seed 1", "has seed 0, not seed 1;"),
        ("--batch 3 --questions 5", "has batch 2, questions 8, not batch 3, questions 5;"),
        ("--side 256", "has side 128, not side 256;"),
        ("--dims 16,48,96,192,192", "has dims 8,24,48,96,96, not dims 16,48,96,192,192;"),
        ("--depths 1,1,2,1,1", "has depths 1,1,1,1,1, not depths 1,1,2,1,1;"),
        (
            "--stage-steps 4,2,3,1,2,1",
            "in stage 2 after 1 steps, has stage_steps 3,2,3,1,2,1, not stage_steps 4,2,3,1,2,1;",
        ),
    ],
)
def test_a_run_does_not_become_another(begun, capsys, made, options, message):
    before = (begun / STATE).read_bytes()
    assert main([str(begun), "--resume", *options.split()]) == 2
    assert message in one_line(capsys)
    assert (begun / STATE).read_bytes() == before
    assert not made


def test_a_stage_has_no_fewer_steps_than_were_done(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.run(stop_after(trainer, 2))
    with pytest.raises(
        InputError, match="in stage 1 after 2 steps, has stage_steps 3,2,3,1,2,1, not stage_steps 1,2,3,4,5,6"
    ):
        make_trainer(tmp_path, replace(SETTINGS, stage_steps=(1, 2, 3, 4, 5, 6)))


@pytest.mark.parametrize("schedule", [None, [["encoder", 128], ["signs", 128]]])
def test_a_run_of_other_stages_is_only_exported(begun, tmp_path, capsys, schedule):
    """Its pictures would be others from one step to the next, and its optimiser's parameters others."""
    state = load_state(begun, "cpu")
    steps = tuple(100 for _ in schedule or range(5))  # fewer stages than there are now
    state |= {"schedule": schedule, "stage": 1, "optimizer": {"state": {}, "param_groups": []}}
    state["settings"]["stage_steps"] = steps
    torch.save({k: v for k, v in state.items() if v is not None}, begun / STATE)
    before = (begun / STATE).read_bytes()
    assert main([str(begun), "--resume"]) == 2
    assert "was begun with other stages; choose another folder, or go on from its weights: --export" in one_line(capsys)
    assert (begun / STATE).read_bytes() == before
    assert main([str(begun), "--export", str(tmp_path / "checkpoint")]) == 0
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()


def test_what_may_change_is_noted_in_the_state(begun, capsys):
    options = ["--stage-steps", "3,1,2,1,1,0", "--evaluate-every", "50", "--device", "cpu", "--minutes", "1e-9"]
    assert main([str(begun), "--resume", *options]) == 0  # no time for a step
    assert "from here on: stage_steps 3,1,2,1,1,0, evaluate_every 50" in capsys.readouterr().out
    first = {
        "stage": 1,
        "step": 1,
        "settings": {"stage_steps": ((3, 2, 3, 1, 2, 1), (3, 1, 2, 1, 1, 0)), "evaluate_every": (2, 50)},
    }
    assert load_state(begun, "cpu")["changes"] == [first]
    assert main([str(begun), "--resume"]) == 0  # with the new ones, to the end
    state = load_state(begun, "cpu")
    assert state["changes"] == [first]
    assert state["settings"] == asdict(replace(SETTINGS, stage_steps=(3, 1, 2, 1, 1, 0), evaluate_every=50))
    assert (begun / "checkpoint" / "config.json").exists()
    rows = [line.split(",")[1:3] for line in (begun / "curve.csv").read_text().splitlines()[1:]]
    assert rows == [["encoder", "2"], ["encoder", "3"], ["everything", "2"], ["readers", "1"], ["signs", "1"]]
    assert main([str(begun), "--resume", "--stage-steps", "3,1,2,1,1,5"]) == 2  # it has ended


def test_a_state_that_names_no_settings_takes_those_given_and_notes_them(begun):
    state = load_state(begun, "cpu")
    del state["settings"], state["changes"]
    torch.save(state, begun / STATE)
    (change,) = make_trainer(begun, replace(SETTINGS, seed=5)).changes
    assert (change["stage"], change["step"]) == (1, 1)
    assert change["settings"] == {name: (None, now) for name, now in asdict(replace(SETTINGS, seed=5)).items()}


def test_a_start_that_fails_is_not_in_the_way_of_another(tmp_path, monkeypatch):
    def fail(*_: object) -> float:
        raise MemoryError

    trainer = make_trainer(tmp_path)
    trainer._train_step = fail
    with pytest.raises(MemoryError):
        trainer.run()
    assert not (tmp_path / STATE).exists()
    again = make_trainer(tmp_path, replace(SETTINGS, seed=2))
    again.run(stop_after(again, 1))
    again._train_step = fail
    with pytest.raises(MemoryError):
        again.run()
    assert load_state(tmp_path, "cpu")["step"] == 1, "what was done is kept"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--side 8", "side needs a number from 32 on, not 8"),
        ("--seed -1", "seed needs a number from 0 on, not -1"),
        ("--count -3", "count needs a number from 1 on, not -3"),
        ("--count 0", "count needs a number from 1 on, not 0"),
        ("--side 101 --wide", "a multiple of 4, not 101"),
        ("--side 102 --wide", "a multiple of 4, not 102"),
        ("--side 8 --wide", "side needs a number from 32 on, not 8"),
    ],
)
def test_scenes_that_cannot_be_are_one_line_and_leave_what_is_there(tmp_path, capsys, options, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    assert scenes.main([str(tmp_path / "out"), *options.split()]) == 2
    assert message in one_line(capsys)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_scenes_are_the_ones_asked_for(tmp_path, capsys):
    options = ["--split", "held-out", "--count", "2", "--seed", "7", "--side", "101"]
    assert scenes.main([str(tmp_path / "out"), *options]) == 0
    assert "2 pictures" in capsys.readouterr().out
    for index in range(2):
        with Image.open(tmp_path / "out" / f"{index:04}.png") as picture:
            assert np.array_equal(np.asarray(picture), scenes.make_scene(7 + index, "held-out", 101).image)
