"""benchmarks/README.md has the tables of the reports in benchmarks/results, and those hold what is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastvlm_bench.results import fill, markdown
from fastvlm_bench.tables import LEAST_SHARE
from fastvlm_mlx.errors import InputError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
FILES = sorted((BENCHMARKS / "results").glob("*.json"))


def read(name: str) -> dict:
    return json.loads((BENCHMARKS / "results" / name).read_text(encoding="utf-8"))


def test_the_readme_has_the_tables_of_the_reports():
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    assert fill(text, BENCHMARKS / "results") == text, "run: make bench-tables"
    assert all(f"<!-- {file.name} -->" in text for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_report_describes_its_machine(file):
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["machine"]["cpu"]
    assert data["machine"]["memory_bytes"] > 2**30
    assert data["machine"]["mlx"]


def test_the_comparison_is_of_the_same_answers_at_all_sizes():
    data = read("compare-0.5b-xeon.json")
    assert data["plan"]["resolutions"] == [256, 512, 1024]
    assert data["plan"]["runs"] >= 6
    assert data["failures"] == {}
    said: dict[tuple[str, int, int], dict[str, tuple]] = {}
    for run in data["runs"]:
        case = said.setdefault((run["kind"], run["resolution"], run["round"]), {})
        case[run["side"]] = run["ids"], run["second_ids"]
    sides = {"picture": {"fastvlm-mlx", "mlx-vlm", "transformers"}, "text": {"fastvlm-mlx", "mlx-lm"}}
    rounds = range(data["plan"]["runs"])
    assert {(kind, side, index) for kind in sides for side in data["plan"]["resolutions"] for index in rounds} <= set(
        said
    )
    for (kind, *_), answers in said.items():
        assert set(answers) == sides[kind]
        first, *others = answers.values()
        assert first[0]
        assert all(other == first for other in others)


def test_the_stages_are_the_whole():
    data = read("stages-0.5b-xeon.json")
    measured = [run for run in data["runs"] if not run["warmup"]]
    assert {run["resolution"] for run in measured} == {256, 512, 768, 1024}
    assert all(LEAST_SHARE <= run["stages_ms"] / run["ttft_ms"] <= 1 for run in measured)
    assert LEAST_SHARE == 0.97


REPORT = {
    "machine": {
        "cpu": "Some CPU",
        "cores": 2,
        "memory_bytes": 8 << 30,
        "mlx": "0.9",
        "device": "gpu: Some GPU",
        "openblas": None,
    },
    "plan": {"runs": 10},
    "date": "2026-01-02T03:04:05",
    "subjects": [{"label": "m, vision mlx"}],
    "peaks": {"matmul_flops": {"float32": 70e9}, "bandwidth": 20e9},
    "summary": [
        {
            "subject": 0,
            "resolution": 256,
            "image_tokens": 16,
            "roofline": {"vision": {"share": 0.25}, "prefill": {"share": 0.5}},
            "figures": {
                f"{name}": {"median": 10.0 + i, "low": 9.0, "high": 19.6}
                for i, name in enumerate(
                    [
                        "preprocess_ms",
                        "vision_ms",
                        "projector_ms",
                        "prefill_ms",
                        "first_token_ms",
                        "ttft_ms",
                        "second_ttft_ms",
                        "decode_tps",
                    ]
                )
            },
        }
    ],
}


def test_a_table_of_stages():
    lines = markdown(REPORT).splitlines()
    assert lines[0].split(" | ")[3:5] == ["preprocess", "vision"]
    assert lines[2] == (
        "| m, vision mlx | 256 | 16 | 10 | 11 | 12 | 13 | 14 | 15 | 16 | 9-20 | 17.0 | 25 % | 50 % | - |"
    )
    assert lines[4] == (
        "Milliseconds, medians of 10 rounds. Limits: matmul GFLOP/s float32 70; memory 20 GB/s. "
        "Some CPU, 2 cores, 8.0 GiB; MLX 0.9 on its gpu: Some GPU. 2026-01-02."
    )
    on_cpu = REPORT | {"machine": REPORT["machine"] | {"device": "cpu: Some CPU", "openblas": "OpenBLAS 0.3 MORE"}}
    assert markdown(on_cpu).endswith("Some CPU, 2 cores, 8.0 GiB; MLX 0.9 on its cpu; OpenBLAS 0.3. 2026-01-02.")


def test_a_table_of_sides():
    def line(side, median, ratio=None, verdict=""):
        spread = ratio and {"median": ratio, "low": ratio - 1, "high": ratio + 1}
        return {
            "resolution": 256,
            "figure": "first question",
            "side": side,
            "seconds": {"median": median},
            "ratio": spread,
            "verdict": verdict,
        }

    lines = [line("ours", 1.5), line("a", 3.0, 2.0, "ours faster in every round"), line("b", 1.4, 0.9, "no difference")]
    data = {name: REPORT[name] for name in ("machine", "plan", "date")} | {"lines": lines}
    data |= {"sides": {"ours": {"versions": {"mlx": "0.9"}}}, "model": "m", "dtype": "float32", "threads": 2}
    rows = markdown(data).splitlines()
    assert rows[0] == "| px |  | ours | a | a / ours | b | b / ours |"
    assert rows[2] == "| 256 | first question | 1500 | 3000 | **2.00** (1.00-3.00) | 1400 | 0.90 (-0.10-1.90) |"
    assert "ours mlx 0.9. Some CPU" in rows[4]


def test_what_cannot_be_filled(tmp_path):
    with pytest.raises(InputError, match="it has none"):
        fill("nothing", tmp_path)
    with pytest.raises(InputError, match=r"a\.json doesn't exist"):
        fill("<!-- a.json -->\n<!-- end -->", tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(InputError, match="no report"):
        fill("<!-- a.json -->\n<!-- end -->", tmp_path)
