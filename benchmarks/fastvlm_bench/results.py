"""The tables of benchmarks/README.md, made from the reports in benchmarks/results (`make bench-tables`)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvlm_bench.machine import memory_text
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import write_text

_STAGES = ("preprocess", "vision", "projector", "prefill", "first_token", "ttft", "second_ttft")


def fill(text: str, folder: Path) -> str:
    """Replace each block between `<!-- NAME.json -->` and `<!-- end -->` by the table of that report.

    Args:
        text: of a Markdown file.
        folder: of the reports.

    Raises:
        InputError: a report is missing or is none, or there is no block.
    """

    def table(found: re.Match[str]) -> str:
        return f"<!-- {found[1]} -->\n{markdown(_read(folder / found[1]))}\n<!-- end -->"

    filled, count = re.subn(r"<!-- (\S+\.json) -->\n.*?<!-- end -->", table, text, flags=re.S)
    if not count:
        raise InputError("the file must have a block from <!-- NAME.json --> to <!-- end -->, it has none")
    return filled


def markdown(data: Mapping[str, Any]) -> str:
    """A report as a table with the machine below it.

    Args:
        data: what `fastvlm-bench --json` or `fastvlm-bench compare --json` wrote.
    """
    machine = data["machine"]
    memory = memory_text(machine["memory_bytes"])
    device = machine["device"].removesuffix(f": {machine['cpu']}")
    where = f"{machine['cpu']}, {machine['cores']} cores, {memory}; MLX {machine['mlx']} on its {device}"
    blas = (machine["openblas"] or "").split()[:2]
    where += f"; {' '.join(blas)}" if blas else ""
    rows, said = (_compared if "lines" in data else _stages)(data)
    return "\n".join((*_table(rows), "", f"{said} {where}. {data['date'][:10]}."))


def _stages(data: Mapping[str, Any]) -> tuple[list[list[str]], str]:
    """Medians of the stages, TTFT's ends and shares of the machine's limit."""
    heads = [name.replace("_", " ").replace("ttft", "TTFT") for name in _STAGES]
    rows = [["model", "px", "tokens", *heads, "TTFT min-max", "token/s", "vision's share", "prefill's", "decode's"]]
    for case in data["summary"]:
        figures, limits = case["figures"], case["roofline"] or {}
        ttft = figures["ttft_ms"]
        shares = [f"{100 * limits[s]['share']:.0f} %" if s in limits else "-" for s in ("vision", "prefill", "decode")]
        rows.append(
            [
                data["subjects"][case["subject"]]["label"],
                str(case["resolution"]),
                str(case["image_tokens"]),
                *(f"{figures[f'{name}_ms']['median']:.0f}" for name in _STAGES),
                f"{ttft['low']:.0f}-{ttft['high']:.0f}",
                f"{figures['decode_tps']['median']:.1f}",
                *shares,
            ]
        )
    peaks = data["peaks"] or {"matmul_flops": {}, "bandwidth": 0}
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in peaks["matmul_flops"].items())
    limit = f" Limits: matmul GFLOP/s {rates}; memory {peaks['bandwidth'] / 1e9:.0f} GB/s." if rates else ""
    return rows, f"Milliseconds, medians of {data['plan']['runs']} rounds.{limit}"


def _compared(data: Mapping[str, Any]) -> tuple[list[list[str]], str]:
    """Times of each side, and ratios of rounds."""
    ours, *rivals = list(dict.fromkeys(line["side"] for line in data["lines"]))
    rows = [["px", "", ours, *(part for rival in rivals for part in (rival, f"{rival} / ours"))]]
    cells = {(line["resolution"], line["figure"], line["side"]): line for line in data["lines"]}
    for resolution, figure in dict.fromkeys((side, figure) for side, figure, _ in cells):
        row = [str(resolution), figure, f"{cells[resolution, figure, ours]['seconds']['median'] * 1e3:.0f}"]
        for rival in rivals:
            line = cells.get((resolution, figure, rival))
            row += ["-", "-"] if line is None else [f"{line['seconds']['median'] * 1e3:.0f}", _ratio(line)]
        rows.append(row)
    versions = "; ".join(
        f"{side} " + ", ".join(f"{package} {number}" for package, number in facts["versions"].items())
        for side, facts in data["sides"].items()
    )
    says = f"Milliseconds, medians of {data['plan']['runs']} rounds; bold where every round says the same."
    return rows, f"{says} {data['model']}, {data['dtype']}, {data['threads']} threads each; {versions}."


def _ratio(line: Mapping[str, Any]) -> str:
    ratio = line["ratio"]
    text = f"{ratio['median']:.2f}"
    text = f"**{text}**" if line["verdict"].endswith("in every round") else text
    return f"{text} ({ratio['low']:.2f}-{ratio['high']:.2f})"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return [head, f"|{'---|' * len(rows[0])}", *rest]


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError(f"{file} doesn't exist; make it with: fastvlm-bench --json {file}")
    data = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or not {"machine", "plan", "date"} <= data.keys():
        raise InputError(f"{file} is no report of fastvlm-bench")
    return data


def main() -> None:
    """Rewrite the tables of a file: FOLDER of the reports, FILE."""
    folder, readme = map(Path, sys.argv[1:])
    write_text(readme, fill(readme.read_text(encoding="utf-8"), folder))


if __name__ == "__main__":
    main()
