"""models/SYSTEMS.md names tests that exist and options that the commands have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastvlm_bench.cli import build_parser
from fastvlm_bench.sizes import vision_of

ROOT = Path(__file__).resolve().parents[2]
ROWS = [line for line in (ROOT / "models" / "SYSTEMS.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "]


@pytest.mark.parametrize("row", ROWS[1:], ids=lambda row: row[2:30])
def test_what_checks_a_system_is_there(row):
    checks = row.split(" | ")[-1]
    folder = None
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", checks):
        folder = ROOT / Path(name).parent if "/" in name else folder
        assert folder
        assert (folder / Path(name).name).exists(), name
    assert folder or checks.strip() == "- |"


def test_the_benchmark_s_options():
    options = build_parser()._option_string_actions
    for row in ROWS:
        for command in re.findall(r"`fastvlm-bench (--[^`]*)`", row):
            words = command.split()
            assert {word for word in words if word.startswith("--")} <= options.keys()
            if "--size" in words:
                for size in words[words.index("--size") + 1].split(","):
                    vision_of(size)
