"""`--plot` and `fastvlm-bench plot`: the files, and what can go wrong."""

from __future__ import annotations

import io
import itertools
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

pytest.importorskip("matplotlib")

import matplotlib
import numpy as np
from PIL import Image

from fastvlm_bench.cli import main
from fastvlm_bench.plots import drawing
from fastvlm_bench.plots.drawing import check_folder, draw, write
from fastvlm_mlx.errors import InputError, MissingDependencyError
from support.plot_reports import OTHER, case, decoders, model, whole

QUICK = ["--size", "tiny", "--resolution", "64", "--runs", "1", "--warmup", "0", "--max-tokens", "1"]


def names(*figures):
    return sorted(f"{f}{page}.{kind}" for f, page, kind in itertools.product(figures, ("", "-dark"), ("png", "svg")))


ALL = names("breakdown", "ttft", "roofline")


@pytest.fixture(scope="module")
def drawn():
    return draw([("a.json", decoders(2, (256, 512)))])


@pytest.fixture
def saved(tmp_path):
    """Writes a report's data, and gives the file's name."""

    def save(name, data):
        (tmp_path / name).write_text(data if isinstance(data, str) else json.dumps(data))
        return str(tmp_path / name)

    return save


def test_all_figures_are_drawn_for_both_pages(drawn):
    assert sorted(drawn.files) == ALL
    assert drawn.skipped == {}
    for name, content in drawn.files.items():
        page = (13, 17, 23) if "-dark" in name else (255, 255, 255)
        if name.endswith(".png"):
            image = Image.open(io.BytesIO(content))
            assert image.width == 1600
            pixels = np.asarray(image.convert("RGB"))
            assert {tuple(pixels[y, x]) for y in (0, -1) for x in (0, -1)} == {page}
        else:
            ET.fromstring(content)
            assert f"fill: #{bytes(page).hex()}" in content.decode()


def test_words_of_an_svg_are_text_and_it_has_no_date(drawn):
    for name in ALL:
        if name.endswith(".svg"):
            root = ET.fromstring(drawn.files[name])
            said = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
            assert "FastVLM-1.5B" in said
            assert any("Apple M2, 8 cores, 16.0 GiB" in text and "2026-11-21" in text for text in said)
            assert root.find("{http://www.w3.org/2000/svg}title").text
            assert b"dc:date" not in drawn.files[name]
            assert matplotlib.__version__.encode() not in drawn.files[name]


def test_the_same_report_gives_the_same_bytes_whatever_the_users_settings(drawn):
    theirs = {"font.size": 20, "axes.linewidth": 5, "xtick.major.pad": 20, "svg.fonttype": "path", "svg.hashsalt": None}
    with matplotlib.rc_context(theirs | {"savefig.bbox": "tight"}):
        before = dict(matplotlib.rcParams)
        again = draw([("b.json", decoders(2, (256, 512)))])
        assert dict(matplotlib.rcParams) == before
    assert {name: content == drawn.files[name] for name, content in again.files.items()} == dict.fromkeys(ALL, True)


def test_names_are_drawn_as_they_are():
    files = draw([("a.json", whole([model("$5_{or}$ <6> & \u76ee \x01\ud800")], [case(0, 256)]))]).files
    for name in names("breakdown", "ttft"):
        if name.endswith(".svg"):
            said = [element.text for element in ET.fromstring(files[name]).iter("{http://www.w3.org/2000/svg}text")]
            assert any("$5_{or}$ <6> & \u76ee" in text for text in said)


