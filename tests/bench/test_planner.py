"""`fastvlm-bench plan`: what a user types and sees, of reports made up by hand."""

from __future__ import annotations

import json

import pytest

from fastvlm_bench.cli import main
from fastvlm_bench.planner import parse_memory, parse_time
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.measurement_cache import machine_facts, save_measurements
from support.reports import MACHINE, point, report, subject

SUBJECTS = [subject("0.5b", 4), subject("7b", 4), subject("0.5b", seeded=True)]
POINTS = [
    point(0, 256, 20, 30, rest=5, width=5),
    point(0, 1024, 100, 60, rest=10, width=10, peak_bytes=1_500_000_000),
    point(1, 256, 20, 200, width=5, peak_bytes=5_000_000_000),
    point(2, 1024, 100, 65, rest=10, width=5, peak_bytes=2_000_000_000),
]


@pytest.fixture(autouse=True)
def _nothing_saved(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTVLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def saved(tmp_path):
    """Writes reports of subjects and points; returns the file."""

    def write(subjects=None, points=None, name="bench.json", **more):
        path = tmp_path / name
        path.write_text(json.dumps(report(subjects or SUBJECTS, points or POINTS, **more)))
        return str(path)

    return write


def rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.split("\n\n")[1].splitlines()]


@pytest.mark.parametrize(
    ("text", "ms"), [("200ms", 200), ("0.2s", 200), ("1.5 S", 1500), (".5s", 500), ("2.s", 2000), ("0.5MS", 0.5)]
)
def test_times(text, ms):
    assert parse_time(text) == ms


@pytest.mark.parametrize(
    "text", ["200", "0.2", "", "ms", "-1s", "0ms", "1m", "1e3ms", "0.2 s s", "nan s", "9" * 400 + "s"]
)
def test_no_times(text):
    with pytest.raises(InputError, match=r"^--ttft .*such as 200ms or 0\.2s; got"):
        parse_time(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("512mb", 512 * 10**6), ("1.5 gib", 3 * 2**29), ("1MiB", 2**20)],
)
def test_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["8", "8G", "8TBB", "0GB", "-8GB"])
def test_no_sizes(text):
    with pytest.raises(InputError, match=r"^--memory .*such as 8GB, 8GiB or 512MB; got"):
        parse_memory(text)


