"""Wide pictures: a cut that changes no answer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib")

from nano.scenes import main, make_scene
from nano.wide import wide_scenes
from support.plans import planned


def test_everything_is_in_the_cut_and_the_questions_are_the_scene_s_own() -> None:
    made, seed = list(wide_scenes("held-out", 60, width=128)), 0
    kinds = set()
    for image, questions in made:
        while not np.array_equal(make_scene(seed, "held-out", 128).image[32:96], image):
            seed += 1
        plan, asked = planned(seed, "held-out")
        assert set(questions) <= set(asked)
        assert plan.chart is None
        for thing in plan.things:
            assert thing.y - thing.radius > 0.25
            assert thing.y + thing.radius < 0.75
        if plan.lettering:
            half = plan.lettering.extent[1] / 2
            assert plan.lettering.y - half > 0.25
            assert plan.lettering.y + half < 0.75
        assert len(plan.things) < 2 or "describe" not in {question.kind for question in questions}
        kinds |= {question.kind for question in questions}
        seed += 1
    assert {"colour", "kind", "count", "presence", "reading", "describe"} <= kinds
    assert "position" not in kinds


def test_no_question_is_about_a_place_in_the_whole() -> None:
    texts = [f"{q.prompt} {q.answer}" for _, questions in wide_scenes("train", 200, width=32) for q in questions]
    places = [text for text in texts if "top" in text or "bottom" in text or "middle" in text or "corner" in text]
    assert not places
    assert len(texts) > 400


def test_the_files(tmp_path, capsys) -> None:
    main([str(tmp_path / "out"), "--split", "held-out", "--count", "3", "--side", "64", "--wide"])
    assert "3 pictures" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "0002.png") as picture:
        assert picture.size == (64, 32)
    lines = [json.loads(line) for line in (tmp_path / "out" / "questions.jsonl").read_text().splitlines()]
    assert {line["image"] for line in lines} == {"0000.png", "0001.png", "0002.png"}
