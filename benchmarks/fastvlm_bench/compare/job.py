"""A comparison from models and interpreters to the report."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastvlm_bench.compare.cold import ColdRun, command, run_cold
from fastvlm_bench.compare.plan import Plan, Requests
from fastvlm_bench.compare.process import SideError, Worker, start, versions
from fastvlm_bench.compare.processors import write_resolution
from fastvlm_bench.compare.report import Report
from fastvlm_bench.compare.rivals import OURS
from fastvlm_bench.compare.rounds import Comparison, Outcome, Run, legs
from fastvlm_bench.compare.summary import Line, summarise, summarise_cold
from fastvlm_bench.machine import describe_machine

Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Job:
    """All that a comparison needs.

    Attributes:
        name: of the model.
        models: its folder for each side, ours first.
        pythons: the interpreter of each side.
        plan: what to run.
        dtype: "float32" or "bfloat16".
        threads: for each side.
    """

    name: str
    models: Mapping[str, Path]
    pythons: Mapping[str, Path]
    plan: Plan
    dtype: str
    threads: int


def run_job(job: Job, say: Say) -> Report:
    """Long-lived sides, asked in turn.

    Raises:
        SideError: our own side failed; a rival that does is among the report's failures.
    """
    from tqdm import tqdm

    failures: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers, sides = _start_all(job, say, stack, failures)
        asked = len(legs([name for name in workers if name != OURS]))
        calls = asked * (job.plan.runs + 1) * len(job.plan.resolutions)
        bar = stack.enter_context(tqdm(total=calls, unit="call", leave=False, disable=None))
        outcome = Comparison(workers, job.plan, Requests(job.plan, folder), bar.update).run()
    outcome.failures = failures | outcome.failures
    return _report(job, sides, outcome, outcome.runs, summarise(outcome.runs), cold=False)


def _start_all(
    job: Job, say: Say, stack: contextlib.ExitStack, failures: dict[str, str]
) -> tuple[dict[str, Worker], dict[str, dict[str, Any]]]:
    """The sides that get ready, and what is known of them; why others don't goes into `failures`."""
    workers: dict[str, Worker] = {}
    sides: dict[str, dict[str, Any]] = {}
    for name, model in job.models.items():
        say(f"loading the model in {name}")
        try:
            numbers = versions(name, job.pythons[name])
            workers[name] = start(name, job.pythons[name], model, job.dtype, job.threads)
        except SideError as exc:
            if name == OURS:
                raise
            failures[name] = str(exc)
            continue
        stack.callback(workers[name].close)
        sides[name] = {"versions": numbers, **workers[name].facts}
    return workers, sides


def run_cold_job(job: Job, say: Say) -> Report:
    """Whole processes, in turn.

    Raises:
        SideError: a side failed, or a rival printed another token than ours.
    """
    from tqdm import tqdm

    sides = {name: {"versions": versions(name, job.pythons[name])} for name in job.models}
    say("starting each command once, so that its files are in memory")
    runs: list[ColdRun] = []
    calls = len(job.models) * (job.plan.runs + 1) * len(job.plan.resolutions)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=calls, unit="run", leave=False, disable=None) as bar:
        requests = Requests(job.plan, Path(folder))
        for resolution in job.plan.resolutions:
            image = requests.picture(0, resolution)
            commands = []
            for name, model in job.models.items():
                if name != OURS:
                    write_resolution(model, resolution)
                python = job.pythons[name]
                commands.append(command(name, python, model, image, resolution, job.dtype, job.threads))
            runs += run_cold(commands, resolution, job.plan.runs, bar.update)
    return _report(job, sides, Outcome(), runs, summarise_cold(runs), cold=True)


def _report(
    job: Job,
    sides: Mapping[str, Mapping[str, Any]],
    outcome: Outcome,
    runs: Sequence[Run | ColdRun],
    lines: Sequence[Line],
    *,
    cold: bool,
) -> Report:
    return Report(
        model=job.name,
        dtype=job.dtype,
        threads=job.threads,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        plan=job.plan,
        cold=cold,
        machine=describe_machine(),
        sides=sides,
        positions=outcome.positions,
        failures=outcome.failures,
        runs=runs,
        lines=lines,
    )
