"""`fastvlm-bench plan` of what `fastvlm-bench` itself has measured just now, not of made-up reports."""

from __future__ import annotations

import json

import pytest

from fastvlm_bench.cli import main
from support.reports import point, report, subject


def rows(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.split("\n\n")[1].splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A report as the tool writes it, and the cache that it fed."""
    folder = tmp_path_factory.mktemp("measured")
    argv = ["--size", "tiny", "--resolution", "64,192", "--max-tokens", "1", "--no-load", "--no-roofline"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVLM_CACHE", str(folder / "cache"))
        assert main([*argv, "--json", str(folder / "bench.json")]) == 0
    return folder


def test_from_the_file_that_the_tool_wrote(capsys, measured):
    data = json.loads((measured / "bench.json").read_text())
    assert main(["plan", "--ttft", "1000s", "--from", str(measured / "bench.json"), "--all"]) == 0
    found = rows(capsys.readouterr().out)
    assert len(found) == 1 + 2
    for row, case in zip(
        found[1:], sorted(data["summary"], key=lambda c: c["figures"]["ttft_ms"]["median"]), strict=True
    ):
        ttft = case["figures"]["ttft_ms"]
        figures = f"{ttft['median']:.1f} {ttft['low']:.1f}-{ttft['high']:.1f} measured"
        assert f" full mlx {case['resolution']} - {figures}" in row
        assert row.lower().count("seeded") == 1


def test_what_the_tool_measured_is_kept_by_itself(capsys, measured, monkeypatch):
    monkeypatch.setenv("FASTVLM_CACHE", str(measured / "cache"))
    assert main(["plan", "--ttft", "1000s", "--all"]) == 0
    assert len(rows(capsys.readouterr().out)) == 1 + 2


def lacking(made, written, where=""):
    """Paths of a made-up report that a written one doesn't have, or has of another kind."""
    if isinstance(made, dict) and isinstance(written, dict):
        shared = sorted(made.keys() & written.keys())
        deeper = [path for key in shared for path in lacking(made[key], written[key], f"{where}.{key}")]
        return [f"{where}.{key}" for key in sorted(made.keys() - written.keys())] + deeper
    if isinstance(made, list) and isinstance(written, list):
        return lacking(made[0], written[0], f"{where}[]") if made and written else []
    alike = made is None or written is None or isinstance(written, type(made))
    return [] if alike or (isinstance(made, float | int) and isinstance(written, float | int)) else [where]


def test_the_made_up_reports_are_like_written_ones(measured):
    written = json.loads((measured / "bench.json").read_text())
    assert lacking(report([subject()], [point(0, 256, 1, 2)]), written) == []