def test_pyplot_and_the_chosen_backend_are_left_alone(saved, tmp_path):
    file = saved("a.json", whole([model()], [case(0, 256)]))
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from fastvlm_bench.cli import main\n"
        f"code = main(['plot', {file!r}, '-o', {str(tmp_path / 'out')!r}])\n"
        "print(code, 'matplotlib.pyplot' in sys.modules, 'mlx.core' in sys.modules)"
    )
    environment = os.environ | {"MPLBACKEND": "template"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "0 False False"


def test_a_figure_without_data_is_skipped_with_its_reason(capsys, saved, tmp_path):
    file = saved("a.json", decoders(1, (256,), peaks=None))
    assert main(["plot", file, "-o", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names("breakdown", "ttft")
    assert out.splitlines() == [
        f"figures: breakdown, ttft in {tmp_path / 'out'}, as PNG and SVG, each for a light and a dark page",
        "no roofline: the machine's limits weren't measured; measure without --no-roofline",
    ]
    assert err == ""


def test_several_machines_in_one_figure_have_their_names(capsys, saved, tmp_path):
    files = [saved("a.json", decoders(1, (256, 512))), saved("b.json", decoders(1, (256, 512), machine=OTHER))]
    assert main(["plot", *files, "-o", str(tmp_path / "new" / "out")]) == 0
    capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == ALL
    for figure in ("breakdown", "ttft", "roofline"):
        svg = (tmp_path / "new" / "out" / f"{figure}.svg").read_text()
        assert "FastVLM-0.5B, Apple M2" in svg
        assert "FastVLM-0.5B, Apple M1" in svg


def test_a_failure_while_writing_leaves_the_older_files(drawn, tmp_path, monkeypatch):
    for name in ALL:
        (tmp_path / name).write_bytes(b"older")
    (tmp_path / "notes.txt").write_text("mine")
    real, opened = drawing.replaced_file, []

    def full(path):
        opened.append(path)
        if len(opened) == 5:
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(drawing, "replaced_file", full)
    with pytest.raises(OSError, match="No space"):
        write(drawn, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*ALL, "notes.txt"])
    assert {(tmp_path / name).read_bytes() for name in ALL} == {b"older"}
    monkeypatch.undo()
    write(drawn, tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in ALL} == drawn.files
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_plot_of_what_was_just_measured(capsys, tmp_path):
    argv = [*QUICK, "--plot", str(tmp_path / "figures"), "--json", str(tmp_path / "a.json"), "--no-roofline"]
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"\n\nfigures: breakdown, ttft in {tmp_path / 'figures'}, as PNG" in out
    made = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    assert sorted(made) == names("breakdown", "ttft")
    assert main(["plot", str(tmp_path / "a.json"), "-o", str(tmp_path / "again")]) == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == made


def test_a_measured_roofline_is_drawn(capsys, tmp_path):
    assert main([*QUICK, "--plot", str(tmp_path)]) == 0
    capsys.readouterr()
    assert sorted(path.name for path in tmp_path.iterdir()) == ALL


# What can go wrong


@pytest.fixture
def measures_nothing(monkeypatch):
    def measured(*arguments, **options):
        raise AssertionError("measured before the figures' folder was checked")

    monkeypatch.setattr("fastvlm_bench.measure.measure", measured)


def failing(capsys, argv):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


@pytest.mark.parametrize("argv", [[*QUICK, "--plot"], ["plot", "a.json", "-o"]])
def test_without_matplotlib_nothing_is_measured(capsys, monkeypatch, measures_nothing, tmp_path, argv):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = failing(capsys, [*argv, str(tmp_path / "out")])
    assert "figures need matplotlib: pip install 'fastvlm-mlx[bench]'" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(MissingDependencyError):
        draw([("a.json", whole([model()], [case(0, 256)]))])


def test_a_file_in_the_folders_place(capsys, measures_nothing, tmp_path):
    (tmp_path / "taken").write_text("")
    said = failing(capsys, [*QUICK, "--plot", str(tmp_path / "taken")])
    assert f"--plot {tmp_path / 'taken'} is a file; name a folder" in said
    said = failing(capsys, [*QUICK, "--plot", str(tmp_path / "taken" / "deeper")])
    assert f"can't be made, {tmp_path / 'taken'} is a file" in said
    assert "-o" in failing(capsys, ["plot", "a.json", "-o", str(tmp_path / "taken")])


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    check_folder(tmp_path / "a" / "b", "--plot")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(InputError, match="no right to write"):
        check_folder(tmp_path / "a" / "b", "--plot")


def broken(change):
    data = whole([model()], [case(0, 256)])
    change(data)
    return data


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ("no json", "isn't JSON"),
        (broken(lambda d: d.update(format_version=1)), "must be a report of format_version 2"),
        (broken(lambda d: d.update(summary=[])), "holds no measured resolution"),
        (broken(lambda d: d.pop("machine")), "isn't a whole report of fastvlm-bench (no 'machine')"),
        (broken(lambda d: d["summary"][0]["figures"].pop("vision_ms")), "no 'vision_ms'"),
        (broken(lambda d: d["summary"][0].update(subject=7)), "there is no subject 7"),
        (broken(lambda d: d["summary"][0].update(figures=None)), "isn't a whole report"),
        (broken(lambda d: d["summary"][0].update(resolution=0)), "resolution must be above 0, found 0"),
        (broken(lambda d: d["summary"][0]["figures"]["ttft_ms"].update(low=1e9)), "expected 1e-06 <= low <= median"),
        (broken(lambda d: d["summary"][0]["figures"]["ttft_ms"].update(high=float("inf"))), "ttft_ms: expected"),
        (broken(lambda d: d["summary"][0]["figures"]["prefill_ms"].update(low=-1)), "prefill_ms: expected 0 <= low"),
        (broken(lambda d: d.update(peaks={"matmul_flops": {}, "bandwidth": 1e9})), "matmul_flops is empty"),
        (broken(lambda d: d.update(peaks={"matmul_flops": {"float32": 1}, "bandwidth": 0})), "bandwidth must be above"),
    ],
)
def test_a_report_that_cannot_be_drawn(capsys, saved, tmp_path, data, part):
    good = saved("good.json", whole([model()], [case(0, 256)]))
    said = failing(capsys, ["plot", good, saved("bad.json", data), "-o", str(tmp_path / "out")])
    assert part in said
    assert "bad.json" in said
    assert not (tmp_path / "out").exists()


def test_reports_that_are_missing_or_named_twice(capsys, saved, tmp_path):
    file = saved("a.json", whole([model()], [case(0, 256)]))
    out = ["-o", str(tmp_path / "out")]
    assert "nowhere.json isn't a file" in failing(capsys, ["plot", "nowhere.json", *out])
    assert "named twice" in failing(capsys, ["plot", file, str(tmp_path / "." / "a.json"), *out])
    with pytest.raises(SystemExit):
        main(["plot", file])