def test_the_front(capsys, saved):
    assert main(["plan", "--ttft", "200ms", "--from", saved()]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert rows(out) == [
        "decoder bits vision px grid TTFT ms low-high how memory MB TextVQA DocVQA ChartQA MMMU OCRBench SeedBench-Img",
        "0.5B 4 mlx 256 - 55.0 50.0-60.0 measured 1000 <=64.5 <=82.5 <=76.0 <=33.9 <=63.9 <=71.0",
        "0.5B 4 mlx 1024 - 170.0 160.0-180.0 measured 1500 <=64.5 <=82.5 <=76.0 <=33.9 <=63.9 <=71.0",
        "0.5B seeded full mlx 1024 - 175.0 170.0-180.0 measured 2000 (64.5) (82.5) (76.0) (33.9) (63.9) (71.0)",
    ]
    header, _, notes = out.split("\n\n")
    assert "TTFT within 200 ms; questions of 24 text tokens" in header
    assert "Apple M2, 8 cores, MLX 0.32.4, gpu: Apple M2; 2026-11-21T10:00:00+00:00" in header
    assert "FastVLM-0.5B at 1024 px, unquantised" in notes
    assert "https://huggingface.co/apple/FastVLM-0.5B, read 2026-11-21" in notes
    assert "FastVLM-7B" not in notes
    assert "Vicuna-7B, trained as LLaVA-1.5, 256 px: GQA 60.6" in notes
    assert "as quoted in public summaries of the paper, https://arxiv.org/abs/2412.13303)" in notes
    assert "random weights" in notes
    assert "(in brackets) of the published weights of that shape; the row's own are random" in notes


def test_real_weights_need_no_brackets(capsys, saved):
    assert main(["plan", "--ttft", "200ms", "--from", saved(SUBJECTS[:1], POINTS[:2])]) == 0
    out = capsys.readouterr().out
    assert "<=64.5" in out
    assert "in brackets" not in out
    assert "random" not in out


def test_all_of_them_with_the_reasons(capsys, saved):
    assert main(["plan", "--ttft", "180ms", "--memory", "1.6GB", "--from", saved(), "--all"]) == 0
    found = rows(capsys.readouterr().out)
    assert found[0].endswith("not on the front because")
    # 0.5B at 256 and 1024 px, seeded at 1024 px, 7B at 256 px: fastest first.
    assert [row.split(" ")[0] for row in found[1:]] == ["0.5B", "0.5B", "0.5B", "7B"]
    assert found[2].endswith("<=71.0")
    assert found[3].endswith("over the memory budget")
    assert found[4].endswith("over the TTFT budget")


def test_interpolated_sizes_say_so(capsys, saved):
    # 55 to 170 ms over 16 to 256 image tokens, ends 5 to 10 away: 960 px (225 tokens) takes 155.1, 145.8 to 164.5.
    assert main(["plan", "--ttft", "0.17s", "--from", saved(SUBJECTS[:1], POINTS[:2])]) == 0
    last = rows(capsys.readouterr().out)[-1]
    assert last.startswith("0.5B 4 mlx 960 - 155.1 145.8-164.5 interpolated <=1500 <=64.5")


def test_json(capsys, saved, tmp_path):
    target = tmp_path / "plan.json"
    assert main(["plan", "--ttft", "200ms", "--memory", "8GB", "--from", saved(), "--json", str(target)]) == 0
    capsys.readouterr()
    data = json.loads(target.read_text())
    assert (data["ttft_ms"], data["memory_bytes"], data["text_tokens"]) == (200, 8 * 10**9, 24)
    assert data["machine"] == MACHINE
    assert [c["front"] for c in data["choices"]] == [True, True, True, False]
    assert [c["reason"] for c in data["choices"]] == [None, None, None, "over the TTFT budget"]
    seeded = data["choices"][2]
    assert (seeded["accuracy"]["exact"], seeded["accuracy"]["own"]) == (False, False), "its weights are random"
    assert seeded["accuracy"]["scores"]["DocVQA"] == 82.5
    first = data["choices"][0]["accuracy"]
    assert (first["exact"], first["own"]) == (False, True), "of fewer bits"
    assert seeded["ttft_ms"] == {"median": 175, "low": 170, "high": 180}
    assert (seeded["decoder"], seeded["bits"], seeded["resolution"], seeded["grid"]) == ("0.5B", None, 1024, None)
    assert [entry["source"]["read"] for entry in data["accuracies"]] == ["2026-11-21", "2026-11-21"]


def test_a_model_of_ones_own_has_no_published_accuracy(capsys, saved, tmp_path):
    path = saved([subject(None)], [point(0, 256, 20, 30)])
    assert main(["plan", "--ttft", "1s", "--from", path, "--json", str(tmp_path / "plan.json")]) == 0
    out = capsys.readouterr().out
    assert rows(out)[1] == "mine full mlx 256 - 50.0 50.0-50.0 measured 1000"
    assert "TextVQA" not in out
    assert json.loads((tmp_path / "plan.json").read_text())["choices"][0]["accuracy"] is None


def test_nothing_is_within_the_budget(capsys, saved):
    assert main(["plan", "--ttft", "59ms", "--from", saved()]) == 1, "the input is fine"
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("fastvlm-bench plan: error: no choice is within the budget: the least TTFT is 60.0 ms")
    assert "(0.5B, 4 bits, mlx, 256 px); raise --ttft, or measure" in err
    assert main(["plan", "--ttft", "59ms", "--memory", "1MB", "--from", saved(), "--all"]) == 1
    out, err = capsys.readouterr()
    assert len(rows(out)) == 5
    assert "raise --ttft or --memory" in err


def test_memory_of_models_that_were_loaded_together(capsys, saved):
    together = [point(0, 256, 20, 30, peak_bytes=None), point(0, 1024, 100, 60), point(1, 256, 20, 200)]
    path = saved(SUBJECTS[:2], together)
    assert main(["plan", "--ttft", "1s", "--from", path]) == 0
    assert " - 50.0 50.0-50.0 measured - <=64.5" in rows(capsys.readouterr().out)[1]
    assert main(["plan", "--ttft", "1s", "--memory", "8GB", "--from", path, "--all"]) == 0
    out = capsys.readouterr().out
    assert rows(out)[1].endswith("its memory wasn't measured alone")
    assert "left out:   1 whose memory wasn't measured alone; measure one model at a time" in out
    assert main(["plan", "--ttft", "51ms", "--memory", "8GB", "--from", path]) == 1
    assert "1 would be in time, but their memory wasn't measured alone" in capsys.readouterr().err


def test_nothing_was_measured_here(capsys):
    assert main(["plan", "--ttft", "200ms"]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert "nothing was measured on this machine" in err
    assert "run `fastvlm-bench --resolution 256,512,1024` first" in err


def test_what_was_measured_here(capsys):
    facts = machine_facts()
    machine = MACHINE | {name: facts[name] for name in ("device", "cores", "mlx")}
    save_measurements(report(SUBJECTS, POINTS, machine=machine))
    assert main(["plan", "--ttft", "200ms"]) == 0
    assert len(rows(capsys.readouterr().out)) == 4


def test_a_report_of_tiles(capsys, saved):
    """1,280 positions at 1024 px: the times of something else."""
    path = saved(SUBJECTS[:1], [point(0, 1024, 500, 300) | {"image_tokens": 1280, "prompt_tokens": 1304}])
    assert main(["plan", "--ttft", "1s", "--from", path]) == 2
    assert "was measured of tiles or of an image's own shape" in capsys.readouterr().err


def test_several_reports(capsys, saved):
    first = saved(SUBJECTS[:1], POINTS[:1], "a.json", date="2026-11-22T10:00:00+00:00")
    second = saved(SUBJECTS[:1], [point(0, 256, 1, 1), POINTS[1]], "b.json")
    assert main(["plan", "--ttft", "200ms", "--from", first, "--from", second]) == 0
    out = capsys.readouterr().out
    assert [row.split(" ")[3:6] for row in rows(out)[1:]] == [["256", "-", "55.0"], ["1024", "-", "170.0"]], "newer"
    assert "2026-11-21T10:00:00+00:00 to 2026-11-22T10:00:00+00:00" in out


@pytest.mark.parametrize("other", [{"cpu": "Apple M1"}, {"cores": 4}, {"memory_bytes": 1}, {"device": "cpu: Apple M2"}])
def test_reports_of_different_machines(capsys, saved, other):
    second = saved(name="b.json", machine=MACHINE | other)
    assert main(["plan", "--ttft", "200ms", "--from", saved(), "--from", second]) == 2
    assert "of different machines" in capsys.readouterr().err


def test_the_length_of_the_question(capsys, saved):
    points = [*POINTS[:2], point(0, 512, 50, 50, text_tokens=100), *POINTS[2:]]
    path = saved(points=points)
    assert main(["plan", "--ttft", "1s", "--from", path]) == 0
    out = capsys.readouterr().out
    assert "questions of 24 text tokens" in out, "what was measured most"
    assert "0.5B 4 mlx 512 - 110.8" not in out
    assert main(["plan", "--ttft", "1s", "--from", path, "--prompt-tokens", "100", "--all"]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert any(row.startswith("0.5B 4 mlx 512 - 100.0 100.0-100.0 measured") for row in found)
    assert "left out: 7B (4 bits, bfloat16 scales, mlx): nothing was measured about questions of 100" in " ".join(
        out.split()
    )


def test_no_question_of_that_length(capsys, saved):
    assert main(["plan", "--ttft", "1s", "--from", saved(), "--prompt-tokens", "5000"]) == 2
    assert "questions of 5000 text tokens; choose another --prompt-tokens" in capsys.readouterr().err


def test_grids(capsys, saved):
    tiled = subject(None, image_size=64, grid_pinpoints=[[128, 64], [192, 192]], patch_merge_type="flat")
    points = [point(0, 64, 10, 25, rest=1), point(0, 192, 50, 33, rest=1)]
    assert main(["plan", "--ttft", "1s", "--from", saved([tiled], points)]) == 0
    out = capsys.readouterr().out
    # 3 pictures of 64 px and 27 positions.
    assert "mine full mlx 64 2x1 60.0 60.0-60.0 interpolated -" in rows(out)
    assert "in 3x3 tiles: takes 34 positions at 64 px, measured are up to 33" in out


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--ttft", "200"], "--ttft takes a number with its unit, such as 200ms or 0.2s; got '200'"),
        (["--ttft", "1s", "--memory", "8"], "--memory takes"),
        (["--ttft", "1s", "--prompt-tokens", "0"], "--prompt-tokens must be at least 1"),
        (["--ttft", "1s", "--from", "none.json"], "can't read none.json"),
        (["--ttft", "1s", "--json", "."], "is a folder"),
    ],
)
def test_bad_input_is_one_sentence(capsys, argv, part):
    assert main(["plan", *argv]) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert part in err


def test_a_report_without_a_measurement(capsys, tmp_path):
    (tmp_path / "empty.json").write_text(json.dumps(report([subject()], [])))
    assert main(["plan", "--ttft", "1s", "--from", str(tmp_path / "empty.json")]) == 2
    assert "holds no measured resolution" in capsys.readouterr().err


def test_the_time_is_needed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan"])
    assert stop.value.code == 2
    assert "--ttft" in capsys.readouterr().err
