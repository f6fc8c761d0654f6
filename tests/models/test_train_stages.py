"""What the stages' settings do to a run: rates, shares of the pictures, stages left out."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

import torch

from nano import scenes
from nano.record import CURVE
from nano.schedule import STAGES, rate_factor
from nano.targets import Batches
from nano.train import main
from nano.vocabulary import PAGE, SHAPED, SIGN
from support.nano_run import SETTINGS, make_trainer, stop_after


def lines_of(folder: Path) -> list[dict[str, str]]:
    with (folder / CURVE).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_rate_is_a_factor_of_all_the_stages_rates(tmp_path: Path):
    settings = replace(SETTINGS, rate=0.25)
    for step in (1, 2):  # the second is of a run that was gone on with
        trainer = make_trainer(tmp_path / "run", settings)
        trainer.run(stop_after(trainer, 1))
        rates = {group["lr"] for group in trainer.optimizer.param_groups}
        assert rates == {0.25 * rate_factor(step - 1, SETTINGS.stage_steps[0]) * STAGES[0].rates["late"]}


def test_a_batch_has_the_shares_and_the_rest_is_free():
    def families(**shares: float) -> list[str | None]:
        return Batches(scenes.make_scene, scenes.KINDS, 0, 16, 64, **shares).families

    assert families() == [None] * 16
    assert families(signs=0.2, shapes=0.3) == [SIGN] * 3 + [SHAPED] * 5 + [None] * 8
    assert families(pages=0.3, signs=0.1) == [PAGE] * 5 + [SIGN] * 2 + [None] * 9


def test_stages_of_no_steps_are_left_out_and_start_goes_on_with_the_last(tmp_path: Path, capsys):
    """The way the weights went: from a checkpoint straight into the stage of shapes."""
    first = make_trainer(tmp_path / "first", replace(SETTINGS, stage_steps=(1, 0, 0, 0, 0, 0)))
    first.run()
    assert first.finished
    assert main([str(tmp_path / "first"), "--export", str(tmp_path / "checkpoint")]) == 0
    options = ["--stage-steps", "0,0,0,0,0,1", "--batch", "2", "--workers", "0"]
    assert main([str(tmp_path / "run"), "--start", str(tmp_path / "checkpoint"), *options]) == 0
    assert [(line["stage"], line["step"]) for line in lines_of(tmp_path / "run")] == [("shapes", "1")]
    assert f"wrote {tmp_path / 'run' / 'checkpoint'}" in capsys.readouterr().out


def test_an_encoder_that_is_left_out_starts_no_projector(tmp_path: Path):
    trainer = make_trainer(tmp_path, replace(SETTINGS, stage_steps=(0, 1, 0, 0, 0, 0)))
    before = trainer.model.projector[0].weight.detach().clone()
    trainer.run(lambda: trainer.stage == 1)
    assert torch.equal(trainer.model.projector[0].weight, before)
