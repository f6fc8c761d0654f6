"""The tables, JSON and CSV, of runs made up by hand."""

from __future__ import annotations

import csv
import dataclasses
import io
import json

import pytest

from fastvlm_bench.loads import LoadTimes
from fastvlm_bench.machine import Machine
from fastvlm_bench.peaks import Peaks
from fastvlm_bench.report import Report, StageLimit, read_baseline, to_csv, to_data, to_json
from fastvlm_bench.runner import Plan, Run
from fastvlm_bench.subjects import Subject
from fastvlm_bench.tables import format_report
from fastvlm_mlx.errors import InputError

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


SUBJECT = Subject(
    name="tiny",
    size=None,
    seeded=False,
    bits=None,
    precision="float32",
    vision="mlx",
    compute_units=None,
    device="vision: MLX (cpu), decoder: MLX (cpu)",
    weights_bytes=4000,
    load=LoadTimes(900.0, (30.0, 50.0)),
    identity="tiny's weights",
    image_size=256,
    grid_pinpoints=(),
    patch_merge_type="flat",
)
LIMITS = {"vision": StageLimit(10**9, 10**6, "compute", 5.0, 0.25), "decode": StageLimit(10, 10**6, "memory", 1.0, 0.5)}


def run(index: int, resolution: int, ttft_ms: float, decode_tps: float = 50.0, subject: int = 0) -> Run:
    return Run(
        subject=subject,
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
        second_ttft_ms=9.0,
        decode_ms=36.0,
        wall_ms=ttft_ms + 37.0,
        decode_tps=decode_tps,
        peak_bytes=2**30,
        device="vision: MLX (cpu), decoder: MLX (cpu)",
    )


@pytest.fixture
def report():
    runs = [(0, 256, 900.0), (0, 512, 999.0), (1, 256, 64.0), (1, 512, 80.0), (2, 256, 63.0), (2, 512, 90.0)]
    return Report(
        subjects=(SUBJECT,),
        image="synthetic photo",
        date="2026-01-02T03:04:05+00:00",
        plan=Plan((256, 512), runs=2, warmup=1),
        machine=MACHINE,
        peaks=Peaks({"float32": 70e9, "bfloat16": 3e9}, 16e9),
        runs=tuple(run(*values) for values in runs),
        rooflines={(0, 256): LIMITS, (0, 512): {}},
    )


@pytest.fixture
def two(report):
    """A second model, which takes 2 and 1.5 times as long at 256 px, and 0.5 and 2 times at 512."""
    more = [(0, 256, 1.0), (0, 512, 1.0), (1, 256, 128.0), (1, 512, 40.0), (2, 256, 94.5), (2, 512, 180.0)]
    runs = (*report.runs, *(run(*values, subject=1) for values in more))
    quantised = dataclasses.replace(SUBJECT, bits=4, precision="4 bits, bfloat16 scales", load=LoadTimes())
    return dataclasses.replace(report, subjects=(SUBJECT, quantised), runs=runs, rooflines={}, peaks=None)


def blocks(report: Report, baseline=None) -> list[str]:
    return format_report(report, baseline).split("\n\n")


def rows(block: str) -> list[list[str]]:
    return [line.split() for line in block.splitlines()[1:]]


def test_the_table(report):
    block = blocks(report)[1]
    assert rows(block) == [
        ["256", "16", "10.0", "20.0", "1.0", "30.0", "2.0", "63.5", "63.0-64.0", "9.0", "50.0", "1.00"],
        ["512", "64", "10.0", "20.0", "1.0", "30.0", "2.0", "85.0", "80.0-90.0", "9.0", "50.0", "1.00"],
    ]
    assert len({len(line) for line in block.splitlines()}) == 1, "columns end at the same place"


def test_the_limits(report):
    said, *lines = blocks(report)[2].splitlines()
    assert "float32 70, bfloat16 3; memory 16 GB/s" in said
    assert [line.split() for line in lines] == [
        ["resolution", "vision", "decode"],
        ["256", "25", "%", "(compute)", "50", "%", "(memory)"],
        ["512", "-", "-"],
    ]
    assert len(blocks(dataclasses.replace(report, peaks=None))) == 3


