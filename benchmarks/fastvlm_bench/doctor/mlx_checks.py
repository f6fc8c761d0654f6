"""MLX on this machine: right products, FastViTHD's times, an answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict

from fastvlm_bench.doctor.check import Check, Table, skipped
from fastvlm_bench.doctor.mlx_side import Answers, Encoded, MlxState, answer, encode, multiply, reference
from fastvlm_bench.doctor.parity import HALF_GATE, relative_l2
from fastvlm_bench.doctor.plan import Plan, Size, area, size_text, spread_text
from fastvlm_bench.doctor.worker import Worker, WorkError
from fastvlm_mlx.bundle import Bundle

Say = Callable[[str], object]

PRODUCTS, ENCODER, ANSWER = "MLX", "FastViTHD in MLX", "answer"
# Relative L2 against numpy in float64 at a side of 256: 2e-7 measured in float32 and 1.7e-3 in bfloat16, on a CPU.
# A GPU that multiplies in TF32 keeps 10 bits of each factor, 5e-4.
MATMUL_GATES = {"float32": 1e-3, "bfloat16": 1e-2, "4 bits": 1e-3}


def check_products(worker: Worker[MlxState], say: Say = lambda _: None) -> Check:
    """Whether MLX multiplies right; see MATMUL_GATES.

    Args:
        worker: computes.
        say: called with what is being done.
    """
    say("MLX: matmul")
    found = worker.do(multiply)
    note = "matmul, relative L2: " + ", ".join(f"{name} {value:.1e}" for name, value in found.items())
    known = {name: value if math.isfinite(value) else None for name, value in found.items()}  # JSON has no NaN
    return Check(PRODUCTS, (note,), tuple(judge_products(found)), data={"matmul": known})


def judge_products(found: Mapping[str, float]) -> list[str]:
    """What is wrong with products, by their relative L2; NaN is wrong too."""
    return [
        f"matmul in {name} is off by {found[name]:.1e} (relative L2), at most {gate:.0e}"
        for name, gate in MATMUL_GATES.items()
        if not found[name] <= gate
    ]


def check_encoder(
    worker: Worker[MlxState], bundle: Bundle, sizes: tuple[Size, ...], plan: Plan, say: Say = lambda _: None
) -> Check:
    """FastViTHD's times, whether its features are finite, and on a GPU whether they are the CPU's.

    Args:
        worker: computes.
        bundle: the model.
        sizes: of the pictures, at least one.
        plan: how much is measured.
        say: called with what is being done.
    """
    if bundle.config.vision is None:
        return skipped(ENCODER, "the bundle has no vision weights for MLX", "FastViTHD's times in MLX")
    rows: list[tuple[Size, Encoded]] = []
    failures, notes = [], []
    for size in sizes:
        say(f"{ENCODER}: {size_text(size)} px")
        try:
            rows.append((size, worker.do(encode, size, plan.runs, plan.seconds)))
        except WorkError as exc:
            failures.append(f"{size_text(size)} px: {exc}")
    failures += [f"{size_text(size)} px: the features aren't finite" for size, row in rows if not row.finite]
    data: dict[str, object] = {"vision": [{"size": list(size), **asdict(row)} for size, row in rows]}
    if not rows:
        return Check(ENCODER, (), tuple(failures), data=data)
    notes.append(f"on {rows[0][1].device}, {rows[0][1].dtype}")
    if "gpu" in rows[0][1].device:
        data["gpu_relative_l2"] = distance = _beside_the_cpu(worker, min(sizes, key=area), say)
        notes.append(
            f"GPU beside CPU in float32, relative L2: {'not finite' if distance is None else f'{distance:.1e}'}"
        )
        if distance is None or distance > HALF_GATE:
            failures.append(f"the GPU's features aren't the CPU's; at most {HALF_GATE:.0e}")
    else:
        notes.append("not checked here: a Mac's GPU")
    table = Table(("px", "first ms", "median ms (min-max)", "runs"), tuple(_row(size, row) for size, row in rows))
    return Check(ENCODER, tuple(notes), tuple(failures), table=table, data=data)


def _beside_the_cpu(worker: Worker[MlxState], size: Size, say: Say) -> float | None:
    say(f"{ENCODER}: GPU and CPU at {size_text(size)} px")
    return relative_l2(worker.do(reference, size), worker.do(reference, size, on_cpu=True))


def _row(size: Size, found: Encoded) -> tuple[str, ...]:
    return (size_text(size), f"{found.first_ms:.1f}", spread_text(found.times_ms), str(len(found.times_ms)))


def check_answer(worker: Worker[MlxState], sizes: tuple[Size, ...], say: Say = lambda _: None) -> Check:
    """A greedy answer, which must be the same twice.

    Args:
        worker: computes.
        sizes: the smallest of them is the picture's.
        say: called with what is being done.
    """
    say("an answer")
    found = worker.do(answer, min(min(size) for size in sizes))
    failures = () if found.first == found.second else (f"greedy answers differ: {found.first} and {found.second}",)
    return Check(ANSWER, _describe(found), failures, data={"answer": asdict(found)})


def _describe(found: Answers) -> tuple[str, ...]:
    said = " ".join(map(str, found.first)) if found.text is None else found.text
    quoted = " ".join(said.replace("`", "'").split())
    return (
        f"{len(found.first)} tokens, the first after {found.ttft_ms:.0f} ms, then {found.decode_tps:.1f} per second; "
        f"decoder {found.precision}; {found.device}",
        f"`{quoted}`",
    )
