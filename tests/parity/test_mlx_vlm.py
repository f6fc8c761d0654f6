"""Our run time against mlx-vlm's fastvlm: same weights, float32, CPU.

Some tests show a fault there that ours must not have; when one fails, see whether mlx-vlm has cured it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from fastvlm_convert.export import export
from fastvlm_convert.options import Options
from fastvlm_convert.pipeline import convert
from fastvlm_mlx import FastVLM, load
from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.tokenizer import Tokenizer
from parity.ours import (
    FEATURE_TOLERANCE,
    GREEDY,
    LOGIT_TOLERANCE,
    QWEN2_05B,
    SIDE,
    first_logits,
    greedy_ids,
    published_shapes,
    unit_pixels,
)
from support.layouts import IMAGE_TOKEN, mlx_vlm_name
from support.seeded import GoldenPrompt, golden, golden_prompt, relative_l2
from support.tokenizers import with_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # their warnings are none of ours

TINY = {"layers": [1, 2, 2, 1, 1], "embed_dims": [16, 32, 64, 128, 256]}


@contextmanager
def tiny_shape() -> Iterator[None]:
    """Let mlx-vlm build the tiny shape.

    VisionConfig's `layers` and `embed_dims` have no annotation, so they are class attributes and no fields of
    the dataclass: what config.json says of them is silently ignored, and only the published shape can be had.
    """
    from mlx_vlm.models.fastvlm.config import VisionConfig

    with pytest.MonkeyPatch.context() as patch:
        for name, value in TINY.items():
            patch.setattr(VisionConfig, name, value)
        yield


@pytest.fixture(scope="session")
def load_theirs(timm_ready: None) -> Callable[[Path], Any]:
    """mlx-vlm's own loader, strict about names and shapes.

    It imports transformers, and that torchvision: hence `timm_ready`.
    """
    from mlx_vlm.utils import load_model

    def model_of(folder: Path) -> Any:
        with tiny_shape():
            model = load_model(folder)
        model.set_dtype(mx.float32)
        return model

    return model_of


@pytest.fixture(scope="session")
def theirs(load_theirs: Callable[[Path], Any], layouts: dict[str, Path]) -> Any:
    return load_theirs(layouts["mlx-vlm"])


def their_first_logits(prompt: GoldenPrompt, model: Any) -> np.ndarray:
    pixels = mx.array(unit_pixels(prompt.images)) if prompt.images else None
    output = model(mx.array([prompt.ids]), pixels, None)
    return np.array(output.logits[0, -1])


def their_greedy_ids(prompt: GoldenPrompt, model: Any) -> list[int]:
    from mlx_vlm.generate import generate_step

    pixels = mx.array(unit_pixels(prompt.images)) if prompt.images else None
    steps = generate_step(mx.array([prompt.ids]), model, pixels, None, max_tokens=GREEDY, temperature=0.0)
    return [int(token) for token, _ in islice(steps, GREEDY)]


def test_its_own_key_map_agrees_with_the_layout(
    load_theirs: Callable[[Path], Any], theirs: Any, layouts: dict[str, Path], tmp_path: Path
) -> None:
    """mlx-vlm reads LLaVA's tensors too, given the tiny shape in its own config."""
    shutil.copyfile(layouts["llava"] / "model.safetensors", tmp_path / "model.safetensors")
    shutil.copyfile(layouts["mlx-vlm"] / "config.json", tmp_path / "config.json")
    expected = dict(tree_flatten(load_theirs(tmp_path).parameters()))
    found = dict(tree_flatten(theirs.parameters()))
    assert found.keys() == expected.keys()
    assert all(mx.array_equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("side", [128, SIDE])
def test_features_and_embeddings(ours: Callable[[str], FastVLM], theirs: Any, preset: str, side: int) -> None:
    image = golden(preset)[f"pixels_{side}x{side}"]
    _, features, _ = theirs.vision_tower(mx.array(unit_pixels([image]).transpose(0, 2, 3, 1)))
    features = features.reshape(-1, features.shape[-1])
    found = ours("llava").encode_image(image, resolution=side)
    assert relative_l2(found.features, np.array(features)) <= FEATURE_TOLERANCE
    assert relative_l2(found.embeddings, np.array(theirs.mm_projector(features))) <= FEATURE_TOLERANCE


@pytest.mark.parametrize("kind", ["one image", "text"])
def test_first_logits_and_greedy_ids(ours: Callable[[str], FastVLM], theirs: Any, preset: str, kind: str) -> None:
    prompt = golden_prompt(preset, kind)
    expected = their_first_logits(prompt, theirs)
    assert relative_l2(first_logits(ours("llava"), prompt), expected) <= LOGIT_TOLERANCE
    assert greedy_ids(ours("llava"), prompt) == their_greedy_ids(prompt, theirs) == prompt.greedy_ids


def test_two_images_are_spliced_wrongly_there(ours: Callable[[str], FastVLM], theirs: Any, preset: str) -> None:
    """It splits the text at the images' places in the prompt, not in the text that is left without them."""
    prompt = golden_prompt(preset, "two images")
    assert relative_l2(first_logits(ours("llava"), prompt), prompt.first_logits) <= LOGIT_TOLERANCE
    assert relative_l2(their_first_logits(prompt, theirs), prompt.first_logits) > 0.05  # 0.10, 0.15
    assert greedy_ids(ours("llava"), prompt) == prompt.greedy_ids != their_greedy_ids(prompt, theirs)


def test_an_image_without_a_placeholder_is_ignored_there(
    ours: Callable[[str], FastVLM], theirs: Any, preset: str
) -> None:
    text, image = golden_prompt(preset, "text"), golden(preset)["pixels_256x256"]
    assert their_greedy_ids(GoldenPrompt([image], text.ids, text.first_logits, []), theirs) == text.greedy_ids
    with pytest.raises(PromptError, match="0 image sentinels"):
        ours("llava").generate([image], text.ids)


def test_an_image_id_in_the_config_hides_the_image_there(
    ours: Callable[[str], FastVLM], theirs: Any, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processor writes -200 for an image; its model looks for config.json's id: 151646 in exports."""
    prompt = golden_prompt(preset, "one image")
    pixels = mx.array(unit_pixels(prompt.images))
    expanded = theirs.get_input_embeddings(mx.array([prompt.ids]), pixels).inputs_embeds
    assert expanded.shape[1] == len(prompt.ids) - 1 + (SIDE // 64) ** 2
    monkeypatch.setattr(theirs.config, "image_token_index", IMAGE_TOKEN)
    without = theirs.get_input_embeddings(mx.array([prompt.ids]), pixels).inputs_embeds
    assert without.shape[1] == len(prompt.ids)  # -200 is looked up like a word's id, without an error


def test_apple_exports_do_not_load_there(
    ours: Callable[[str], FastVLM], load_theirs: Callable[[Path], Any], layouts: dict[str, Path], preset: str
) -> None:
    with pytest.raises(KeyError):
        load_theirs(layouts["apple-mlx"])
    prompt = golden_prompt(preset, "text")  # its FastViTHD is a Core ML package
    assert greedy_ids(ours("apple-mlx"), prompt) == prompt.greedy_ids


@pytest.mark.parametrize("bits", [4, 8])
def test_what_mlx_vlm_quantises_converts(
    load_theirs: Callable[[Path], Any], layouts: dict[str, Path], preset: str, bits: int, tmp_path: Path
) -> None:
    """As `mlx_vlm.convert -q` writes it: decoder and projector packed, FastViTHD not."""
    from mlx_vlm.quant_utils import quantize_model
    from mlx_vlm.utils import load_config, load_model, save_config, save_weights, skip_multimodal_module

    folder = tmp_path / "quantised"
    with tiny_shape():
        plain = load_model(layouts["mlx-vlm"])
    config = load_config(layouts["mlx-vlm"])
    packed, config = quantize_model(
        plain, config, 64, bits, quant_predicate=lambda path, _: not skip_multimodal_module(path)
    )
    save_weights(folder, packed)
    save_config(config, folder / "config.json")
    ours, theirs = load(convert(folder, tmp_path / "bundle").path), load_theirs(folder)
    for kind in ("one image", "text"):
        prompt = golden_prompt(preset, kind)
        assert relative_l2(first_logits(ours, prompt), their_first_logits(prompt, theirs)) <= LOGIT_TOLERANCE
        assert greedy_ids(ours, prompt) == their_greedy_ids(prompt, theirs)


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_what_we_write_for_it(
    load_theirs: Callable[[Path], Any], checkpoint: Callable[[str], Path], preset: str, tmp_path: Path, bits: int | None
) -> None:
    """It loads our folder, strictly, and its answers are those of the folder read back by us."""
    source = with_tokenizer(checkpoint(preset), tmp_path / "source", 1024)
    written = export(source, "mlx-vlm", tmp_path / "written", Options(q_bits=bits)).path
    theirs, ours = load_theirs(written), load(convert(written, tmp_path / "back").path)
    assert ("quantization" in json.loads((written / "config.json").read_text())) == (bits is not None)
    for kind in ("one image", "text"):
        prompt = golden_prompt(preset, kind)
        ids = their_greedy_ids(prompt, theirs)
        assert greedy_ids(ours, prompt) == ids
        assert bits or ids == prompt.greedy_ids


@pytest.mark.parametrize("kept", [None, "bfloat16"])
def test_what_we_write_of_a_bundle(
    load_theirs: Callable[[Path], Any], checkpoint: Callable[[str], Path], preset: str, tmp_path: Path, kept: str | None
) -> None:
    """FastViTHD lies folded there, in bfloat16 with biases that it has no place for; its own code computes the same."""
    source = with_tokenizer(checkpoint(preset), tmp_path / "source", 1024)
    bundle = convert(source, tmp_path / "bundle", Options(vision_dtype=kept)).path
    theirs = load_theirs(export(bundle, "mlx-vlm", tmp_path / "written").path)
    ours = load(bundle, dtype="float32", vision_dtype="float32")
    image = golden(preset)["pixels_256x256"]
    _, features, _ = theirs.vision_tower(mx.array(unit_pixels([image]).transpose(0, 2, 3, 1)))
    found = ours.encode_image(image, resolution=SIDE).features
    assert relative_l2(found, np.array(features).reshape(found.shape)) <= FEATURE_TOLERANCE
    for kind in ("one image", "text"):
        prompt = golden_prompt(preset, kind)
        ids = their_greedy_ids(prompt, theirs)
        assert greedy_ids(ours, prompt) == ids
        assert kept or ids == prompt.greedy_ids


def test_stretched_positions(
    load_theirs: Callable[[Path], Any], checkpoint: Callable[[str], Path], preset: str, tmp_path: Path
) -> None:
    """Linear rope scaling is applied there as here: other ids than without it, the same on both sides."""
    source = with_tokenizer(checkpoint(preset), tmp_path / "source", 1024)
    config = json.loads((source / "config.json").read_text())
    scaling = {"rope_type": "linear", "factor": 4.0}
    (source / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
    theirs = load_theirs(export(source, "mlx-vlm", tmp_path / "written").path)
    ours = load(convert(source, tmp_path / "bundle").path, dtype="float32", vision_dtype="float32")
    prompt = golden_prompt(preset, "one image")
    expected = their_first_logits(prompt, theirs)
    assert relative_l2(first_logits(ours, prompt), expected) <= LOGIT_TOLERANCE
    assert relative_l2(prompt.first_logits, expected) > 100 * LOGIT_TOLERANCE
    assert greedy_ids(ours, prompt) == their_greedy_ids(prompt, theirs)


def test_its_processor_takes_our_files(
    timm_ready: None, checkpoint: Callable[[str], Path], preset: str, tmp_path: Path
) -> None:
    """Its whole loader, tokenizer and image processor included: -200 for the image, ours for the text."""
    from mlx_vlm.utils import load as load_all
    from PIL import Image

    source = with_tokenizer(checkpoint(preset), tmp_path / "source", 1024)
    written = export(source, "mlx-vlm", tmp_path / "written").path
    with tiny_shape():
        model, processor = load_all(str(written))
    pixels = golden(preset)["pixels_256x256"]
    made = processor(images=[Image.fromarray(pixels)], text="<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n")
    text = Tokenizer(written / "tokenizer.json")
    start, end = text.special_id("<|im_start|>"), text.special_id("<|im_end|>")
    assert made["input_ids"].tolist() == [
        [start, *text.encode("user\n"), -200, *text.encode("\nWhat is it?"), end, *text.encode("\n")]
    ]
    assert np.array_equal(made["pixel_values"], unit_pixels([pixels]))
    messages = [{"role": "user", "content": "<image>\nHello"}]
    assert processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    assert model.config.image_token_index == -200


def test_published_names_and_shapes(timm_ready: None) -> None:
    """The full-size model, without values: what the converter wants is what mlx-vlm has."""
    from mlx_vlm.models.fastvlm import Model, ModelConfig, TextConfig, VisionConfig

    shape = QWEN2_05B
    text = TextConfig(
        "llava_qwen2",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        tie_word_embeddings=False,
    )
    model = Model(ModelConfig(text_config=text, vision_config=VisionConfig()))  # lazy: nothing is made
    expected = {name: value.shape for name, value in tree_flatten(model.parameters())}
    expected.pop("vision_tower.vision_model.head.proj")  # CLIP's head, which FastVLM doesn't use
    assert {mlx_vlm_name(n): _channels_last(n, s) for n, s in published_shapes().items()} == expected


def _channels_last(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) == 4:
        return shape[0], *shape[2:], shape[1]
    return shape[::-1] if "layer_scale" in name else shape
