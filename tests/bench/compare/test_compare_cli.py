"""`fastvlm-bench compare`: what a user types and sees. The rivals are fakes; `make parity` has the real ones."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastvlm_bench import accuracy, planner
from fastvlm_bench import cli as bench
from fastvlm_bench.cli import main
from fastvlm_bench.compare import cli
from fastvlm_bench.compare.job import Job
from fastvlm_bench.compare.rivals import OURS
from fastvlm_bench.doctor import cli as doctor
from fastvlm_bench.plots import cli as plots
from support.fake_side import write_interpreter, write_model


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """Put fakes in the place of all sides, ours included; returns what to call with their behaviours."""

    def prepare(behaviours):
        def job(args, rivals, pythons, plan):
            models = {
                name: write_model(tmp_path / name, log=str(tmp_path / "log"), **behaviours.get(name, {}))
                for name in (OURS, *rivals)
            }
            return Job("a fake", models, dict.fromkeys(models, write_interpreter(tmp_path)), plan, "float32", 2)

        monkeypatch.setattr(cli, "_prepare", job)
        pythons = [f"--python={name}={write_interpreter(tmp_path)}" for name in ("mlx-vlm", "transformers", "mlx-lm")]
        return lambda *argv: main(["compare", *pythons, *argv])

    return prepare


def table(out):
    return [line.split() for line in out.split("\n\n")[1].splitlines()[1:]]


def test_from_processes_to_table_and_json(fakes, tmp_path, capsys):
    compare = fakes({"mlx-vlm": {"ttft_s": [7, 2.0]}, OURS: {"ttft_s": [7, 7, 1.0]}})
    target = tmp_path / "new" / "out.json"
    assert compare("--against", "mlx-vlm,mlx-lm", "--resolution", "64", "--runs", "6", "--json", str(target)) == 0
    out, err = capsys.readouterr()
    assert "loading the model in mlx-vlm" in err
    rows = table(out)
    assert [(row[1], row[-8]) for row in rows if "faster" in row] == [("first", "2000.0-2000.0")]
    assert sum("mlx-lm" in row for row in rows) == 1
    data = json.loads(target.read_text())
    assert data["failures"] == {}
    assert data["sides"]["mlx-vlm"] | {"does": ""} == {
        "does": "",
        "versions": {"python": "3.0", "mlx-vlm": "1.2", "mlx": "1.2", "transformers": "1.2", "pillow": "1.2"},
        "device": "a fake",
        "threads": 2,
    }
    assert len(data["runs"]) == 6 * 4
    assert data["machine"]["cpu"]
    asked = [line.split()[:2] for line in (tmp_path / "log").read_text().splitlines()]
    assert len(asked) == 1 + 7 * 4
    in_turn = [OURS, "mlx-vlm", OURS, "mlx-lm"]
    assert [name for name, _ in asked[5:13]] == [*in_turn, *in_turn[1:], in_turn[0]]


def test_a_rival_with_other_answers_has_no_times_and_the_exit_code_says_so(fakes, capsys):
    compare = fakes({"mlx-vlm": {"wrong_at": 0}})
    assert compare("--against", "mlx-vlm,transformers", "--resolution", "64", "--runs", "1") == 1
    out, err = capsys.readouterr()
    assert any("transformers" in row for row in table(out))
    assert not any("mlx-vlm" in row for row in table(out))
    last = err.splitlines()[-1]
    assert last.startswith("fastvlm-bench compare: error: mlx-vlm answers the second question at 64 px otherwise")
    assert "before anything was timed" in last


def test_nothing_is_timed_where_no_answer_agrees(fakes, capsys):
    assert fakes({"mlx-vlm": {"wrong_at": 0}})("--against", "mlx-vlm", "--resolution", "64") == 1
    assert capsys.readouterr().out.endswith("no rival was timed\n")


@pytest.mark.parametrize(
    ("dies_at", "words"), [("start", "ImportError: no such library"), (1, "MemoryError: all gone")]
)
def test_a_rival_that_dies_says_why(fakes, capsys, dies_at, words):
    compare = fakes({"transformers": {"dies_at": dies_at}})
    assert compare("--against", "mlx-vlm,transformers", "--resolution", "64", "--runs", "2") == 1
    out, err = capsys.readouterr()
    assert any("mlx-vlm" in row for row in table(out))
    assert err.splitlines()[-1] == (f"fastvlm-bench compare: error: transformers ended with exit code 1: {words}")


def test_our_own_death_is_an_error(fakes, capsys):
    assert fakes({OURS: {"dies_at": 2}})("--against", "mlx-vlm", "--resolution", "64") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "fastvlm-mlx ended with exit code 1: MemoryError" in err


def test_whole_processes(fakes, tmp_path, capsys):
    target = tmp_path / "out.json"
    assert fakes({})("--cold", "--resolution", "64,128", "--runs", "2", "--json", str(target)) == 0
    rows = table(capsys.readouterr().out)
    assert [row[:3] for row in rows] == [[px, "process", side] for px in ("64", "128") for side in (OURS, "mlx-vlm")]
    data = json.loads(target.read_text())
    assert data["cold"] is True
    assert len(data["runs"]) == 2 * 2 * 2
    assert all(run["text"] == "a token" and run["seconds"] > 0 for run in data["runs"])
    assert data["sides"]["mlx-vlm"]["versions"]["mlx-vlm"] == "1.2"
    assert data["sides"]["mlx-vlm"]["does"] == "python -P mlx_vlm_cli.py generate"
    sizes = json.loads((tmp_path / "mlx-vlm" / "preprocessor_config.json").read_text())
    assert sizes["size"] == {"shortest_edge": 128}  # the last resolution


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--against", "llama.cpp"], "--against takes mlx-vlm, transformers, mlx-lm, got 'llama.cpp'"),
        (["--against", "mlx-vlm,mlx-vlm"], "each library once"),
        (["--against", "fastvlm-mlx"], "got 'fastvlm-mlx'"),
        (["--against", "mlx-lm", "--python", "mlx-lm"], "--python takes NAME=PATH"),
        (["--against", "mlx-lm", "--python", "numpy=/bin/sh"], "--python takes NAME=PATH"),
        (["--cold", "--against", "transformers"], "no command line"),
        (["--resolution", "100"], "multiple of 64 pixels, got 100"),
        (["--resolution", "large"], "got 'large'"),
        (["--runs", "0"], "--runs must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--model", "bundle"], "--model needs --checkpoint"),
        (["--json", "."], "is a folder"),
    ],
)
def test_bad_input_is_one_sentence(capsys, argv, part):
    assert main(["compare", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastvlm-bench compare: error: ")
    assert len(err.splitlines()) == 1
    assert part in err


def test_a_missing_environment_names_the_target_that_makes_it(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "--against", "transformers"]) == 2
    err = capsys.readouterr().err
    assert "transformers has no interpreter at .venv-compare/transformers/bin/python" in err
    assert "run `make compare-environments`" in err


def test_help_is_light():
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from fastvlm_bench.cli import main\n"
        "try:\n    main(['compare', '--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('mlx', 'numpy', 'PIL', 'tokenizers', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "--against" in done.stdout


def test_the_documents_commands_parse():
    root = Path(__file__).resolve().parents[3]
    text = (root / "benchmarks" / "README.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)).splitlines()
    parsers = {
        "compare": cli.build_parser(),
        "accuracy": accuracy.build_parser(),
        "doctor": doctor.build_parser(),
        "plan": planner.build_parser(),
        "plot": plots.build_parser(),
    }
    seen = set()
    for line in lines:
        words = shlex.split(line)
        if words[0] == "make":
            assert f"\n{words[1]}:" in (root / "Makefile").read_text(encoding="utf-8")
            words = ["fastvlm-bench", words[1], *shlex.split(words[2].removeprefix("ARGS="))]
        assert words[0] == "fastvlm-bench"
        parser = parsers.get(words[1])
        assert (parser or bench.build_parser()).parse_args(words[2:] if parser else words[1:])
        seen.add(words[1] if parser else "")
    assert seen == {"", *parsers}
