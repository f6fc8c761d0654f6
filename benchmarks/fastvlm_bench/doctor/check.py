"""One check of the doctor's and its outcome."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fastvlm_mlx.errors import FastVLMError

OK, FAILED, SKIPPED = "ok", "failed", "skipped"


@dataclass(frozen=True, slots=True)
class Table:
    """Cells as text, a row for each measurement."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Check:
    """What was looked at and what was found.

    Attributes:
        name: of the check.
        notes: what was found, in sentences.
        failures: what is wrong, in sentences.
        reason: why it wasn't checked; None where it was.
        table: what was measured.
        data: everything, for JSON.
    """

    name: str
    notes: tuple[str, ...] = ()
    failures: tuple[str, ...] = ()
    reason: str | None = None
    table: Table | None = None
    data: Mapping[str, object] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """OK, FAILED or SKIPPED; a check that was given up half-way because of a failure has failed."""
        if self.failures:
            return FAILED
        return SKIPPED if self.reason else OK

    def to_dict(self) -> dict[str, object]:
        """The check as plain data."""
        outcome = {"status": self.status, "reason": self.reason, "failures": list(self.failures)}
        return {"name": self.name, **outcome, "notes": list(self.notes), **self.data}


def skipped(name: str, reason: str, would: str) -> Check:
    """A check that can't be made here; `would` says what it looks at where it can."""
    return Check(name, notes=(f"it would check {would}",), reason=reason)


def guarded(name: str, make: Callable[[], Check], debug: bool = False) -> Check:
    """Make a check; whatever is raised becomes its failure, so that the other checks are still made.

    Args:
        name: of the check.
        make: makes it.
        debug: show the traceback of what is raised on stderr.
    """
    try:
        return make()
    except Exception as exc:  # whatever it is: the other checks matter all the same
        if debug:
            traceback.print_exc(file=sys.stderr)
        return Check(name, failures=(one_line(exc),))


def one_line(exc: BaseException) -> str:
    """An error's text on one line, with its type where it isn't one of this library's."""
    text = " ".join(str(exc).split()) or type(exc).__name__
    return text if isinstance(exc, FastVLMError) else f"{text} ({type(exc).__name__})"
