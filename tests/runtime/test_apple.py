"""On a Mac's GPU: `pytest -m apple`."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_convert.options import Options
from fastvlm_convert.pipeline import convert
from fastvlm_mlx import load
from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.loading import assemble
from fastvlm_mlx.prefill import embed, prefill
from fastvlm_mlx.vision.coreml_runtime import COMPUTE_UNITS
from support.seeded import PRESETS, PROMPTS, golden, golden_prompt, relative_l2

pytestmark = pytest.mark.apple

# Metal sums in another order than the CPU, with fused multiply-add.
FLOAT32, BFLOAT16 = 1e-4, {"tiny": 3e-2, "tiny-untied": 3e-2, "tiny-hot": 1e-1}


def test_the_gpu_is_what_runs(bundle):
    assert load(bundle("tiny")).device == "vision: MLX (gpu), decoder: MLX (gpu)"


@pytest.mark.parametrize("preset", PRESETS)
def test_features(bundle, preset):
    data = golden(preset)
    for dtype, tolerance in (("float32", FLOAT32), (None, BFLOAT16[preset])):
        features = load(bundle(preset), vision_dtype=dtype).encode_image(data["pixels_256x256"]).features
        assert features.dtype == (mx.float32 if dtype else mx.bfloat16)
        assert relative_l2(features.astype(mx.float32), data["features_256x256"]) <= tolerance


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("preset", PRESETS)
def test_greedy_ids(bundle, preset, kind):
    prompt = golden_prompt(preset, kind)
    model = load(bundle(preset), dtype="float32", vision_dtype="float32")
    result = model.generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
    assert list(result.token_ids) == prompt.greedy_ids


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantised_kernels(checkpoint, tmp_path, bits):
    """Packed matrices stay packed on a GPU, and answer as their unpacked values do."""
    folder = convert(checkpoint("tiny"), tmp_path / "b", Options(dtype="float32", q_bits=bits)).path
    models = [assemble(Bundle.open(folder), unpack=unpack) for unpack in (None, True)]
    assert "scales" in models[0].decoder.network.model.layers[0].mlp.up_proj
    prompt = golden_prompt("tiny", "text")
    spans = models[0].expand(prompt.ids, [])
    packed, plain = (np.array(prefill(m.decoder, embed(m.decoder, spans, []), m.decoder.new_cache())) for m in models)
    assert relative_l2(packed, plain) <= FLOAT32


def test_core_ml_on_every_compute_unit(checkpoint, tmp_path):
    """The package itself, as `fastvlm-convert --verify` runs it here; its answers are those of the golden data."""
    pytest.importorskip("coremltools", reason="the convert extra isn't installed")
    from fastvlm_convert.coreml_vision import PackageOptions, Size
    from fastvlm_convert.vision_package import Gates

    package = PackageOptions(sizes=(Size(256, 256),))
    folder = convert(checkpoint("tiny"), tmp_path / "b", Options(package=package), gates=Gates(every_size=True)).path
    bundle = Bundle.open(folder)
    assert bundle.manifest.coreml
    ran = {check.executor for check in bundle.manifest.coreml.checks}
    assert {f"Core ML, {units}" for units in COMPUTE_UNITS} <= ran
    prompt = golden_prompt("tiny", "one image")
    model = load(folder, vision="coreml", dtype="float32")
    answer = model.generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
    assert answer.device.startswith("vision: Core ML (CPU and Neural Engine)")
    assert list(answer.token_ids) == prompt.greedy_ids