def test_the_header_says_what_ran_where(report):
    header = blocks(report)[0]
    for part in (
        "tiny, vision mlx, decoder float32",
        "vision: MLX (cpu), decoder: MLX (cpu)",
        "Some CPU, 4 cores, 8.0 GiB, Linux-6.1-x86_64",
        "0.30.0, cpu: Some CPU, OpenBLAS 0.3.21",
        "median of 2 after 1 for warm-up",
        "32 tokens generated",
        "load:    ms, 900 in a new process, 40 again (tiny, vision mlx)",
    ):
        assert part in header
    assert header.count("vision: MLX") == 1
    assert "random" not in header


def test_seeded_weights_are_labelled(report):
    seeded = dataclasses.replace(SUBJECT, name="seeded 7b", size="7b", seeded=True, load=LoadTimes())
    header = blocks(dataclasses.replace(report, subjects=(seeded,)))[0]
    assert "seeded 7b, vision mlx" in header
    assert "random weights" in header
    assert "load:" not in header


@pytest.mark.parametrize(("openblas", "said"), [("", "without OpenBLAS"), (None, None)])
def test_openblas_is_mentioned_where_it_matters(report, openblas, said):
    machine = dataclasses.replace(MACHINE, openblas=openblas)
    header = blocks(dataclasses.replace(report, machine=machine))[0]
    assert said in header if said else "OpenBLAS" not in header


def test_the_worst_run_says_whether_the_stages_add_up(report):
    check = blocks(report)[-1]
    # 63 of 90 ms; 63 + 36 of 100 ms. Warm-up, which is worse, doesn't count.
    assert "at least 70.0 % of TTFT" in check
    assert "TTFT and decode 99.0 % of the whole call; the rest, more than 3 %, is in no stage" in check
    whole = tuple(dataclasses.replace(r, stages_ms=0.98 * r.ttft_ms) for r in report.runs)
    assert "in no stage" not in blocks(dataclasses.replace(report, runs=whole))[-1]


def test_a_single_token_has_no_speed(report):
    runs = tuple(dataclasses.replace(r, decode_tps=0.0) for r in report.runs)
    assert rows(blocks(dataclasses.replace(report, runs=runs))[1])[0][-2] == "-"


def test_models_are_compared_round_by_round(two):
    first, second, compared = blocks(two)[1:4]
    assert first.splitlines()[0] == "tiny, vision mlx, decoder float32"
    assert second.splitlines()[0] == "tiny, 4 bits, vision mlx, decoder 4 bits, bfloat16 scales"
    assert compared.splitlines() == [
        "TTFT by that of tiny, vision mlx, of the same round",
        "  256: tiny, 4 bits, vision mlx 1.75 (1.50-2.00), fewer than 6 rounds show nothing",
        "  512: tiny, 4 bits, vision mlx 1.25 (0.50-2.00), no difference shown",
    ]


def test_enough_rounds_show_who_is_faster(two):
    runs = [run(index, 256, time, subject=s) for index in range(1, 7) for s, time in ((0, 60.0), (1, 80.0 + index))]
    said = blocks(dataclasses.replace(two, runs=tuple(runs), plan=Plan((256,), runs=6)))[3]
    assert said.splitlines()[1].endswith("tiny, vision mlx faster in every round")


