"""The key maps turned round: back and forth is where it started, and the names are the peers' own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fastvlm_convert.inverse import invert, own_name, own_order, own_shape
from fastvlm_convert.keymap import LAYOUTS, PROJECTOR, VISION, Layout, Rule, map_tensors
from fastvlm_convert.schema import Shapes, decoder_shapes, projector_shapes, vision_shapes
from fastvlm_convert.source import StoredTensor
from fastvlm_mlx.config import DecoderConfig, ProjectorConfig, VisionConfig
from support.layouts import apple_mlx_name, mlx_vlm_name, transformers_name

LAYOUT = {layout.name: layout for layout in LAYOUTS}


def published() -> Shapes:
    """Every tensor of apple/FastVLM-0.5B that the converter wants, and those of a packed matrix."""
    vision = vision_shapes(VisionConfig(1024, (2, 12, 24, 4, 2), (96, 192, 384, 768, 1536)))
    decoder = decoder_shapes(DecoderConfig(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=False))
    packed = {f"{PROJECTOR}0.scales": (896, 48), "lm_head.biases": (151936, 14)}
    return vision | decoder | projector_shapes(ProjectorConfig(3072, 896), newline=False) | packed


@pytest.mark.parametrize("layout", LAYOUT.values(), ids=LAYOUT)
def test_there_and_back(layout: Layout) -> None:
    """What a layout calls a tensor is read back under its LLaVA name, in PyTorch's shape."""
    there = {name: own_name(name, layout) for name in published()}
    if not layout.has_vision:
        assert all(own is None for name, own in there.items() if name.startswith(VISION))
        there = {name: own for name, own in there.items() if not name.startswith(VISION)}
    stored = {
        str(own): StoredTensor(Path(), str(own), own_shape(name, published()[name], layout), "BF16")
        for name, own in there.items()
    }
    assert len(stored) == len(there)
    back, unknown = map_tensors(SimpleNamespace(tensors=stored), layout)  # type: ignore[arg-type]
    assert unknown == []
    assert {name: tensor.source for name, tensor in back.items()} == there
    assert {name: tensor.shape for name, tensor in back.items()} == {n: published()[n] for n in there}


@pytest.mark.parametrize(("name", "oracle"), [("mlx-vlm", mlx_vlm_name), ("apple-mlx", apple_mlx_name)])
def test_the_names_are_those_of_the_peers_own_code(name, oracle):
    for llava in published():
        assert own_name(llava, LAYOUT[name]) == oracle(llava)


def test_transformers_names_but_for_what_is_optional():
    """Its longer spelling is read; the shorter one would be written, by nothing yet."""
    layout = LAYOUT["transformers"]
    for llava in (n for n in published() if n.startswith(VISION)):
        assert "model." + str(own_name(llava, layout)).replace("tower.", "tower.timm_model.") == transformers_name(
            llava
        )


def test_what_has_no_place():
    assert own_name("model.image_newline", LAYOUT["mlx-vlm"]) is None
    assert own_name("model.image_newline", LAYOUT["llava"]) == "model.image_newline"


def test_orders():
    """Counted by hand: (O, I, H, W) = (2, 3, 5, 7) becomes (2, 5, 7, 3)."""
    import mlx.core as mx

    conv, scale = VISION + "patch_embed.0.reparam_conv.weight", VISION + "network.0.0.layer_scale"
    value = mx.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7)
    turned = own_order(conv, 4, LAYOUT["mlx-vlm"])(value)
    assert turned.shape == own_shape(conv, (2, 3, 5, 7), LAYOUT["mlx-vlm"]) == (2, 5, 7, 3)
    assert turned[1, 4, 6, 2].item() == value[1, 2, 4, 6].item() == 1 * 105 + 2 * 35 + 4 * 7 + 6
    assert own_shape(scale, (96, 1, 1), LAYOUT["mlx-vlm"]) == (1, 1, 96)
    assert own_order(conv, 4, LAYOUT["llava"])(value).shape == (2, 3, 5, 7)
    assert own_shape("model.norm.weight", (4,), LAYOUT["mlx-vlm"]) == (4,)


def test_rules_by_hand():
    rules = (
        Rule(r".*\.counter", ""),
        Rule(r"(?:old\.)?tower\.(\d+)\.(?:inner\.)?(a|b\.(?:c|d))", r"stem.\2.of.\1"),
        Rule(r"head", "tail"),
    )
    assert invert(rules) == (
        Rule(r"stem\.(a|b\.(?:c|d))\.of\.(\d+)", r"tower.\g<2>.\g<1>"),
        Rule("tail", "head"),
    )


@pytest.mark.parametrize(
    ("pattern", "replacement"),
    [
        (r"a\.(\d)", "b"),  # loses what the group matched
        (r"a\.(\d)", r"b.\1.\1"),
        (r"a\.\d", "b"),  # anything, outside of a group
        (r"a.b", "b"),
        (r"a|b", "b"),
        (r"a(?:b|c)d", "b"),
        (r"a((b)c)", r"\1"),
        (r"a(b", r"\1"),
    ],
)
def test_rules_that_cannot_be_turned(pattern, replacement):
    with pytest.raises(ValueError):
        invert([Rule(pattern, replacement)])
