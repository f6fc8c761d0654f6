"""An interpreter that only plays a side of a comparison: `fastvlm_bench.workers.serve`'s protocol, made-up times,
and the command line of `--cold`.

Its model's folder has behaviour.json: `ttft_s`, `second_ttft_s`, `decode_s` (lists, one entry a request, the
last one for all that follow), `wrong_at` (first request that is answered otherwise), `dies_at`, `log` (a file
that gets a line a request).
"""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

POSITIONS = 40


def write_interpreter(folder: Path) -> Path:
    """An executable that stands in for python."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -P {__file__} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def write_model(folder: Path, **behaviour: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    return folder


def right_ids(request: dict[str, Any], index: int) -> list[int]:
    """What every side that isn't `wrong_at` answers: it depends on all that was asked."""
    asked = request.get("ids") or [Path(request["image"]).name, request["questions"][index], request["resolution"]]
    start = sum(str(asked).encode())
    return [(start * (place + 3)) % 997 for place in range(request["tokens"][index])]


def main(arguments: list[str]) -> None:
    if "-c" in arguments:  # the question for versions
        print(json.dumps({"python": "3.0", **dict.fromkeys(arguments[arguments.index("-c") + 2 :], "1.2")}))
        return
    if "--max-tokens" in arguments:  # a command line
        print("a token")
        return
    setup = json.loads(arguments[-1])
    behaviour = json.loads((Path(setup["model"]) / "behaviour.json").read_text())
    if behaviour.get("dies_at") == "start":
        sys.exit("loading...\nImportError: no such library\n")
    print(json.dumps({"device": "a fake", "threads": setup["threads"]}), flush=True)
    for number, line in enumerate(sys.stdin):
        if behaviour.get("dies_at") == number:
            sys.exit("Traceback (most recent call last):\nMemoryError: all gone\n\n")
        request = json.loads(line)
        if log := behaviour.get("log"):
            with Path(log).open("a") as file:
                what = Path(request["image"]).name if "image" in request else f"text {len(request['ids'])}"
                print(Path(setup["model"]).name, what, request["tokens"], file=file)
        reply = {"answers": [answer(request, behaviour, number, i) for i in range(len(request["tokens"]))]}
        print(json.dumps(reply | {"peak_rss_bytes": 1000 + number}), flush=True)


def answer(request: dict[str, Any], behaviour: dict[str, Any], number: int, index: int) -> dict[str, Any]:
    def of(name: str) -> float:
        values = behaviour.get(name, [1.0])
        return float(values[min(number, len(values) - 1)])

    ids = right_ids(request, index)
    if number >= behaviour.get("wrong_at", number + 1):
        ids[-1] += 1
    ttft = of("second_ttft_s" if index else "ttft_s")
    return {"ttft_s": ttft, "decode_s": of("decode_s"), "ids": ids, "positions": POSITIONS}


if __name__ == "__main__":
    main(sys.argv[1:])
