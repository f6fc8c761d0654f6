"""The whole model against what the official code computes from the same weights."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_mlx import load
from fastvlm_mlx.prefill import embed, prefill
from support.seeded import PRESETS, PROMPTS, SIZES, golden, golden_prompt, relative_l2

# float32 on both sides, sums in another order: 1e-6 to 4e-6 is what comes out (tiny-hot the highest).
FEATURE_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 1e-5


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", SIZES)
def test_features(model, preset, size):
    data = golden(preset)
    found = model(preset).engine.vision.encoder.encode(data[f"pixels_{size}"][None])
    assert found.shape == (1, *data[f"features_{size}"].shape)
    assert relative_l2(found[0], data[f"features_{size}"]) <= FEATURE_TOLERANCE


@pytest.mark.parametrize("preset", PRESETS)
def test_projection(model, preset):
    data = golden(preset)
    encoded = model(preset).encode_image(data["pixels_256x256"])
    assert encoded.size == (256, 256)
    assert relative_l2(encoded.features, data["features_256x256"]) <= FEATURE_TOLERANCE
    assert relative_l2(encoded.embeddings, data["projected_256x256"]) <= FEATURE_TOLERANCE


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_ids(model, preset, kind):
    prompt = golden_prompt(preset, kind)
    result = model(preset).generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
    assert list(result.token_ids) == prompt.greedy_ids
    assert result.image_tokens == 16 * len(prompt.images)
    assert result.prompt_tokens == len(prompt.ids) + 15 * len(prompt.images)


@pytest.mark.parametrize("step", [2048, 16, 1])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_first_logits(model, preset, kind, step):
    """Also in steps: a chunked prefill is the same prefill."""
    prompt, fastvlm = golden_prompt(preset, kind), model(preset)
    images = [fastvlm.encode_image(image).embeddings for image in prompt.images]
    spans = fastvlm.expand(prompt.ids, [len(image) for image in images])
    cache = fastvlm.decoder.new_cache()
    logits = prefill(fastvlm.decoder, embed(fastvlm.decoder, spans, images), cache, step)
    assert relative_l2(logits[0], prompt.first_logits) <= LOGIT_TOLERANCE
    assert all(entry.offset == sum(len(span) for span in spans) for entry in cache)


# 8 bits of mantissa through all blocks: PyTorch's bfloat16 gives 2.3e-2 on the full-size encoder. tiny-hot's
# stage 5 adds to a residual stream of 1e5, so what is rounded off there weighs more.
@pytest.mark.parametrize(("preset", "tolerance"), [("tiny", 3e-2), ("tiny-untied", 3e-2), ("tiny-hot", 1e-1)])
def test_bfloat16_encoder_stays_in_range(bundle, preset, tolerance):
    """The default on a GPU has float32's range: tiny-hot, which overflows float16, stays finite."""
    data = golden(preset)
    features = load(bundle(preset), vision_dtype="bfloat16").encode_image(data["pixels_256x256"]).features
    assert features.dtype == mx.bfloat16
    assert np.isfinite(np.array(features.astype(mx.float32))).all()
    assert 1e-3 < relative_l2(features.astype(mx.float32), data["features_256x256"]) <= tolerance
