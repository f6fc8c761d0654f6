"""`fastvlm-bench`: what a user types and sees. No test looks at how long anything took."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastvlm_bench.cli import main
from support.imports import exit_and_heavy

FEW = ["--runs", "1", "--warmup", "0", "--max-tokens", "2", "--no-load", "--no-roofline"]
HEAVY = ("mlx", "mlx_lm", "numpy", "PIL", "matplotlib", "transformers", "torch")


@pytest.fixture
def tiny(bundle):
    return str(bundle("tiny"))


def test_resolutions_to_table_and_json(capsys, tiny, tmp_path):
    target = tmp_path / "new" / "bench.json"
    argv = ["--model", tiny, "--resolution", "64,128", "--runs", "3", "--max-tokens", "4"]
    assert main([*argv, "--json", str(target), "--csv", str(tmp_path / "new" / "bench.csv")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    table = [line.split() for line in out.split("\n\n")[1].splitlines()]
    assert [(row[0], row[1]) for row in table[1:]] == [("64", "1"), ("128", "4")]
    assert sorted(path.name for path in target.parent.iterdir()) == ["bench.csv", "bench.json"]  # nothing temporary
    assert len((tmp_path / "new" / "bench.csv").read_text().splitlines()) == 1 + 8

    data = json.loads(target.read_text())
    (subject,) = data["subjects"]
    assert (subject["name"], subject["seeded"]) == ("tiny", False)
    assert subject["load"]["cold_ms"] > 0
    assert min(data["peaks"]["matmul_flops"].values()) > 0
    assert data["plan"] == {
        "resolutions": [64, 128],
        "runs": 3,
        "warmup": 1,
        "prompt_tokens": 24,
        "max_tokens": 4,
        "aspect": None,
        "grid": None,
    }
    assert [run["resolution"] for run in data["runs"]] == [64, 128, 128, 64, 128, 64, 64, 128]
    assert [run["warmup"] for run in data["runs"]] == [True] * 2 + [False] * 6
    assert all(run["vision_ms"] > 0 for run in data["runs"]), "every run is a first question"
    for summary, row in zip(data["summary"], table[1:], strict=True):
        raw = [r for r in data["runs"] if r["resolution"] == summary["resolution"] and not r["warmup"]]
        assert len(raw) == summary["runs"] == 3
        for name, figure in summary["figures"].items():
            values = [run[name] for run in raw]
            assert figure == {"median": statistics.median(values), "low": min(values), "high": max(values)}
        assert row[7] == f"{summary['figures']['ttft_ms']['median']:.1f}"
        assert set(summary["roofline"]) == {"vision", "projector", "prefill", "decode"}
        assert all(limit["share"] > 0 for limit in summary["roofline"].values())


def test_the_model_has_a_resolution_of_its_own(capsys, tiny):
    assert main(["--model", tiny, *FEW, "--max-tokens", "1"]) == 0
    row = capsys.readouterr().out.split("\n\n")[1].splitlines()[1].split()
    assert (row[0], row[1], row[-2]) == ("256", "16", "-")


def test_seeded_shapes_at_several_widths_beside_each_other(capsys, tmp_path):
    argv = ["--size", "tiny", "--q-bits", "none,4", "--resolution", "64", *FEW]
    assert main([*argv, "--json", str(tmp_path / "a.json")]) == 0
    out = capsys.readouterr().out
    assert "seeded:  random weights" in out
    assert "TTFT by that of seeded tiny, vision mlx, of the same round" in out
    assert "share of this machine's limit" not in out
    data = json.loads((tmp_path / "a.json").read_text())
    assert [(s["seeded"], s["bits"]) for s in data["subjects"]] == [(True, None), (True, 4)]
    assert data["peaks"] is None
    assert main([*argv, "--baseline", str(tmp_path / "a.json")]) == 0
    assert "  64: seeded tiny, 4 bits, vision mlx" in capsys.readouterr().out.split("TTFT beside that of")[1]


def test_a_model_that_does_not_fit_is_not_loaded(capsys, monkeypatch):
    monkeypatch.setattr("fastvlm_bench.measure.available_bytes", lambda: 4 << 30)
    assert main(["--size", "7b", "--resolution", "256"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "GiB of memory and 4.0 GiB can be used" in err


def test_the_embedded_default_needs_no_argument_but_the_resolution(capsys):
    assert main(["--resolution", "64"]) == 0
    assert "\n\nresolution" in capsys.readouterr().out


def test_a_photo_of_the_users_and_quantised_weights(capsys, tiny, tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(photo)
    argv = ["--model", tiny, "--resolution", "64", *FEW, "--vision", "mlx", "--quantize", "4"]
    assert main([*argv, "--image", str(photo)]) == 0
    out = capsys.readouterr().out
    assert str(photo) in out
    assert "4 bits" in out or "4-bit" in out


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--resolution", "1000"], "multiple of 64 pixels, got 1000"),
        (["--resolution", "256,"], "got '256,'"),
        (["--resolution", "large"], "got 'large'"),
        (["--resolution", "64,64"], "each resolution once"),
        (["--runs", "0"], "--runs must be at least 1"),
        (["--warmup", "-1"], "--warmup must be at least 0"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--q-bits", "7"], "--q-bits must be of 2, 3"),
        (["--q-bits", "four"], "numbers of bits or none, got 'four'"),
        (["--q-bits", "4,4"], "each once, got '4,4'"),
        (["--vision", "abacus"], "--vision must be of auto, mlx, coreml"),
        (["--compute-units", "GPU"], "--compute-units must be of CPU_AND_NE"),
        (["--baseline", "nowhere.json"], "nowhere.json isn't a file"),
        (["--size", ""], "--size must be a list"),
        (["--json", "pyproject.toml/r.json"], "is no folder; name another file"),
        (["--csv", "."], "--csv . is a folder"),
        (["--model", "no-such-model"], "no-such-model"),
        (["--model", "./nowhere"], "nowhere"),
        (["--image", "nowhere.jpg"], "nowhere.jpg doesn't exist"),
        (["--json", "."], "is a folder"),
        (["--resolution", "64", "--prompt-tokens", "1000000000"], "tiny's context is 8192"),
    ],
)
def test_bad_input_is_one_sentence(capsys, tiny, argv, part):
    given = argv if {"--model", "--size"} & set(argv) else ["--model", tiny, *argv]
    assert main(given) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastvlm-bench: error: ")
    assert len(err.splitlines()) == 1
    assert part in err


@pytest.mark.parametrize("argv", [["--runs", "many"], ["--model", "a", "--size", "tiny"], ["--no-such-option"]])
def test_bad_usage(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert "fastvlm-bench: error: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("argv", "code"), [(["--help"], 0), (["--resolution", "1000"], 2)])
def test_arguments_are_read_before_anything_heavy_is_imported(argv, code):
    assert exit_and_heavy(argv, HEAVY) == f"{code} []"


def test_the_package_can_be_run_as_a_module():
    script = f"import sys, runpy; sys.path[:] = {sys.path!r}; sys.argv[1:] = ['--version']\n"
    script += "runpy.run_module('fastvlm_bench', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("fastvlm-bench ")
