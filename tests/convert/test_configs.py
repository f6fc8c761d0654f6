"""What a source's config, its spellings and its files decide, beyond what the published presets show."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_convert.configs import image_warning, read_config
from fastvlm_convert.keymap import LAYOUTS
from fastvlm_convert.pipeline import convert
from fastvlm_mlx import load
from fastvlm_mlx.bundle import Bundle, read_tensors
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import CheckpointError
from fastvlm_mlx.image import preprocess
from fastvlm_mlx.loading import assemble
from support.layouts import to_apple_mlx, to_mlx_vlm, to_transformers
from support.seeded import golden_prompt, relative_l2

ABSENT = object()  # a key to take out


def changed(raw: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in (raw | change).items() if value is not ABSENT}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def read(raw: dict[str, Any], layout: str = "llava", generation: dict[str, Any] | None = None) -> ModelConfig:
    known = {known.name: known for known in LAYOUTS}
    return read_config(raw, known[layout], "name", "config.json", generation or {})


def converted(source: Path, folder: Path, change: dict[str, Any]) -> Path:
    """Convert a copy of a checkpoint with some of its config changed."""
    copy = shutil.copytree(source, folder / "source")
    (copy / "config.json").write_text(json.dumps(changed(config_of(copy), change)))
    return convert(copy, folder / "bundle").path


@pytest.fixture(scope="module")
def nested(checkpoint, tmp_path_factory) -> str:
    """The text of a config in transformers' dialect."""
    source = to_transformers(checkpoint("tiny"), tmp_path_factory.mktemp("transformers") / "source")
    return (source / "config.json").read_text()


@pytest.mark.parametrize(
    ("change", "length"),
    [
        ({}, 8192),  # what the published configs say
        ({"tokenizer_model_max_length": 4096}, 4096),
        ({"tokenizer_model_max_length": 100_000}, 32768),  # max_position_embeddings
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 2.5}}, 5120),
        ({"tokenizer_model_max_length": None}, 8192),
        ({"tokenizer_model_max_length": ABSENT}, 8192),
    ],
)
def test_context_length(checkpoint, change, length):
    assert read(changed(config_of(checkpoint("tiny")), change)).context_length == length


@pytest.mark.parametrize(("positions", "length"), [(32768, 8192), (8193, 8192), (2048, 2048)])
def test_context_length_of_transformers(nested, positions, length):
    """Its configs leave tokenizer_model_max_length out."""
    raw = json.loads(nested)
    raw["text_config"]["max_position_embeddings"] = positions
    assert read(raw, "transformers").context_length == length


def test_the_context_of_the_config_ends_the_answer(checkpoint, tmp_path):
    folder = converted(checkpoint("tiny"), tmp_path, {"tokenizer_model_max_length": 40})
    prompt = golden_prompt("tiny", "one image")  # 36 positions
    answer = load(folder).generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
    assert list(answer.token_ids) == prompt.greedy_ids[:4]
    assert answer.finish_reason == "length"


@pytest.mark.parametrize(
    ("value", "aspect"),
    [("pad", "pad"), ("anyres", "pad"), (None, "crop"), (ABSENT, "crop"), ("square", "crop"), ("stretch", "crop")],
)
def test_aspect(checkpoint, value, aspect):
    """process_images of the official code: "pad" pads, and anything unknown is CLIP's centre crop."""
    assert read(changed(config_of(checkpoint("tiny")), {"image_aspect_ratio": value})).aspect == aspect


@pytest.mark.parametrize(
    ("value", "warned"),
    [("pad", False), ("square", False), (None, False), (ABSENT, False), ("anyres_max_9", True), ("stretch", True)],
)
def test_an_aspect_that_is_only_cropped_is_said(checkpoint, value, warned):
    """LLaVA's training cuts tiles for "anyres_max_9"; the official code's inference crops."""
    found = image_warning(changed(config_of(checkpoint("tiny")), {"image_aspect_ratio": value}), "config.json")
    assert bool(found) == warned
    if warned:
        assert f"image_aspect_ratio is {value!r}; images are cropped to their centre" in found


@pytest.mark.parametrize("written", [[[256, 512], [512, 256]], "[(256, 512), (512, 256),]", "[[256,512],[512,256]]"])
def test_anyres_with_grids(checkpoint, written):
    """Lists, or text, as LLaVA's training writes them."""
    config = config_of(checkpoint("tiny"))
    found = read(changed(config, {"image_aspect_ratio": "anyres", "image_grid_pinpoints": written}))
    assert (found.aspect, found.grid_pinpoints) == ("anyres", ((256, 512), (512, 256)))


