"""LLaMA decoders and LLaVA's projectors, against NumPy in float64 and against themselves in all ways of asking."""

from __future__ import annotations

import dataclasses
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_convert.options import Options
from fastvlm_convert.pipeline import convert
from fastvlm_mlx import FastVLM, load
from fastvlm_mlx.bundle import Bundle, read_tensors
from fastvlm_mlx.config import DecoderConfig, ModelConfig, ProjectorConfig, from_dict
from fastvlm_mlx.decoder import FAMILIES, build_network
from fastvlm_mlx.errors import ConfigError, WeightsError
from fastvlm_mlx.loading import assemble
from fastvlm_mlx.prefill import embed, prefill
from support.llama import Reference, Shape, projector_names, write_llama
from support.seeded import golden, relative_l2

# float32 against float64 through two blocks: measured 4e-7 to 3e-6. RMSNorm's epsilon 1e-6 for 1e-5 gives 2.2e-5 and
# more, Qwen2's base of the rotations, 1e6 for 1e4, at least 0.2.
TOLERANCE = 1e-5
SHAPES = {
    "vicuna": Shape(),
    "linear": Shape(projector="linear"),
    "mlp1x_gelu": Shape(projector="mlp1x_gelu", tied=True),
    "mlp3x_gelu": Shape(projector="mlp3x_gelu", kv_heads=2),
    "identity": Shape(projector="identity"),
    "biases": Shape(attention_bias=True, mlp_bias=True),
    "attention biases": Shape(attention_bias=True),
    "stretched": Shape(rope_scaling={"type": "linear", "factor": 2.0}),
}
IDS = [1, 17, 300, 999, 5, 5, 64]
PIXELS = golden("tiny")["pixels_128x128"]  # 4 positions
GREEDY = {"max_tokens": 8, "ignore_eos": True, "resolution": 128}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Name of SHAPES -> its checkpoint, written once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = write_llama(tmp_path_factory.mktemp("llama") / "source", SHAPES[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def models(sources, tmp_path_factory):
    """Name of SHAPES -> its model."""
    made = {}

    def get(name) -> FastVLM:
        if name not in made:
            made[name] = load(convert(sources(name), tmp_path_factory.mktemp("bundles") / "bundle").path)
        made[name].clear_cache()
        return made[name]

    return get


def first_logits(model: FastVLM, ids: list[int], images: list[mx.array]) -> np.ndarray:
    spans = model.expand(ids, [len(image) for image in images])
    return np.array(prefill(model.decoder, embed(model.decoder, spans, images), model.decoder.new_cache())[0])


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_ids(sources, models, name):
    """From the encoder's features on: projector, decoder, greedy ids."""
    model, reference = models(name), Reference(sources(name))
    seen = model.encode_image(PIXELS, resolution=128)
    embeddings = reference.project(np.array(seen.features))
    assert relative_l2(seen.embeddings, embeddings) <= TOLERANCE
    before, after = IDS[:3], IDS[3:]
    rows = np.concatenate([reference.embed(before), embeddings, reference.embed(after)])
    assert relative_l2(first_logits(model, IDS, []), reference.logits(reference.embed(IDS))) <= TOLERANCE
    found = first_logits(model, [*before, -200, *after], [seen.embeddings])
    assert relative_l2(found, reference.logits(rows)) <= TOLERANCE
    answer = model.generate(PIXELS, [*before, -200, *after], **GREEDY)
    assert list(answer.token_ids) == reference.greedy(rows, 8)


def test_the_shapes_differ(sources):
    """Else a setting that is read and then forgotten would pass."""
    logits = {n: Reference(sources(n)).logits(Reference(sources(n)).embed(IDS)) for n in SHAPES if n != "identity"}
    same = {frozenset((a, b)) for a in logits for b in logits if a < b and relative_l2(logits[a], logits[b]) < 1e-3}
    assert same == {frozenset(("vicuna", "linear"))}  # they differ in the projector only


def test_config(models, sources):
    config = models("vicuna").config
    assert (config.template, config.eos_token_ids, config.context_length) == ("vicuna_v1", (2,), 2048)
    decoder = config.decoder
    assert (decoder.model_type, decoder.rope_theta, decoder.rms_norm_eps) == ("llama", 10_000.0, 1e-5)
    assert not any((decoder.qkv_bias, decoder.output_bias, decoder.mlp_bias, decoder.tie_word_embeddings))
    assert models("stretched").config.decoder.rope_factor == 2.0
    assert models("mlp1x_gelu").config.decoder.tie_word_embeddings


def test_every_way_of_asking(models):
    """From the cache, together with others, in steps, in a cache that forgets: the same ids."""
    model, ids = models("vicuna"), [*IDS[:3], -200, *IDS[3:]]
    plain = model.generate(PIXELS, ids, **GREEDY)
    again = model.generate(PIXELS, [*ids, 7], **GREEDY)
    assert again.cached_tokens == plain.prompt_tokens
    model.clear_cache()
    assert model.generate(PIXELS, [*ids, 7], **GREEDY).token_ids == again.token_ids
    model.clear_cache()
    assert model.generate(PIXELS, ids, **GREEDY, prefill_step_size=3).token_ids == plain.token_ids
    other = model.generate(None, IDS, **GREEDY)
    together = model.batch([PIXELS, None, PIXELS], [ids, IDS, [*ids, 7]], **GREEDY)
    assert [r.token_ids for r in together] == [plain.token_ids, other.token_ids, again.token_ids]
    assert model.generate(PIXELS, ids, **GREEDY, max_kv_size=64).token_ids == plain.token_ids
    eight = model.generate(PIXELS, ids, **GREEDY, kv_bits=8)
    assert eight.token_ids[0] == plain.token_ids[0]


def test_prefixes_go_from_process_to_process(models, tmp_path):
    model = models("vicuna")
    plain = model.generate(None, IDS, **GREEDY)
    model.save_prefix(tmp_path / "known")
    model.clear_cache()
    model.load_prefix(tmp_path / "known")
    again = model.generate(None, IDS, **GREEDY)
    assert (again.cached_tokens, again.token_ids) == (len(IDS) - 1, plain.token_ids)


@pytest.mark.parametrize("name", ["vicuna", "linear", "mlp1x_gelu", "mlp3x_gelu", "identity", "biases"])
def test_quantised_with_its_projector(sources, tmp_path, name):
    """What packed matrices answer is what the same values unpacked do; as many are packed as there are matrices."""
    options = Options(q_bits=8, quantize_projector=True)
    bundle = Bundle.open(convert(sources(name), tmp_path / "bundle", options).path)
    tensors = read_tensors(bundle.path / "decoder.safetensors")
    packed = {n.removesuffix(".scales") for n in tensors if n.endswith(".scales")}
    layers = projector_names(SHAPES[name].projector)
    assert {n for n in packed if n.startswith("projector.")} == {
        f"projector.linear_{i + 1}" for i in range(len(layers))
    }
    assert len(packed) == len(layers) + 2 * 7 + 1 + (not SHAPES[name].tied)  # blocks of 7, embedding, head
    ids = [*IDS[:3], -200, *IDS[3:]]
    answers = [assemble(bundle, unpack=unpack).generate(PIXELS, ids, **GREEDY).token_ids for unpack in (True, False)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_when_loaded(models, sources, tmp_path, bits):
    path = convert(sources("vicuna"), tmp_path / "bundle").path
    answer = load(path, quantize=bits).generate(None, IDS, **GREEDY)
    assert answer.generation_tokens == 8
    if bits == 8:  # close enough to the plain weights to begin as they do
        assert answer.token_ids[0] == models("vicuna").generate(None, IDS, **GREEDY).token_ids[0]


def test_unknown_ones_are_named():
    decoder = DecoderConfig(128, 256, 2, 4, 4, 1024, tie_word_embeddings=False, qkv_bias=False)
    with pytest.raises(ConfigError, match="'mamba'; this version knows qwen2, llama"):
        build_network(dataclasses.replace(decoder, model_type="mamba"))
    with pytest.raises(ConfigError, match=r"are \(False, False, False\); qwen2 has one of \(True, False, False\)"):
        build_network(decoder)
    with pytest.raises(ConfigError, match=r"are \(True, False, False\); llama has one of"):
        build_network(dataclasses.replace(decoder, model_type="llama", qkv_bias=True))
    with pytest.raises(ConfigError, match="rope_factor must be above 0, got 0"):
        dataclasses.replace(decoder, rope_factor=0.0)
    for kind in ("resampler", "mlp0x_gelu", "mlpx_gelu", "mlp2x_gelu_", "Linear"):
        with pytest.raises(ConfigError, match=f"'{kind}'; this version knows linear, mlpNx_gelu .*, identity"):
            ProjectorConfig(512, 128, kind)
    with pytest.raises(ConfigError, match="passes 512 channels on, and the decoder takes 128; the two must be equal"):
        ProjectorConfig(512, 128, "identity")
    assert [ProjectorConfig(8, 8, f"mlp{n}x_gelu").depth for n in (1, 2, 12)] == [1, 2, 12]
    assert set(FAMILIES) == {"qwen2", "llama"}


def test_weights_of_another_projector_are_refused(sources, tmp_path):
    source = shutil.copytree(sources("mlp3x_gelu"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    for kind, message in (
        ("mlp2x_gelu", r"unexpected \(2\): model.mm_projector.4.bias, model.mm_projector.4.weight"),
        ("mlp4x_gelu", r"missing \(2\): model.mm_projector.6.bias, model.mm_projector.6.weight"),
        ("linear", r"missing \(2\): model.mm_projector.bias, model.mm_projector.weight"),
    ):
        (source / "config.json").write_text(json.dumps(config | {"mm_projector_type": kind}))
        with pytest.raises(WeightsError, match=message):
            convert(source, tmp_path / "bundle")


def test_an_older_bundle_is_qwen2_in_chatml(model):
    """Its config has none of the keys that came with LLaMA."""
    config = json.loads(model("tiny").config.to_json())
    older = json.loads(json.dumps(config))
    for key in ("rope_factor", "qkv_bias", "output_bias", "mlp_bias"):
        del older["decoder"][key]
    for key in ("template", "prefix_after_special"):
        del older[key]
    assert from_dict(ModelConfig, older, "config.json") == model("tiny").config
    assert model("tiny").config.template == "chatml"
