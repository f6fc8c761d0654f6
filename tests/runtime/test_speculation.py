"""A draft proposes: greedy answers stay what they are, with fewer passes of the model that decides."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from mlx.utils import tree_flatten

from fastvlm_mlx import FastVLM, load
from fastvlm_mlx.cache import PrefixCache
from fastvlm_mlx.decoder import Decoder, build_network
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import ContextLengthError, EncoderError, InputError
from fastvlm_mlx.pictures import Vision
from support.seeded import SPEAKING
from support.work import counted

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


@pytest.fixture(scope="module")
def shallow(model) -> FastVLM:
    """The first block alone."""
    whole = model(SPEAKING)
    config = replace(whole.config.decoder, num_hidden_layers=1)
    network = build_network(config)
    tensors = tree_flatten(whole.decoder.network.parameters())
    network.load_weights([(name, tensor) for name, tensor in tensors if "layers.1." not in name])
    vision = whole.engine.vision
    engine = Engine(Decoder(network, config), Vision(vision.encoder, vision.projector, 0), PrefixCache(0))
    return FastVLM(replace(whole.config, decoder=config), engine, whole.tokenizer, 256)


def test_a_draft_of_another_shape(speaking_model, shallow, forgetful):
    progress = []
    found = speaking_model.generate(
        PHOTO,
        "What is this?",
        draft=shallow,
        progress=lambda *reported: progress.append(reported),
        **OPTIONS,
    )
    right = forgetful(speaking_model).generate(PHOTO, "What is this?", **OPTIONS)
    assert found.token_ids == right.token_ids
    assert progress
    assert progress == sorted(set(progress)), "the draft's prefill isn't reported"


def test_what_a_draft_lacks_is_told_before_anything_is_computed(speaking_model, shallow):
    whole = speaking_model.engine
    blind = FastVLM(
        shallow.config,
        Engine(shallow.decoder, Vision(None, whole.vision.projector, 0), PrefixCache(0)),
        speaking_model.tokenizer,
        256,
    )
    short = FastVLM(replace(shallow.config, context_length=20), shallow.engine, speaking_model.tokenizer, 256)
    few = replace(shallow.config, decoder=replace(shallow.config.decoder, vocab_size=5))
    narrow = FastVLM(few, shallow.engine, speaking_model.tokenizer, 256)
    for draft, error, match in (
        (blind, EncoderError, "draft has no vision weights"),
        (short, ContextLengthError, "context is 20"),
        (narrow, InputError, "the draft knows 5"),
        ("fastvlm-0.5b", InputError, "must be a loaded model, got 'fastvlm-0.5b'"),
    ):
        with counted(speaking_model) as work, pytest.raises(error, match=match):
            speaking_model.generate(PHOTO, "Hi", draft=draft, **OPTIONS)
        assert (work.images, work.rows) == (0, 0)
    right = speaking_model.generate(None, "Hi", **OPTIONS)
    assert speaking_model.generate(None, "Hi", draft=blind, **OPTIONS).token_ids == right.token_ids


def test_what_does_not_go_together(speaking_model, model, draft):
    with pytest.raises(InputError, match="same tokenizer"):
        speaking_model.generate(PHOTO, "Hi", draft=model("tiny"))
    for more in ({"kv_bits": 8}, {"max_kv_size": 500}, {"repetition_penalty": 1.2}):
        with pytest.raises(InputError, match="doesn't go together"):
            speaking_model.generate(PHOTO, "Hi", draft=draft, **more)
