"""Our run time against transformers' FastVlmForConditionalGeneration: same weights, float32, CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fastvlm_convert.pipeline import convert
from fastvlm_mlx import FastVLM, load
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
from support.layouts import transformers_name
from support.seeded import PROMPTS, GoldenPrompt, golden, golden_prompt, relative_l2

if TYPE_CHECKING:
    import torch

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # their warnings are none of ours


@pytest.fixture(scope="session")
def theirs(timm_ready: None, layouts: dict[str, Path]) -> Any:
    import torch
    from transformers import FastVlmForConditionalGeneration

    model, info = FastVlmForConditionalGeneration.from_pretrained(
        layouts["transformers"], dtype=torch.float32, output_loading_info=True
    )
    found = {key: value for key, value in info.items() if value}
    assert not found, f"support.layouts and transformers name tensors differently: {found}"
    return model.eval()


def their_pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
    import torch

    return torch.from_numpy(unit_pixels(images))


def their_inputs(prompt: GoldenPrompt, model: Any) -> dict[str, torch.Tensor]:
    """One `<image>` id for each embedding of an image, as transformers' processor writes them."""
    import torch

    image = [model.config.image_token_id] * model.config.image_seq_length
    ids = torch.tensor([[i for token in prompt.ids for i in (image if token < 0 else [token])]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"pixel_values": their_pixels(prompt.images)} if prompt.images else {})


def their_greedy_ids(prompt: GoldenPrompt, model: Any) -> list[int]:
    from transformers import GenerationConfig

    inputs = their_inputs(prompt, model)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=GREEDY, eos_token_id=None, pad_token_id=0)
    answer = model.generate(**inputs, generation_config=greedy)
    return answer[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("side", [128, SIDE])
def test_features_and_embeddings(ours: Callable[[str], FastVLM], theirs: Any, preset: str, side: int) -> None:
    import torch

    image = golden(preset)[f"pixels_{side}x{side}"]
    with torch.inference_mode():
        expected = theirs.get_image_features(their_pixels([image]), return_dict=True)
    found = ours("llava").encode_image(image, resolution=side)
    features = expected.last_hidden_state[0].flatten(1).T
    assert relative_l2(found.features, features.numpy()) <= FEATURE_TOLERANCE
    assert relative_l2(found.embeddings, expected.pooler_output[0].numpy()) <= FEATURE_TOLERANCE


def test_first_logits(ours: Callable[[str], FastVLM], theirs: Any, prompt: GoldenPrompt) -> None:
    import torch

    with torch.inference_mode():
        output = theirs(**their_inputs(prompt, theirs), logits_to_keep=1)
    expected = output.logits[0, 0, : len(prompt.first_logits)].numpy()  # the rest pads the vocabulary
    assert relative_l2(first_logits(ours("llava"), prompt), expected) <= LOGIT_TOLERANCE


def test_greedy_ids(ours: Callable[[str], FastVLM], theirs: Any, prompt: GoldenPrompt) -> None:
    assert greedy_ids(ours("llava"), prompt) == their_greedy_ids(prompt, theirs) == prompt.greedy_ids


@pytest.mark.parametrize("layout", ["llava", "transformers", "mlx-vlm"])
def test_every_layout_gives_the_same_ids(ours: Callable[[str], FastVLM], layout: str, prompt: GoldenPrompt) -> None:
    assert greedy_ids(ours(layout), prompt) == prompt.greedy_ids


def test_what_transformers_saves_converts(theirs: Any, preset: str, tmp_path: Path) -> None:
    """Today's config.json has other keys than the published ones: `dtype`, `rope_parameters` and more."""
    theirs.save_pretrained(tmp_path / "saved")
    bundle = convert(tmp_path / "saved", tmp_path / "bundle")
    model = load(bundle.path)
    for kind in PROMPTS:
        prompt = golden_prompt(preset, kind)
        assert greedy_ids(model, prompt) == prompt.greedy_ids


def test_published_names_and_shapes(timm_ready: None) -> None:
    """The full-size model, without values: what the converter wants is what transformers has."""
    import torch
    from transformers import FastVlmConfig, FastVlmForConditionalGeneration

    shape = QWEN2_05B
    text = {
        "model_type": "qwen2",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "vocab_size": shape.vocab_size,
    }
    with torch.device("meta"):
        model = FastVlmForConditionalGeneration(FastVlmConfig(text_config=text))
    found = {transformers_name(name): shape for name, shape in published_shapes().items()}
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert found == {n: s for n, s in expected.items() if not n.endswith("num_batches_tracked")}
