"""The doctor's report: Markdown to paste into a bug report, and JSON with everything."""

from __future__ import annotations

import getpass
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fastvlm_bench.doctor.check import FAILED, OK, SKIPPED, Check, Table
from fastvlm_mlx import __version__

FORMAT_VERSION = 1
TOOL = f"fastvlm-bench doctor {__version__}"
_STATUSES = {OK: "ok", FAILED: "FAILED", SKIPPED: "not checked here"}
_HOMES = ("/Users/", "/home/")
_COMMON_USERS = ("root", "user", "")  # names of nobody


def to_markdown(checks: Sequence[Check], date: str) -> str:
    """The report for people.

    Args:
        checks: in the order in which they are shown.
        date: UTC, ISO 8601.
    """
    return "\n\n".join((f"## {TOOL}: {summary(checks)}\n\n{date}", *(_section(check) for check in checks)))


def summary(checks: Sequence[Check]) -> str:
    """How many checks came to what."""
    counts = Counter(check.status for check in checks)
    return ", ".join(f"{counts[status]} {text}" for status, text in _STATUSES.items() if counts[status])


def to_json(checks: Sequence[Check], date: str) -> str:
    """Everything; `date` is UTC, ISO 8601."""
    data = {"format_version": FORMAT_VERSION, "tool": TOOL, "date": date}
    return json.dumps(data | {"checks": [check.to_dict() for check in checks]}, indent=2, ensure_ascii=False) + "\n"


def _section(check: Check) -> str:
    reason = [f"- {check.reason}"] if check.reason else []
    lines = [*reason, *(f"- **failed:** {text}" for text in check.failures), *(f"- {text}" for text in check.notes)]
    table = f"\n\n{_table(check.table)}" if check.table else ""
    return f"### {check.name}: {_STATUSES[check.status]}\n\n" + "\n".join(lines) + table


def _table(table: Table) -> str:
    rows = (table.headings, ("---",) * len(table.headings), *table.rows)
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def redact(text: str, home: str | None = None, user: str | None = None) -> str:
    """Take people out of a report: the home folder becomes `~`, and names of users in paths become USER.

    Args:
        text: the report.
        home: the home folder; default this user's.
        user: name; default this user's.
    """
    for folder in dict.fromkeys((home,) if home else (str(Path.home()), str(Path.home().resolve()))):
        if len(folder) > 1:  # a container's home may be "/"
            text = re.sub(rf"{re.escape(folder)}(?![\w.-])", "~", text)
    for homes in _HOMES:
        text = re.sub(rf"{homes}(?!Shared\b)[^/\s\"'`,;:)]+", f"{homes}USER", text)
    name = _user() if user is None else user
    if name not in _COMMON_USERS:
        text = re.sub(rf"(?<=/){re.escape(name)}(?![\w.-])", "USER", text)
    return text


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return ""