@pytest.mark.parametrize("written", [[256, 512], "2x2", [[256]], 7, [[256.9, 512]], "[(1e999, 256)]", "[("])
def test_grids_that_are_none(checkpoint, written):
    with pytest.raises(CheckpointError, match="expected pairs of width and height in pixels"):
        read(changed(config_of(checkpoint("tiny")), {"image_grid_pinpoints": written}))


def test_aspect_of_transformers(nested):
    """Its configs don't say; the official predict.py pads."""
    assert read(json.loads(nested), "transformers").aspect == "pad"


@pytest.mark.parametrize(("value", "aspect"), [(None, "crop"), ("pad", "pad")])
def test_images_are_cut_as_the_config_says(checkpoint, tmp_path, monkeypatch, value, aspect):
    bundle = converted(checkpoint("tiny"), tmp_path, {"image_aspect_ratio": value})
    model = load(bundle, prefix_cache_bytes=0, feature_cache_bytes=0)  # every call encodes
    photo = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
    seen: list[np.ndarray] = []
    encode = model.engine.vision.encoder.encode

    def watched(pixels: np.ndarray) -> mx.array:
        seen.append(pixels[0])
        return encode(pixels)

    monkeypatch.setattr(model.engine.vision.encoder, "encode", watched)
    model.generate(photo, [1, -200, 2], max_tokens=1)
    model.generate(photo, [1, -200, 2], max_tokens=1, aspect=None)
    list(model.stream(photo, [1, -200, 2], max_tokens=1))
    model.encode_image(photo)
    model.batch([photo], [[1, -200, 2]], max_tokens=1)
    cuts = {name: preprocess(photo, 256, name) for name in ("pad", "crop", "stretch")}
    assert [[name for name in cuts if np.array_equal(pixels, cuts[name])] for pixels in seen] == [[aspect]] * 5
    seen.clear()
    for name, cut in cuts.items():  # a call may still choose another
        model.generate(photo, [1, -200, 2], max_tokens=1, aspect=name)
        np.testing.assert_array_equal(seen.pop(), cut)


STOPS = [
    # of the config, of generation_config.json, vocabulary -> read
    (151645, None, 151936, (151645, 151643)),  # as published
    (151643, None, 151936, (151643, 151645)),
    (ABSENT, None, 151936, (151645, 151643)),
    (2, [151643, 7], 151936, (2, 151643, 7, 151645)),
    (151645, None, 151646, (151645, 151643)),
    (2, None, 151645, (2, 151643)),  # the last id is 151644
    (2, 5, 1024, (2, 5)),
    (ABSENT, None, 1024, ()),
]


@pytest.mark.parametrize("layout", ["llava", "transformers"])
@pytest.mark.parametrize(("own", "generation", "vocabulary", "right"), STOPS)
def test_stop_ids(checkpoint, nested, layout, own, generation, vocabulary, right):
    """Qwen2's two are added where the vocabulary has them."""
    change = {"eos_token_id": own, "vocab_size": vocabulary}
    if layout == "llava":
        raw = changed(config_of(checkpoint("tiny")), change)
    else:
        raw = json.loads(nested)
        raw["text_config"] = changed(raw["text_config"], change)
    found = read(raw, layout, {} if generation is None else {"eos_token_id": generation}).eos_token_ids
    assert found == right


