"""Decoding: what ends an answer, sampling, streaming, limits."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_convert.pipeline import convert
from fastvlm_mlx import load
from fastvlm_mlx.errors import ContextLengthError, EncoderError, InputError, PromptError, ResolutionError
from fastvlm_mlx.generation import generate_tokens
from fastvlm_mlx.types import GenerationOptions
from support.layouts import to_apple_mlx
from support.seeded import golden_prompt

PHOTO = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
ASK = "What is this?"


def test_stop_ids_end_the_answer(model, monkeypatch):
    """The golden answer's third id is made a stop id: two tokens of answer, and the one that ended it."""
    prompt, tiny = golden_prompt("tiny", "one image"), model("tiny")
    monkeypatch.setattr(tiny, "stop_ids", {prompt.greedy_ids[2]})
    result = tiny.generate(prompt.images, prompt.ids, max_tokens=24)
    assert list(result.token_ids) == prompt.greedy_ids[:3]
    assert result.finish_reason == "stop"
    ignored = tiny.generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
    assert list(ignored.token_ids) == prompt.greedy_ids
    assert ignored.finish_reason == "length"


def test_all_known_stop_ids_are_heeded(speaking_model, model):
    """The config's, and the tokenizer's ends of turn and of text, whichever of them a config forgets."""
    assert speaking_model.stop_ids >= {speaking_model.tokenizer.special_id(t) for t in ("<|im_end|>", "<|endoftext|>")}
    assert set(model("tiny").config.eos_token_ids) <= model("tiny").stop_ids


def test_stop_strings_end_the_answer(speaking_model):
    whole = speaking_model.generate(PHOTO, ASK, max_tokens=20)
    stop = whole.text[6:9]
    cut = speaking_model.generate(PHOTO, ASK, max_tokens=20, stop=stop)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert cut.generation_tokens < whole.generation_tokens
    pieces = list(speaking_model.stream(PHOTO, ASK, max_tokens=20, stop=["never said", stop]))
    assert "".join(piece.text for piece in pieces) == cut.text


def test_streaming_is_generating(speaking_model):
    pieces = list(speaking_model.stream(PHOTO, ASK, max_tokens=12))
    result = speaking_model.generate(PHOTO, ASK, max_tokens=12)
    assert [p.token_id for p in pieces[:-1]] == list(result.token_ids)
    assert "".join(p.text for p in pieces) == result.text == pieces[-1].result.text == str(result)
    assert all(p.result is None for p in pieces[:-1])


def test_a_tokenizer_limits_what_can_be_said(speaking_model):
    """Rows that pad the embedding beyond the tokenizer are never sampled, as in the official code."""
    assert (
        speaking_model.decoder.vocab_limit == speaking_model.tokenizer.size < speaking_model.config.decoder.vocab_size
    )
    options = {"temperature": 50.0, "max_tokens": 100, "ignore_eos": True, "seed": 0}
    result = speaking_model.generate(None, ASK, **options)
    assert max(result.token_ids) < speaking_model.tokenizer.size
    assert len(set(result.token_ids)) > 50  # so hot that anything allowed is said


def test_seed(model):
    prompt, tiny = golden_prompt("tiny", "text"), model("tiny")

    def sample(seed: int, **more: float) -> tuple[int, ...]:
        options = {"temperature": 1.0, "max_tokens": 16, "ignore_eos": True} | more
        return tiny.generate(None, prompt.ids, seed=seed, **options).token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    greedy = tuple(prompt.greedy_ids[:16])
    assert sample(1) != greedy
    for restricted in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert sample(1, **restricted) == greedy
    assert sample(1, top_k=10_000) == sample(1)  # more than the vocabulary: keeps everything


def test_sampling_follows_the_temperature(model):
    """First tokens of many seeds against the softmax of the golden logits."""
    prompt, tiny = golden_prompt("tiny", "text"), model("tiny")
    logits = prompt.first_logits.astype(np.float64) / 2.0
    right = np.exp(logits - logits.max())
    right /= right.sum()
    best = int(right.argmax())
    row, options = mx.array(prompt.first_logits)[None], GenerationOptions(temperature=2.0)
    mx.random.seed(7)
    draws = [next(generate_tokens(tiny.decoder, row, list, [], options, 1)) for _ in range(2000)]
    share = draws.count(best) / len(draws)
    assert abs(share - right[best]) < 4 * np.sqrt(right[best] / len(draws))  # four standard deviations


def test_repetition_penalty_sees_prompt_and_answer(model):
    """The token that a prompt ends with, or that was said, is no longer the likeliest."""
    prompt, tiny = golden_prompt("tiny", "text"), model("tiny")
    first = prompt.greedy_ids[0]
    row = mx.array(prompt.first_logits)[None]
    heavy = GenerationOptions(repetition_penalty=1e6)
    assert next(generate_tokens(tiny.decoder, row, list, [5], heavy, 1)) == first
    assert next(generate_tokens(tiny.decoder, row, list, [5, first], heavy, 1)) != first
    result = tiny.generate(None, prompt.ids, max_tokens=16, repetition_penalty=1e6, ignore_eos=True)
    assert len(set(result.token_ids)) == 16
    assert not set(result.token_ids[:4]) & set(prompt.ids[-16:])
    off = tiny.generate(None, prompt.ids, max_tokens=16, repetition_penalty=1.0, ignore_eos=True)
    assert list(off.token_ids) == prompt.greedy_ids[:16]


