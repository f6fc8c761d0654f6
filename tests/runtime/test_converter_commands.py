"""What the run time hands over to the converter, a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_mlx import hub
from fastvlm_mlx.cli import main
from fastvlm_mlx.converter import run_converter

SPEAKS = {"verify": "usage: fastvlm verify", "placement": "usage: fastvlm placement"}


@pytest.mark.parametrize("name", SPEAKS)
def test_each_command_is_the_one_of_its_name(name, capfd):
    assert main([name, "--help"]) == 0
    assert SPEAKS[name] in capfd.readouterr().out


@pytest.mark.parametrize("argv", [["verify", "--debug", "no such"], ["--debug", "verify", "no such"]])
def test_debug_works_in_either_place(argv, capfd):
    assert main(argv) == 1
    assert "Traceback" in capfd.readouterr().err


def test_the_exit_code_is_the_commands_own(capfd, tmp_path):
    assert main(["verify", str(tmp_path / "with blanks")]) == 2
    assert capfd.readouterr().err.startswith("fastvlm verify: error: ")
    assert main(["placement", str(tmp_path / "nothing")]) == 2
    assert capfd.readouterr().err.startswith("fastvlm placement: error: ")


def test_interrupted(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    assert run_converter(["x"]) == 130
    assert main(["verify", "x"]) == 130


@pytest.mark.parametrize(("system", "coreml"), [("darwin", True), ("linux", False)])
def test_the_hub_makes_packages_where_they_run(monkeypatch, tmp_path, system, coreml):
    seen = []

    def converted(arguments, silent):
        seen.append(arguments)
        assert silent
        return 0

    monkeypatch.setattr(hub, "run_converter", converted)
    monkeypatch.setattr(sys, "platform", system)
    snapshot = tmp_path / "snapshots" / "0123"
    target = hub._as_bundle("org/model", snapshot)
    assert isinstance(target, Path)
    (arguments,) = seen
    assert arguments[:3] == [str(snapshot), "-o", str(target)]
    assert arguments[3:7] == ["--source-id", "org/model", "--revision", "0123"]
    assert ("--no-coreml" not in arguments) == coreml
