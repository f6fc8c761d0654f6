"""Arguments that several commands have."""

from __future__ import annotations

import os

import pytest

from fastvlm_bench.arguments import check_target
from fastvlm_mlx.errors import InputError


def test_where_a_report_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "old.json").write_text("")
    monkeypatch.chdir(tmp_path)
    for name in ("new.json", "old.json", "a/b/new.json"):
        check_target("--json", tmp_path / name)
        check_target("--json", (tmp_path / name).relative_to(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"], "nothing is made yet"


def test_where_it_can_not(tmp_path):
    (tmp_path / "f").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for name, part in (
        (".", "is a folder; name a file"),
        ("pipe", "is no ordinary file"),
        ("f/x.json", "f is no folder; name another file"),
        ("f/a/b/x.json", "f is no folder; name another file"),
        ("n" * 300, "can't be written: File name too long"),
    ):
        with pytest.raises(InputError) as caught:
            check_target("--json", tmp_path / name)
        assert str(caught.value).startswith(f"--json {tmp_path / name} ")
        assert part in str(caught.value)


def test_a_folder_that_is_not_ours(tmp_path, monkeypatch):
    """Root may write everywhere, so the system's answer is made here."""
    asked = []

    def access(path, mode):
        asked.append((path, mode))
        return False

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(InputError, match=f"^-o {tmp_path}/a/x can't be written: no right to write to {tmp_path}; "):
        check_target("-o", tmp_path / "a" / "x")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]
