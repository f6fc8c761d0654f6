"""The table and the JSON, of runs made up by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest

from fastvlm_bench.machine import Machine
from fastvlm_bench.report import Report, format_report, to_json
from fastvlm_bench.runner import Plan, Run

MACHINE = Machine(
    platform="Linux-6.1-x86_64",
    cpu="Some CPU",
    cores=4,
    memory_bytes=8 * 2**30,
    device="cpu: Some CPU",
    python="3.11.7",
    mlx="0.30.0",
    openblas="OpenBLAS 0.3.21 DYNAMIC_ARCH",
)


def run(index: int, resolution: int, ttft_ms: float, decode_tps: float = 50.0) -> Run:
    return Run(
        resolution=resolution,
        round=index,
        warmup=index == 0,
        image_tokens=(resolution // 64) ** 2,
        prompt_tokens=24 + (resolution // 64) ** 2,
        generation_tokens=32,
        preprocess_ms=10.0,
        tokenize_ms=0.0,
        vision_ms=20.0,
        projector_ms=1.0,
        prefill_ms=30.0,
        first_token_ms=2.0,
        stages_ms=63.0,
        ttft_ms=ttft_ms,
        decode_ms=36.0,
        wall_ms=ttft_ms + 37.0,
        decode_tps=decode_tps,
        peak_bytes=1000,
        device="vision: MLX (cpu), decoder: MLX (cpu)",
    )


@pytest.fixture
def report():
    runs = [(0, 256, 900.0), (0, 512, 999.0), (1, 256, 64.0), (1, 512, 80.0), (2, 256, 63.0), (2, 512, 90.0)]
    return Report(
        model="tiny",
        precision="float32",
        image="synthetic photo",
        date="2026-01-02T03:04:05+00:00",
        plan=Plan((256, 512), runs=2, warmup=1),
        machine=MACHINE,
        runs=tuple(run(*values) for values in runs),
    )


def rows(text: str) -> list[list[str]]:
    table = text.split("\n\n")[1]
    return [line.split() for line in table.splitlines()[1:]]


def test_the_table(report):
    text = format_report(report)
    assert rows(text) == [
        ["256", "16", "10.0", "20.0", "1.0", "30.0", "2.0", "63.5", "63.0-64.0", "50.0"],
        ["512", "64", "10.0", "20.0", "1.0", "30.0", "2.0", "85.0", "80.0-90.0", "50.0"],
    ]
    lines = text.split("\n\n")[1].splitlines()
    assert len({len(line) for line in lines}) == 1, "columns end at the same place"


def test_the_header_says_what_ran_where(report):
    header = format_report(report).split("\n\n")[0]
    for part in (
        "tiny, decoder float32",
        "vision: MLX (cpu), decoder: MLX (cpu)",
        "Some CPU, 4 cores, 8.0 GiB, Linux-6.1-x86_64",
        "0.30.0, cpu: Some CPU, OpenBLAS 0.3.21",
        "median of 2 after 1 for warm-up",
        "32 tokens generated",
    ):
        assert part in header
    assert header.count("vision: MLX") == 1


@pytest.mark.parametrize(("openblas", "said"), [("", "without OpenBLAS"), (None, None)])
def test_openblas_is_mentioned_where_it_matters(report, openblas, said):
    machine = dataclasses.replace(MACHINE, openblas=openblas)
    header = format_report(dataclasses.replace(report, machine=machine)).split("\n\n")[0]
    assert said in header if said else "OpenBLAS" not in header


def test_the_worst_run_says_whether_the_stages_add_up(report):
    check = format_report(report).split("\n\n")[2]
    # 63 of 90 ms; 63 + 36 of 100 ms. Warm-up, which is worse, doesn't count.
    assert "at least 70.0 % of TTFT" in check
    assert "TTFT and decode 99.0 % of the whole call" in check


def test_a_single_token_has_no_speed(report):
    runs = tuple(dataclasses.replace(r, decode_tps=0.0) for r in report.runs)
    assert rows(format_report(dataclasses.replace(report, runs=runs)))[0][-1] == "-"


def test_json_has_everything(report):
    data = json.loads(to_json(report))
    assert data["format_version"] == 1
    assert data["tool"].startswith("fastvlm-bench ")
    assert data["machine"] == dataclasses.asdict(MACHINE)
    assert [r["ttft_ms"] for r in data["runs"]] == [900.0, 999.0, 64.0, 80.0, 63.0, 90.0]
    assert data["summary"][0]["figures"]["ttft_ms"] == {"median": 63.5, "low": 63.0, "high": 64.0}
    assert data["summary"][1]["resolution"] == 512
