"""What the doctor's checks share: sizes, times, the worker, the report."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest

from fastvlm_bench.doctor.check import Check, Table, guarded, skipped
from fastvlm_bench.doctor.plan import parse_sizes, sample_pixels, size_text, time_calls
from fastvlm_bench.doctor.report import redact, to_json, to_markdown
from fastvlm_bench.doctor.worker import Worker, WorkError
from fastvlm_mlx.errors import BundleError, InputError
from support import doctor as chores

SIZE = (64, 128)


def test_sizes():
    assert parse_sizes("256, 1024X576,256") == ((256, 256), (1024, 576))
    assert [size_text(size) for size in parse_sizes("256,1024x576")] == ["256", "1024x576"]
    with pytest.raises(InputError, match="got ''"):
        parse_sizes("")


def test_the_picture():
    pixels = sample_pixels(SIZE)
    assert (pixels.shape, pixels.dtype) == ((64, 128, 3), np.uint8)
    assert np.array_equal(pixels, sample_pixels(SIZE))
    assert pixels.std() > 20


def test_times_stop_when_they_take_long():
    calls = []

    def call():
        calls.append(None)
        time.sleep(0.02)

    assert len(time_calls(call, 3, 60)) == 3
    times = time_calls(call, 1000, 0.05)
    assert 1 <= len(times) <= 3, "60 ms are more than 50"
    assert all(milliseconds >= 20 for milliseconds in times)
    calls.clear()
    assert len(time_calls(call, 5, 0)) == len(calls) == 1


def test_checks_and_what_they_raise(capsys):
    assert Check("c").status == "ok"
    assert Check("c", failures=("f",), reason="r").status == "failed"
    assert skipped("c", "r", "w").to_dict() == {
        "name": "c",
        "status": "skipped",
        "reason": "r",
        "failures": [],
        "notes": ["it would check w"],
    }

    def fail():
        raise ValueError("two\nlines")

    def fail_knowingly():
        raise BundleError("damaged")

    assert guarded("c", fail).failures == ("two lines (ValueError)",)
    assert guarded("c", fail_knowingly).failures == ("damaged",)
    assert capsys.readouterr().err == ""
    guarded("c", fail, debug=True)
    assert "Traceback" in capsys.readouterr().err


def test_a_worker_outlives_its_process(capfd):
    with Worker(chores.Chores, limit_s=120) as worker:
        first, calls = worker.do(chores.count)
        assert (first != os.getpid(), calls) == (True, 1)
        assert worker.do(chores.count) == (first, 2), "one process, one state"
        with pytest.raises(WorkError, match=r"^abab \(ValueError\)$"):
            worker.do(chores.fail, "ab", twice=2)
        assert worker.do(chores.count) == (first, 3), "an exception ends nothing"
        worker.do(chores.shout)
        assert capfd.readouterr() == ("", "not in the report\n")
        with pytest.raises(WorkError, match="ended with exit code 7"):
            worker.do(chores.die)
        second, calls = worker.do(chores.count)
        assert (second != first, calls) == (True, 1)
        worker.limit_s = 0.2
        with pytest.raises(WorkError, match=r"took longer than 0.2 s and was stopped; --limit allows more"):
            worker.do(chores.sleep)
        worker.limit_s = 120
        assert worker.do(chores.count)[1] == 1
        last = worker.do(chores.count)[0]
    with pytest.raises(ProcessLookupError):
        os.kill(last, 0)


def test_markdown_and_json():
    table = Table(("a", "b"), (("1", "x|y"), ("2", "")))
    checks = [
        Check("first", ("a note",), ("is broken",), table=table, data={"values": [1]}),
        skipped("second", "no Mac", "everything"),
        Check("third", ("fine",)),
    ]
    text = to_markdown(checks, "2026-01-02T03:04:05+00:00")
    assert text.partition("\n")[0].endswith(": 1 ok, 1 FAILED, 1 not checked here")
    assert text.partition("\n\n")[2] == (
        "2026-01-02T03:04:05+00:00\n\n"
        "### first: FAILED\n\n- **failed:** is broken\n- a note\n\n"
        "| a | b |\n| --- | --- |\n| 1 | x/y |\n| 2 |  |\n\n"
        "### second: not checked here\n\n- no Mac\n- it would check everything\n\n"
        "### third: ok\n\n- fine"
    )
    data = json.loads(to_json(checks, "now"))
    assert (data["format_version"], data["date"]) == (1, "now")
    assert data["checks"][0] == {
        "name": "first",
        "status": "failed",
        "reason": None,
        "failures": ["is broken"],
        "notes": ["a note"],
        "values": [1],
    }


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("/Users/jane doe/m and /Users/jane doe", "~/m and ~"),
        ("/Users/jane doe2/m", "/Users/USER doe2/m"),
        ('"/Users/john/x", /home/john: bad', '"/Users/USER/x", /home/USER: bad'),
        ("/Users/Shared/m", "/Users/Shared/m"),
        ("/Volumes/jane/m, /data/jane.txt, jane is a name", "/Volumes/USER/m, /data/jane.txt, jane is a name"),
        ("/private/var/folders/ab/T/x", "/private/var/folders/ab/T/x"),
    ],
)
def test_names_of_people_stay_out(text, clean):
    assert redact(text, home="/Users/jane doe", user="jane") == clean


def test_a_root_folder_is_no_home():
    assert redact("/opt/root/m", home="/", user="root") == "/opt/root/m"
