"""Whole processes: the clock stops at the first line, and other answers have no times."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastvlm_bench.compare import cold, process
from fastvlm_bench.compare.cold import Command, check_rivals, command, first_line, run_cold
from fastvlm_bench.compare.process import SideError
from fastvlm_bench.compare.rivals import OURS
from fastvlm_mlx.errors import InputError


def script(side, code):
    return Command(side, (sys.executable, "-c", code), dict(os.environ))


def talker(side, log, text="a token"):
    return script(side, f"open({str(log)!r}, 'a').write('{side} '); print({text!r})")


def test_commands_take_turns(tmp_path):
    log, calls = tmp_path / "log", []
    runs = run_cold([talker(OURS, log), talker("mlx-vlm", log)], 256, 3, lambda: calls.append(1))
    assert log.read_text().split() == [*[OURS, "mlx-vlm"] * 2, "mlx-vlm", OURS, OURS, "mlx-vlm"]
    assert [(run.round, run.place, run.side) for run in runs] == [
        *((0, 0, OURS), (0, 1, "mlx-vlm")),
        *((1, 0, "mlx-vlm"), (1, 1, OURS)),
        *((2, 0, OURS), (2, 1, "mlx-vlm")),
    ]
    assert {run.resolution for run in runs} == {256}
    assert len(calls) == 8


def test_the_clock_stops_at_the_first_line(tmp_path, monkeypatch):
    """The process doesn't end before the clock is read for the second time."""
    go = tmp_path / "go"
    readings = iter([lambda: 10.0, lambda: go.write_text("go") * 6.0])  # 2 letters: 12 s
    monkeypatch.setattr(cold, "time", SimpleNamespace(perf_counter=lambda: next(readings)()))
    code = f"""
import pathlib, time
print("first", flush=True)
for _ in range(3000):
    if pathlib.Path({str(go)!r}).exists():
        raise SystemExit
    time.sleep(0.01)
raise SystemExit("the clock was never read")
"""
    assert first_line(script(OURS, code)) == (2.0, "first")


def test_another_token_has_no_times(tmp_path):
    commands = [talker(OURS, tmp_path / "log"), talker("mlx-vlm", tmp_path / "log", "another")]
    with pytest.raises(SideError, match="mlx-vlm prints 'another' at 256 px where fastvlm-mlx prints 'a token'"):
        run_cold(commands, 256, 2)
    assert len((tmp_path / "log").read_text().split()) == 2


@pytest.mark.parametrize(
    "code", ["import sys; sys.exit('no such model')", "print('x'); raise ValueError('no such model')"]
)
def test_a_command_that_fails(code):
    with pytest.raises(SideError, match=r"mlx-vlm ended with exit code 1: .*no such model"):
        first_line(script("mlx-vlm", code))


def test_command_lines(monkeypatch):
    monkeypatch.setattr(process.sys, "platform", "linux")
    monkeypatch.setenv("FASTVLM_OPENBLAS", "libfast.so")
    monkeypatch.setenv("PYTHONPATH", "/ours")
    arguments = (Path("/model"), Path("a.jpg"), 256, "float32", 3)
    ours, rival = command(OURS, "/ours/python", *arguments), command("mlx-vlm", "/theirs/python", *arguments)
    assert ours.argv[:5] == ("/ours/python", "-P", "-m", "fastvlm_mlx", "generate")
    assert rival.argv[0] == "/theirs/python"
    assert rival.argv[3] == "generate"
    assert (rival.argv[1], Path(rival.argv[2]).name) == ("-P", "mlx_vlm_cli.py")
    assert Path(rival.argv[2]).is_file()
    shared = ("--model", "/model", "--image", "a.jpg", "--prompt", "What is in this picture?", "--max-tokens", "1")
    assert all(set(shared) <= set(side.argv) for side in (ours, rival))
    assert ours.argv[-2:] == ("--resolution", "256")
    assert rival.environment["LD_PRELOAD"] == "libfast.so"  # ours loads it by itself
    assert "LD_PRELOAD" not in ours.environment
    assert "PYTHONPATH" not in rival.environment
    assert {side.environment["OMP_NUM_THREADS"] for side in (ours, rival)} == {"3"}


def test_our_command_line_prints_a_token(tmp_path):
    import fastvlm_zoo
    from fastvlm_bench.photo import sample_photo

    picture = tmp_path / "a.jpg"
    picture.write_bytes(sample_photo(1, (64, 64)))
    seconds, text = first_line(command(OURS, sys.executable, fastvlm_zoo.default().path, picture, 64, "float32", 1))
    assert seconds > 0
    assert text


def test_only_rivals_with_a_command_line():
    check_rivals(["mlx-vlm"])
    with pytest.raises(InputError, match=r"transformers has no command line .* --cold takes mlx-vlm"):
        check_rivals(["mlx-vlm", "transformers"])
