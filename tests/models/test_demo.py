"""`make demo`: what it shows is what the model says, and it needs the run time alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import load
from nano import demo

ROOT = Path(__file__).resolve().parents[2]


def test_it_shows_questions_answers_and_times(capsys):
    demo.main()
    out = capsys.readouterr().out
    model = load()
    begin = 0
    for shown in demo.PICTURES:
        begin = out.index(f"\nmodels/nano/pictures/{shown.file}\n", begin)
        for question in shown.questions:
            answer = model.generate(demo.FOLDER / shown.file, question, max_tokens=demo.MOST_TOKENS)
            begin = out.index(f"  {question} {answer}\n      preprocess ", begin)
    splits = re.findall(r"^ +preprocess .* ms$", out, re.MULTILINE)
    assert len(splits) == sum(len(shown.questions) for shown in demo.PICTURES)
    for line in splits:
        *parts, ttft = (float(number) for number in re.findall(r"[\d.]+(?= [+=m])", line))
        assert len(parts) == 6
        assert 0.9 * ttft - 0.5 <= sum(parts) <= ttft + 0.5  # each is rounded


@pytest.mark.parametrize("shown", demo.PICTURES, ids=lambda shown: shown.file)
def test_the_pictures_are_held_out_scenes(shown):
    pytest.importorskip("matplotlib", reason="the dev extra isn't installed: it has the fonts")
    from nano.scenes import make_scene

    with Image.open(demo.FOLDER / shown.file) as picture:
        found = np.asarray(picture.convert("RGB"), np.float32)
    # Another version of Pillow may shade the edges of letters a little differently.
    assert np.abs(found - make_scene(shown.seed, "held-out").image).mean() < 1.0


def test_it_needs_the_run_time_alone():
    code = f"import sys, runpy; sys.path[:] = {sys.path!r}\n"
    code += "sys.modules.update(dict.fromkeys(('matplotlib', 'torch', 'coremltools'), None))\n"
    code += f"runpy.run_path({str(ROOT / 'models' / 'nano' / 'demo.py')!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