def test_repetition_penalty_with_an_image(model):
    prompt, tiny = golden_prompt("tiny", "one image"), model("tiny")
    result = tiny.generate(prompt.images, prompt.ids, max_tokens=8, repetition_penalty=1e6, ignore_eos=True)
    assert len(set(result.token_ids)) == 8


def test_the_context_ends_the_answer(model, monkeypatch):
    prompt, tiny = golden_prompt("tiny", "one image"), model("tiny")  # 36 positions
    monkeypatch.setattr(tiny, "config", dataclasses.replace(tiny.config, context_length=40))
    result = tiny.generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
    assert list(result.token_ids) == prompt.greedy_ids[:4]
    assert result.finish_reason == "length"
    monkeypatch.setattr(tiny, "config", dataclasses.replace(tiny.config, context_length=36))
    with pytest.raises(ContextLengthError, match="36 positions"):
        tiny.generate(prompt.images, prompt.ids)


def test_timings_add_up(speaking_model):
    speaking_model.clear_cache()
    result = speaking_model.generate(PHOTO, ASK, max_tokens=8, ignore_eos=True)
    times = result.timings
    assert result.cached_tokens == 0
    stages = (
        times.preprocess,
        times.vision,
        times.projector,
        times.tokenize,
        times.prefill,
        times.first_token,
    )
    assert all(seconds > 0 for seconds in stages)
    assert 0.9 * times.ttft <= sum(stages) <= times.ttft
    assert times.total >= times.ttft + times.decode
    assert result.generation_tps == pytest.approx(7 / times.decode)
    assert result.prompt_tps == pytest.approx(result.prompt_tokens / times.prefill)
    assert result.peak_memory > 0
    text_only = speaking_model.generate(None, ASK, max_tokens=1)
    assert (text_only.timings.vision, text_only.timings.projector, text_only.image_tokens) == (0, 0, 0)
    assert text_only.generation_tps == 0


def test_resolution_and_aspect_per_call(speaking_model):
    at_256 = speaking_model.encode_image(PHOTO)
    at_128 = speaking_model.encode_image(PHOTO, resolution=128)
    assert (at_256.features.shape[0], at_128.features.shape[0]) == (16, 4)
    padded, cropped = (speaking_model.encode_image(PHOTO, aspect=a).features for a in ("pad", "crop"))
    assert np.abs(np.array(padded) - np.array(cropped)).max() > 1e-2
    assert speaking_model.generate(PHOTO, ASK, resolution=512, max_tokens=1).image_tokens == 64


def test_a_bundle_without_a_tokenizer_takes_ids_only(model):
    with pytest.raises(PromptError, match="no tokenizer; give the prompt as token ids"):
        model("tiny").generate(None, ASK)
    assert model("tiny").generate(None, [1, 2, 3], max_tokens=2).text == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"min_p": 2.0}, "min_p must be in"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"stop": ["ok", ""]}, "stop must be made of non-empty strings"),
        ({"max_tokens": 2.5}, "max_tokens must be a whole number, got 2.5"),
        ({"top_k": 2.0}, "top_k must be a whole number"),
        ({"seed": -1}, "seed must be in"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
    ],
)
def test_bad_options(speaking_model, options, message):
    with pytest.raises(InputError, match=message):
        speaking_model.generate(None, ASK, **options)


def test_bad_input_is_found_before_anything_is_computed(speaking_model, monkeypatch):
    def never(*_: object) -> None:
        raise AssertionError("the encoder ran")

    monkeypatch.setattr(speaking_model.engine.vision.encoder, "encode", never)
    with pytest.raises(PromptError):
        speaking_model.generate(PHOTO, "<image><image>")
    with pytest.raises(PromptError):
        speaking_model.generate([PHOTO, PHOTO], "only <image>")
    with pytest.raises(PromptError):
        speaking_model.generate(None, "no <image> here")
    with pytest.raises(ResolutionError):
        speaking_model.generate(PHOTO, ASK, resolution=1000)
    with pytest.raises(ContextLengthError):
        speaking_model.generate(PHOTO, "word " * 9000)


def test_a_bundle_without_vision_weights(checkpoint, tmp_path):
    folder = convert(to_apple_mlx(checkpoint("tiny"), tmp_path / "apple"), tmp_path / "bundle").path
    text_only = load(folder)
    with pytest.raises(EncoderError, match="no vision weights"):
        text_only.generate(PHOTO, [1, -200])
    with pytest.raises(EncoderError, match="no vision weights"):
        load(folder, vision="mlx")
