"""The stages of the training: what each trains, by which losses and on which pictures."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from nano.schedule import STAGES


def test_the_stages_train_these_parts_by_these_losses():
    whole = {"early", "late", "projector", "decoder", "heads"}
    assert [(s.name, set(s.rates), s.answers, s.heads > 0, s.dense > 0) for s in STAGES] == [
        ("encoder", {"early", "late", "heads"}, False, True, True),
        ("projector", {"projector", "decoder"}, True, False, False),
        ("everything", whole, True, True, True),
        ("readers", {"projector", "decoder", "heads"}, True, True, True),
        ("signs", whole, True, True, True),
        ("shapes", whole - {"heads"}, True, False, False),
    ]


def test_pages_teach_the_encoder_and_signs_and_shapes_the_last_stages():
    shares = {stage.name: (stage.pages, stage.signs, stage.shapes) for stage in STAGES}
    assert shares == {
        "encoder": (0.6, 0.0, 0.0),
        "projector": (0.0, 0.0, 0.0),
        "everything": (0.3, 0.0, 0.0),
        "readers": (0.0, 0.4, 0.0),
        "signs": (0.0, 0.4, 0.0),
        "shapes": (0.0, 0.2, 0.3),
    }


@pytest.mark.parametrize(("model", "side"), [(320, 256), (256, 192), (128, 128), (64, 64)])
def test_smaller_pictures_are_what_the_encoder_can_have(model, side):
    assert STAGES[0].side(model) == side
    assert STAGES[-1].side(model) == model