def quantised_pair(source: Path, folder: Path, bits: int, group: int) -> tuple[Path, Path]:
    """Apple's MLX layout twice: packed, and with the same values unpacked into float32."""
    packed, plain = (to_apple_mlx(source, folder / name) for name in ("packed", "plain"))
    tensors = mx.load(str(plain / "model.safetensors"))
    mx.eval(tensors)
    small, large = {}, {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            small[name] = large[name] = tensor
            continue
        weight, scales, biases = mx.quantize(tensor, group_size=group, bits=bits)
        stem = name.removesuffix("weight")
        small |= {name: weight, f"{stem}scales": scales, f"{stem}biases": biases}
        wide = (part.astype(mx.float32) for part in (scales, biases))
        large[name] = mx.dequantize(weight, *wide, group_size=group, bits=bits)
    mx.save_safetensors(str(packed / "model.safetensors"), small)
    mx.save_safetensors(str(plain / "model.safetensors"), large)
    config = config_of(packed) | {"quantization": {"group_size": group, "bits": bits}}
    (packed / "config.json").write_text(json.dumps(config))
    return packed, plain


@pytest.mark.parametrize("preset", ["tiny", "tiny-untied"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_quantised_sources_of_any_group_size(checkpoint, tmp_path, preset, bits, group):
    packed, plain = quantised_pair(checkpoint(preset), tmp_path, bits, group)
    opened = Bundle.open(convert(packed, tmp_path / "packed bundle").path)
    assert opened.config.quantization
    assert (opened.config.quantization.bits, opened.config.quantization.group_size) == (bits, group)
    assert read_tensors(opened.path / "decoder.safetensors")["model.norm.weight"].dtype == mx.float16
    right = load(convert(plain, tmp_path / "plain bundle").path)
    assert right.config.quantization is None
    ids, features = golden_prompt(preset, "text").ids, mx.random.normal((1, 4, 512), key=mx.random.key(0))
    logits = np.array(right.decoder(mx.array([ids])))
    answer = right.generate(None, ids, max_tokens=12, ignore_eos=True).token_ids
    # Packed and unpacked matmuls of the same values in float32: only the order of summation differs.
    for unpack, tolerance in ((True, 0.0), (False, 1e-5)):
        model = assemble(opened, unpack=unpack)
        assert relative_l2(model.decoder(mx.array([ids])), logits) <= tolerance
        assert (
            relative_l2(model.engine.vision.projector(features), np.array(right.engine.vision.projector(features)))
            <= tolerance
        )
        assert model.generate(None, ids, max_tokens=12, ignore_eos=True).token_ids == answer


LEGACY = (  # transformers before it nested everything in `model.`
    (r"model\.(vision_tower|multi_modal_projector)\.(.*)", r"\1.\2"),
    (r"model\.language_model\.image_newline", "image_newline"),
    (r"model\.language_model\.(.*)", r"language_model.model.\1"),
    (r"lm_head\.(.*)", r"language_model.lm_head.\1"),
)
BARE = ((r"(.*vision_tower)\.timm_model\.(.*)", r"\1.\2"),)
NEWLINE = ((r"model\.language_model\.image_newline", "model.image_newline"),)
LISTED = ((r"mm_projector\.(.*)", r"mm_projector.layers.\1"),)
SPELLINGS = {
    "transformers, legacy": (to_transformers, (LEGACY,), "tiny-untied"),
    "transformers, without timm_model": (to_transformers, (BARE,), "tiny-untied"),
    "transformers, legacy without timm_model": (to_transformers, (LEGACY, BARE), "tiny-untied"),
    "transformers, legacy, line break": (to_transformers, (LEGACY,), "tiny-newline"),
    "transformers, line break": (to_transformers, (NEWLINE,), "tiny-newline"),
    "mlx-vlm, listed projector": (to_mlx_vlm, (LISTED,), "tiny-untied"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_same_tensors_from_every_spelling(checkpoint, bundle, tmp_path, spelling):
    layout, passes, preset = SPELLINGS[spelling]
    source = layout(checkpoint(preset), tmp_path / "source")
    for rules in passes:
        respell(source / "model.safetensors", rules)
    result = convert(source, tmp_path / "bundle")
    assert Bundle.open(result.path).manifest.source.layout == spelling.partition(",")[0]
    for name in ("decoder.safetensors", "vision.safetensors"):
        found, right = read_tensors(result.path / name), read_tensors(bundle(preset) / name)
        assert found.keys() == right.keys()
        assert all(found[key].dtype == right[key].dtype for key in right)
        assert all(mx.array_equal(found[key], right[key]) for key in right)


def respell(path: Path, rules: Sequence[tuple[str, str]]) -> None:
    """Rename a file's tensors; each gets the name that the first matching rule makes of it."""
    tensors = mx.load(str(path))
    mx.eval(tensors)
    names = {n: next((re.sub(p, r, n) for p, r in rules if re.fullmatch(p, n)), n) for n in tensors}
    assert len(set(names.values())) == len(names) > len(tensors.keys() & names.values())
    mx.save_safetensors(str(path), {names[name]: tensor for name, tensor in tensors.items()})
