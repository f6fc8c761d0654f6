"""A draft proposes: greedy answers stay what they are, with fewer passes of the model that decides."""

from __future__ import annotations

import numpy as np
import pytest

from fastvlm_mlx import load
from fastvlm_mlx.errors import InputError
from support.seeded import SPEAKING

PHOTO = np.random.default_rng(3).integers(0, 256, (90, 120, 3), np.uint8)
OPTIONS = {"max_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def draft(bundle):
    """The same model in 4 bits: right often, not always."""
    return load(bundle(SPEAKING), quantize=4)


@pytest.mark.parametrize("proposed", [1, 3, 8])
def test_greedy_answers_stay_the_same(speaking_model, forgetful, draft, proposed, monkeypatch):
    right = forgetful(speaking_model).generate(PHOTO, "What is this?", **OPTIONS)
    speaking_model.clear_cache()
    draft.clear_cache()
    passes = []
    backbone = type(speaking_model.decoder).__call__

    def watched(self, ids, cache=None):
        if self is speaking_model.decoder:
            passes.append(ids.shape[1])
        return backbone(self, ids, cache)

    monkeypatch.setattr(type(speaking_model.decoder), "__call__", watched)
    found = speaking_model.generate(PHOTO, "What is this?", draft=draft, num_draft_tokens=proposed, **OPTIONS)
    assert found.token_ids == right.token_ids
    assert max(passes) == proposed + 1
    assert len(passes) < 23, "some proposals were accepted"
    assert sum(passes) > 23, "some were not"


def test_rows_of_refused_proposals_are_gone(speaking_model, forgetful, draft):
    """What both keep is what was said: the next question goes on from there."""
    speaking_model.clear_cache()
    chat = speaking_model.chat(PHOTO)
    first = chat.ask("What is this?", draft=draft, **OPTIONS)
    scratch = forgetful(speaking_model).chat(PHOTO)
    assert scratch.ask("What is this?", **OPTIONS).token_ids == first.token_ids
    second = chat.ask("And where?", draft=draft, **OPTIONS)
    assert second.token_ids == scratch.ask("And where?", **OPTIONS).token_ids
    assert second.cached_tokens >= first.prompt_tokens + 20
    one = speaking_model.generate(PHOTO, "What is this?", draft=draft, max_tokens=1, ignore_eos=True)
    assert one.token_ids == first.token_ids[:1]


def test_stopping_in_the_middle(speaking_model, forgetful, draft):
    speaking_model.clear_cache()
    stream = speaking_model.stream(PHOTO, "What is this?", draft=draft, **OPTIONS)
    said = [next(stream).token_id for _ in range(5)]
    stream.close()
    whole = forgetful(speaking_model).generate(PHOTO, "What is this?", **OPTIONS)
    assert tuple(said) == whole.token_ids[:5]
    assert speaking_model.generate(PHOTO, "What is this?", **OPTIONS).token_ids == whole.token_ids


def test_sampling_with_a_draft_repeats_with_a_seed(speaking_model, draft):
    def sample(seed):
        return speaking_model.generate(PHOTO, "Hi", draft=draft, temperature=1.0, seed=seed, **OPTIONS).token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_what_does_not_go_together(speaking_model, model, draft):
    with pytest.raises(InputError, match="same tokenizer"):
        speaking_model.generate(PHOTO, "Hi", draft=model("tiny"))
    for more in ({"kv_bits": 8}, {"max_kv_size": 500}, {"repetition_penalty": 1.2}):
        with pytest.raises(InputError, match="doesn't go together"):
            speaking_model.generate(PHOTO, "Hi", draft=draft, **more)
