"""The text and the JSON of a comparison, of runs made up by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastvlm_bench.compare.plan import Plan
from fastvlm_bench.compare.report import Report, format_report, format_table, to_json
from fastvlm_bench.compare.rivals import LIBRARIES, OURS
from fastvlm_bench.compare.rounds import Run
from fastvlm_bench.compare.summary import summarise
from fastvlm_bench.machine import Machine

MACHINE = Machine("Linux-6.1-x86_64", "Some CPU", 4, 8 * 2**30, "cpu: Some CPU", "3.11.7", "0.32.4", "OpenBLAS 0.3.21")


def run(side, index, ttft_s):
    return Run(side, "picture", 256, index, 0, ttft_s, ttft_s / 2, 0.31, 31, tuple(range(32)), (1, 2), 41, 5_000_000)


@pytest.fixture
def report():
    runs = [run(side, i, (1.0 + i / 10) * times) for i in range(6) for side, times in ((OURS, 1), ("mlx-vlm", 2))]
    return Report(
        model="a model",
        dtype="float32",
        threads=4,
        date="2026-01-02T03:04:05+00:00",
        plan=Plan((256,), 6),
        cold=False,
        machine=MACHINE,
        sides={name: {"versions": {"python": "3.11.7", name: "1.2"}, "device": "CPU"} for name in (OURS, "mlx-vlm")},
        positions={256: 41},
        failures={"transformers": "transformers ended with exit code 1: gone"},
        runs=runs,
        lines=summarise(runs),
    )


def test_the_table(report):
    table = format_report(report).split("\n\n")[1].splitlines()
    assert table[0].split() == ["px", "figure", "side", "median", "min-max", "ratio", "min-max", "says"]
    rows = [line.split("  ") for line in table[1:]]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[0] == ["256", "first question", "fastvlm-mlx", "1250.0", "1000.0-1500.0"]
    says = "fastvlm-mlx faster in every round"
    assert cells[1] == ["256", "first question", "mlx-vlm", "2500.0", "2000.0-3000.0", "2.00", "2.00-2.00", says]
    assert cells[3] == ["256", "second question", "mlx-vlm", "1250.0", "1000.0-1500.0", "2.00", "2.00-2.00", says]
    assert cells[5] == ["256", "token", "mlx-vlm", "10.0", "10.0-10.0", "1.00", "1.00-1.00", "no difference shown"]
    assert len(cells) == 6


def test_the_header_says_what_ran_where(report):
    header = format_report(report).split("\n\n")[0]
    for part in (
        "a model, float32, 4 threads for each side",
        "Some CPU, 4 cores, 8.0 GiB, Linux-6.1-x86_64",
        f"mlx-vlm: python 3.11.7, mlx-vlm 1.2; CPU; {LIBRARIES['mlx-vlm'].does}",
        "41 positions at 256 px",
        "6, in which the sides take turns",
        "memory:  fastvlm-mlx 0.01 GB, mlx-vlm 0.01 GB at most",
    ):
        assert part in header


def test_whole_processes_are_called_that(report):
    sides = {name: {"versions": {}} for name in report.sides}
    header = format_report(dataclasses.replace(report, cold=True, sides=sides)).split("\n\n")[0]
    assert "from the start of the command to its first token" in header
    assert "mlx-vlm: ; python -P mlx_vlm_cli.py generate" in header
    assert "second" not in header


def test_without_runs_there_is_no_table(report):
    text = format_report(dataclasses.replace(report, runs=[], lines=[]))
    assert text.endswith("\n\nno rival was timed")


def test_json_has_everything(report):
    data = json.loads(to_json(report))
    assert data["format_version"] == 1
    assert data["tool"].startswith("fastvlm-bench compare ")
    assert data["machine"] == dataclasses.asdict(MACHINE)
    assert data["plan"] == {"resolutions": [256], "runs": 6, "max_tokens": 32}
    assert (data["dtype"], data["threads"], data["cold"]) == ("float32", 4, False)
    assert data["sides"]["mlx-vlm"]["versions"] == {"python": "3.11.7", "mlx-vlm": "1.2"}
    assert data["sides"]["mlx-vlm"]["does"] == LIBRARIES["mlx-vlm"].does
    assert data["failures"] == {"transformers": "transformers ended with exit code 1: gone"}
    assert [(r["side"], r["round"]) for r in data["runs"][:3]] == [(OURS, 0), ("mlx-vlm", 0), (OURS, 1)]
    assert data["runs"][1]["ttft_s"] == 2.0
    assert data["runs"][1]["ids"] == list(range(32))
    assert data["lines"][1]["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert len(data["questions"]) == 2


def test_columns_end_at_the_same_place():
    rows = format_table([["px", "figure", "side", "1", "2", "3", "4", "says"], ["1024", "f", "a side", *"12345"]])
    assert rows[0].index("side") == rows[1].index("a side")
    assert rows[0].index("px") + 2 == rows[1].index("1024") + 4
