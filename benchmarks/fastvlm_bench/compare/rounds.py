"""Ask all sides the same, in turn, and keep what they did as long as their answers agree with ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastvlm_bench.compare.plan import CHECKED_TOKENS, Plan, Requests
from fastvlm_bench.compare.process import SideError
from fastvlm_bench.compare.rivals import LIBRARIES, OURS, Kind

CHECK = -1  # the round before the measured ones


class Answers(Protocol):
    """What `process.Worker` does."""

    def request(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request, or SideError."""
        ...


@dataclass(frozen=True, slots=True)
class Leg:
    """A side and what it is asked; ours may be asked both."""

    side: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class Run:
    """One request to one side.

    Attributes:
        side: OURS or a rival.
        kind: what it was asked.
        resolution: side of the picture in pixels; for a text, the one whose length it has.
        round: 0, 1, ...; a round asks every side everything once.
        place: 0 for the side that was asked first at this resolution in this round.
        ttft_s: from the call to the first token on the host: a picture's first question, or the text.
        second_ttft_s: the same for a second question about the same picture.
        decode_s: from the first token to the last.
        decode_tokens: how many came in that time: all but the first.
        ids, second_ids: of the answers.
        positions: of the prompt, where the side tells it.
        peak_rss_bytes: most memory that the side's process held until then.
    """

    side: str
    kind: Kind
    resolution: int
    round: int
    place: int
    ttft_s: float
    second_ttft_s: float | None
    decode_s: float
    decode_tokens: int
    ids: tuple[int, ...]
    second_ids: tuple[int, ...]
    positions: int | None
    peak_rss_bytes: int


@dataclass(slots=True)
class Outcome:
    """What came of a comparison.

    Attributes:
        runs: the measured ones, in order, of the sides that gave our answers to the end.
        failures: why others are missing, by side.
        positions: of a question about a picture, by resolution.
    """

    runs: list[Run] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    positions: dict[int, int] = field(default_factory=dict)


def legs(rivals: Sequence[str]) -> list[Leg]:
    """Who is asked what: each rival its kind, and we every kind that a rival is asked."""
    found: list[Leg] = []
    for kind in dict.fromkeys(library.kind for library in LIBRARIES.values()):
        if asked := [Leg(name, kind) for name in rivals if LIBRARIES[name].kind == kind]:
            found += [Leg(OURS, kind), *asked]
    return found


def rotate(items: Sequence[Leg], by: int) -> list[Leg]:
    """Begin elsewhere each time: no side is always first, when the machine has just been idle or busy."""
    start = by % max(len(items), 1)
    return [*items[start:], *items[:start]]


class Comparison:
    """Runs a plan with sides that are ready.

    Args:
        workers: by side, OURS among them.
        plan: what to run.
        requests: makes the requests.
        progress: called after each request.
    """

    def __init__(
        self,
        workers: Mapping[str, Answers],
        plan: Plan,
        requests: Requests,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._workers, self._plan, self._requests, self._progress = workers, plan, requests, progress
        self.outcome = Outcome()
        self._legs = self._remaining()

    def run(self) -> Outcome:
        """Check every side at every resolution, then measure those that agree.

        Raises:
            SideError: our own side failed.
        """
        for resolution in self._plan.resolutions:
            self._find_positions(resolution)
            self._ask_all(CHECK, resolution)
        for index in range(self._plan.runs):
            for resolution in self._plan.resolutions:
                if self._legs:  # a rival is left
                    self.outcome.runs += self._ask_all(index, resolution)
        self.outcome.runs = [run for run in self.outcome.runs if run.side not in self.outcome.failures]
        return self.outcome

    def _find_positions(self, resolution: int) -> None:
        """Ask ours how long a question about a picture is: a text gets the same length."""
        request = self._requests.make("picture", CHECK, resolution, 0)
        reply = self._workers[OURS].request(request | {"tokens": [1]})
        self.outcome.positions[resolution] = reply["answers"][0]["positions"]

    def _ask_all(self, index: int, resolution: int) -> list[Run]:
        """One round at one resolution; sides that fail or disagree are taken out."""
        runs = []
        for place, leg in enumerate(rotate(self._legs, index)):
            if leg.side in self.outcome.failures:
                continue
            try:
                runs.append(self._ask(leg, index, resolution, place))
            except SideError as exc:
                if leg.side == OURS:
                    raise
                self.outcome.failures[leg.side] = str(exc)
            self._progress()
        ours = {run.kind: run for run in runs if run.side == OURS}
        for run in runs:
            if difference := disagreement(run, ours[run.kind]):
                self.outcome.failures[run.side] = difference
        self._legs = self._remaining()
        return runs

    def _remaining(self) -> list[Leg]:
        return legs([name for name in self._workers if name != OURS and name not in self.outcome.failures])

    def _ask(self, leg: Leg, index: int, resolution: int, place: int) -> Run:
        request = self._requests.make(leg.kind, index, resolution, self.outcome.positions[resolution])
        reply = self._workers[leg.side].request(request)
        first, *second = reply["answers"]
        return Run(
            side=leg.side,
            kind=leg.kind,
            resolution=resolution,
            round=index,
            place=place,
            ttft_s=first["ttft_s"],
            second_ttft_s=second[0]["ttft_s"] if second else None,
            decode_s=first["decode_s"],
            decode_tokens=len(first["ids"]) - 1,
            ids=tuple(first["ids"]),
            second_ids=tuple(second[0]["ids"]) if second else (),
            positions=first["positions"],
            peak_rss_bytes=reply["peak_rss_bytes"],
        )


def disagreement(run: Run, ours: Run) -> str:
    """Which answer differs from ours and where, in a sentence; "" if none does."""
    for which, theirs, right in (("first", run.ids, ours.ids), ("second", run.second_ids, ours.second_ids)):
        theirs, right = theirs[:CHECKED_TOKENS], right[:CHECKED_TOKENS]
        if theirs != right:
            at = next((i for i, (a, b) in enumerate(zip(theirs, right, strict=False)) if a != b), len(theirs))
            when = "before anything was timed" if run.round == CHECK else f"in round {run.round + 1}"
            return (
                f"{run.side} answers the {which} question at {run.resolution} px otherwise than {OURS} ({when}), "
                f"from token {at + 1} on: {list(theirs[at : at + 4])} instead of {list(right[at : at + 4])}; "
                "times of different answers can't be compared"
            )
    return ""