def test_beside_an_earlier_report(report):
    before = json.loads(to_json(report))
    for case, times in ((0, (90.0, 80.0, 95.0)), (1, (90.0, 79.0, 95.0))):
        before["summary"][case]["figures"]["ttft_ms"] = dict(zip(("median", "low", "high"), times, strict=True))
        before["summary"][case]["runs"] = 10
    many = [run(i, side, t) for i in range(1, 12, 2) for side, t in ((256, 64.0), (512, 80.0))]
    many += [run(i, side, t) for i in range(2, 12, 2) for side, t in ((256, 63.0), (512, 90.0))]
    few, report = report, dataclasses.replace(report, runs=tuple(r for r in many if r.round < 11))
    # 63.5 (63-64) after 90 (80-95): 26.5 apart, 15 wide. 85 (80-90) after 90 (79-95): 5 apart, 16 wide.
    assert blocks(report, before)[3].splitlines() == [
        "TTFT beside that of 2026-01-02T03:04:05+00:00",
        "  256: tiny, vision mlx 90.0 -> 63.5 ms, faster",
        "  512: tiny, vision mlx 90.0 -> 85.0 ms, no difference shown",
    ]
    assert "256: tiny, vision mlx 90.0 -> 63.5 ms, fewer than 10 runs show nothing" in blocks(few, before)[3]
    before["summary"][0]["runs"] = 9
    assert "256: tiny, vision mlx 90.0 -> 63.5 ms, fewer than 10 runs show nothing" in blocks(report, before)[3]
    before["machine"]["cpu"] = "Another CPU"
    del before["summary"][1]
    said = blocks(report, before)[3].splitlines()
    assert said[1] == "  measured on another machine: Another CPU, cpu: Some CPU"
    assert said[3] == "  512: tiny, vision mlx wasn't measured then"


def test_json_has_everything(report):
    data = json.loads(to_json(report))
    assert data["format_version"] == 2
    assert data["tool"].startswith("fastvlm-bench ")
    assert data["machine"] == dataclasses.asdict(MACHINE)
    assert data["peaks"] == {"matmul_flops": {"float32": 70e9, "bfloat16": 3e9}, "bandwidth": 16e9}
    assert data["subjects"][0]["load"] == {"cold_ms": 900.0, "warm_ms": [30.0, 50.0]}
    assert data["subjects"][0]["label"] == "tiny, vision mlx"
    assert [r["ttft_ms"] for r in data["runs"]] == [900.0, 999.0, 64.0, 80.0, 63.0, 90.0]
    small, large = data["summary"]
    assert small["figures"]["ttft_ms"] == {"median": 63.5, "low": 63.0, "high": 64.0}
    assert small["roofline"]["vision"] == dataclasses.asdict(LIMITS["vision"])
    assert (large["subject"], large["resolution"], large["roofline"]) == (0, 512, None)


def test_csv_has_a_line_for_each_run(two):
    lines = list(csv.DictReader(io.StringIO(to_csv(two))))
    assert [line["label"] for line in lines] == ["tiny, vision mlx"] * 6 + ["tiny, 4 bits, vision mlx"] * 6
    assert [float(line["ttft_ms"]) for line in lines] == [r.ttft_ms for r in two.runs]
    assert lines[0]["warmup"] == "True"


def test_a_baseline_asked_the_same(report, tmp_path):
    file = tmp_path / "r.json"
    file.write_text(to_json(report))
    assert read_baseline(file, report.plan, "synthetic photo") == json.loads(json.dumps(to_data(report)))
    with pytest.raises(InputError, match="--prompt-tokens 24 about synthetic photo, now it is 30 about"):
        read_baseline(file, dataclasses.replace(report.plan, prompt_tokens=30), "synthetic photo")
    with pytest.raises(InputError, match=r"now it is 24 about mine\.jpg"):
        read_baseline(file, report.plan, "mine.jpg")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "isn't a file; make it with: fastvlm-bench --json"),
        ("{", "isn't JSON"),
        ("[]", "format_version 2, it has None"),
        ('{"format_version": 1, "summary": []}', "format_version 2, it has 1"),
        ('{"format_version": 2}', "format_version 2, it has 2"),
        ('{"format_version": 2, "summary": []}', "subjects"),
    ],
)
def test_what_is_no_report(tmp_path, text, part):
    file = tmp_path / "r.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=part):
        read_baseline(file, Plan(), "")


def test_other_weights_are_mentioned(report):
    before = json.loads(to_json(report))
    assert "other weights" not in blocks(report, before)[3]
    before["subjects"][0]["identity"] = "others"
    assert "tiny, vision mlx had other weights or another encoder then" in blocks(report, before)[3]
