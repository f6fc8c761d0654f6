"""`fastvlm-convert` on LLaVA checkpoints whose tower is FastViT, or has multi-scale features; and what they then do."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

pytest.importorskip("torch", reason="the reference is PyTorch")

from fastvlm_convert.cli import main
from fastvlm_convert.configs import read_config
from fastvlm_convert.coreml_vision import PackageOptions, Size
from fastvlm_convert.families import FAMILIES, family_of_timm, family_of_tower, vision_config
from fastvlm_convert.keymap import LAYOUTS
from fastvlm_convert.pipeline import Options, convert
from fastvlm_mlx import load
from fastvlm_mlx.bundle import Bundle, read_tensors
from fastvlm_mlx.errors import CheckpointError, ResolutionError, WeightsError
from support.fastvit import FIVE, FOUR, Reference, sample
from support.fastvit_checkpoint import with_scales, write_fastvit
from support.layouts import to_transformers
from support.seeded import relative_l2

FEATURES = 1e-5  # float32 against float64: see test_branches
PROMPT = [11, 12, -200, 13, 14]


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    """(trained form, fused form) of the same weights: folder of a checkpoint whose tower is MCi2, by its name."""
    root = tmp_path_factory.mktemp("mci2")
    forms = {"branches": lambda _: False, "fused": lambda _: True}
    return {
        form: write_fastvit(checkpoint("tiny"), root / form, Reference(FOUR, fuses)) for form, fuses in forms.items()
    }


@pytest.fixture(scope="module")
def bundles(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("bundles")
    for form, folder in folders.items():
        assert main([str(folder), "-o", str(root / form), "--no-coreml"]) == 0
    return {form: root / form for form in folders}


@pytest.mark.parametrize("form", ["branches", "fused"])
def test_it_just_works(bundles, form):
    """Positions of 32 pixels, the reference's features, and an answer, at the tower's side and at others."""
    model = load(bundles[form])
    assert model.resolution == 128
    assert (model.config.vision.family, model.config.downsampling) == ("mci2", 32)
    for side in (128, 96, 32):
        image = sample(side, side) if side >= 32 else None
        seen = model.encode_image(image, resolution=side)
        right = Reference(FOUR).features(image)
        assert seen.features.shape == (side * side // 1024, 256)
        assert relative_l2(seen.features, right) <= FEATURES
        answer = model.generate(image, PROMPT, resolution=side, max_tokens=4, ignore_eos=True)
        assert answer.image_tokens == side * side // 1024
        assert answer.prompt_tokens == answer.image_tokens + 4


def test_both_forms_answer_alike(bundles):
    answers = [
        load(bundles[form]).generate(sample(128, 128), PROMPT, max_tokens=24, ignore_eos=True) for form in bundles
    ]
    assert answers[0].token_ids == answers[1].token_ids


def test_sides_are_of_whole_positions(bundles):
    model = load(bundles["fused"])
    for wrong in (100, 48, 16):
        with pytest.raises(ResolutionError, match=f"multiple of 32 pixels, got {wrong}"):
            model.generate(sample(64, 64), PROMPT, resolution=wrong)
    with pytest.raises(
        ResolutionError, match=r"got 80; the nearest are 64 and 128 \(models with FastViT take multiples of 32"
    ):
        load(bundles["fused"], resolution=80)


def test_a_side_of_32_is_still_none_for_fastvithd(bundle):
    with pytest.raises(ResolutionError, match="multiple of 64 pixels, got 96; the nearest are 64 and 128"):
        load(bundle("tiny"), resolution=96)
    with pytest.raises(ResolutionError, match="multiple of 64 pixels, got 96"):
        load(bundle("tiny")).generate(sample(64, 64), PROMPT, resolution=96)


def test_what_the_bundle_says(bundles):
    changes = {form: Bundle.open(path).manifest.changes for form, path in bundles.items()}
    assert changes["branches"][1].startswith("MCi2 folded: branches of training, batch norm, layer scale, 1/255;")
    assert changes["fused"][1].startswith("MCi2 folded: batch norm, layer scale, 1/255;")


def test_the_bundle_of_fastvithd_says_what_it_did(bundle):
    changes = Bundle.open(bundle("tiny")).manifest.changes
    assert changes[1].startswith("FastViTHD folded: batch norm, layer scale, LayerNorm affine, 1/255;")


def test_options_take_it_too(folders, tmp_path):
    """Widths and types of the encoder's matrices."""
    options = Options(vision_dtype="bfloat16", q_bits=8, q_group_size=32, quantize_vision=True)
    path = convert(folders["branches"], tmp_path / "b", options).path
    tensors = read_tensors(path / "vision.safetensors")
    assert "stages.3.blocks.0.ffn.fc1.scales" in tensors
    assert "stages.3.downsample.reduce.scales" in tensors
    features = load(path).encode_image(sample(128, 128)).features
    assert relative_l2(features, Reference(FOUR).features(sample(128, 128))) < 0.2


@pytest.mark.parametrize("pooling", ["average", "depthwise"])
def test_multi_scale_features(checkpoint, tmp_path, pooling):
    """By config alone: the projector's input grows with them."""
    reference = Reference(with_scales(FIVE, pooling, 1, 3))
    source = write_fastvit(checkpoint("tiny"), tmp_path / "source", reference)
    model = load(convert(source, tmp_path / "bundle").path)
    assert model.config.projector.input_dim == 512 + 32 + 128
    found = model.encode_image(sample(128, 192), resolution=256, aspect="stretch")
    pixels = np.asarray(found.features)
    assert pixels.shape == (16, 672)
    same = model.engine.vision.encoder.encode(sample(128, 192)[None])[0]
    assert relative_l2(same, reference.features(sample(128, 192))) <= FEATURES
    assert model.generate(sample(256, 256), PROMPT, max_tokens=3, ignore_eos=True).image_tokens == 16


BAD = {
    "an unknown tower": (
        {"mm_vision_tower": "mobileclip_b_1024"},
        CheckpointError,
        r"mm_vision_tower is 'mobileclip_b_1024'; this version knows mobileclip_l_SIDE \(FastViTHD\), "
        r"mobileclip_s0_SIDE \(MCi0\), mobileclip_s1_SIDE \(MCi1\), mobileclip_s2_SIDE \(MCi2\), SIDE being pixels",
    ),
    "a tower without a side": ({"mm_vision_tower": "mobileclip_s2"}, CheckpointError, "SIDE being pixels"),
    "a side of no whole positions": (
        {"mm_vision_tower": "mobileclip_s2_100"},
        CheckpointError,
        "vision.image_size must be a multiple of 32, got 100",
    ),
    "three stages": (
        {"mm_vision_config": {"layers": [1, 2, 2], "embed_dims": [16, 32, 64]}},
        CheckpointError,
        "vision needs 4 or 5 positive layers",
    ),
    "five stages with squeezes for four": (
        {"mm_vision_config": {"layers": [1, 1, 1, 1, 1], "embed_dims": [16, 32, 64, 128, 256]}},
        CheckpointError,
        "se_downsamples must have a value for each of the 5 stages",
    ),
    "channels of another encoder": (
        {"mm_hidden_size": 1280},
        CheckpointError,
        r"mm_hidden_size is 1280, MCi2 of .* 256",
    ),
    "scales that mm_hidden_size leaves out": (
        {
            "mm_vision_config": {
                "layers": [1, 2, 2, 2],
                "embed_dims": [16, 32, 64, 128],
                "multi_scale": {"pooling": "average", "stages": [0, 1]},
            }
        },
        CheckpointError,
        "with multi-scale features gives 304",
    ),
    "an unknown pooling": (
        {"mm_vision_config": {"multi_scale": {"pooling": "max", "stages": [0]}}},
        CheckpointError,
        "pooling must be one of average, depthwise, got 'max'",
    ),
    "the last stage pooled": (
        {"mm_vision_config": {"multi_scale": {"pooling": "average", "stages": [3]}}},
        CheckpointError,
        r"before the last stage, from 0 to 2, got \(3,\)",
    ),
    "no stages": (
        {"mm_vision_config": {"multi_scale": {"pooling": "average", "stages": []}}},
        CheckpointError,
        "at least one stage, each once",
    ),
    "scales without their stages": (
        {"mm_vision_config": {"multi_scale": {"pooling": "average"}}},
        CheckpointError,
        "multi_scale: keys missing stages",
    ),
    "scales without their weights": (
        {
            "mm_vision_config": {
                "layers": [1, 2, 2, 2],
                "embed_dims": [16, 32, 64, 128],
                "multi_scale": {"pooling": "depthwise", "stages": [0, 1]},
            },
            "mm_hidden_size": 304,
        },
        WeightsError,
        r"missing \(4\): .*multi_scale\.0\.bias.*multi_scale\.1\.weight",
    ),
    "the tower of another family": (
        {
            "mm_vision_tower": "mobileclip_l_128",
            "mm_vision_config": {"layers": [1, 2, 2, 2], "embed_dims": [16, 32, 64, 128]},
        },
        WeightsError,
        r"doesn't fit its config.*unexpected",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(folders, tmp_path, case):
    changes, error, message = BAD[case]
    source = tmp_path / "source"
    source.mkdir()
    for file in folders["branches"].iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text()) | changes
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_the_command_says_it_in_one_line(folders, tmp_path, capsys):
    source = tmp_path / "source"
    source.mkdir()
    config = json.loads((folders["fused"] / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "siglip"}))
    (source / "model.safetensors").write_bytes((folders["fused"] / "model.safetensors").read_bytes())
    assert main([str(source), "-o", str(tmp_path / "b"), "--no-coreml"]) == 2
    assert re.search(r"mm_vision_tower is 'siglip'; this version knows mobileclip_l_SIDE", capsys.readouterr().err)


def test_a_package_size_of_no_whole_positions(checkpoint, tmp_path):
    """96 px is one for FastViT and none for FastViTHD; told before anything is written."""
    options = Options(package=PackageOptions(sizes=(Size(96, 96),)))
    with pytest.raises(ResolutionError, match="multiple of 64 pixels, got 96"):
        convert(checkpoint("tiny"), tmp_path / "bundle", options)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("tower", "family", "side"),
    [
        ("mobileclip_l_1024", "fastvithd", 1024),
        ("mobileclip_l_384", "fastvithd", 384),
        ("mobileclip_s0_256", "mci0", 256),
        ("mobileclip_s2_tuned_768", "mci2", 768),
    ],
)
def test_towers(tower, family, side):
    assert family_of_tower(tower) == (family, side)


@pytest.mark.parametrize(
    "tower", ["mobileclip_large_1024", "mobileclip_s3_256", "openai/clip-vit-large-patch14-336", ""]
)
def test_unknown_towers(tower):
    with pytest.raises(CheckpointError, match=f"mm_vision_tower is '{tower}'; this version knows"):
        family_of_tower(tower)


def test_names_of_timm():
    assert [family_of_timm(f"fastvit_mci{n}") for n in range(4)] == ["mci0", "mci1", "mci2", "fastvithd"]
    with pytest.raises(CheckpointError, match="'fastvit_t8'; this version knows fastvit_mci3, fastvit_mci0"):
        family_of_timm("fastvit_t8")


@pytest.mark.parametrize(
    ("family", "downsampling", "channels", "squeezed"),
    [
        ("mci0", 32, 1024, (64, 128)),
        ("mci1", 32, 1024, (64, 128)),
        ("mci2", 32, 1280, (80, 160)),
        ("fastvithd", 64, 3072, ()),
    ],
)
def test_published_shapes(family, downsampling, channels, squeezed):
    config = vision_config(family, FAMILIES[family].side, {})
    assert (config.downsampling, config.feature_dim) == (downsampling, channels)
    assert (config.norm, config.mlp_ratio) == (("layer", 4) if family == "fastvithd" else ("batch", 3))
    assert tuple(config.squeezed_dim(s) for s in range(len(config.layers)) if config.squeezes(s)) == squeezed


@pytest.mark.parametrize(("tokens", "side"), [(64, 256), (576, 768), (5, 256), (None, 256)])
def test_transformers_configs_name_it_too(checkpoint, tmp_path, tokens, side):
    """By timm's name; the side follows from the positions, or is MobileCLIP's."""
    raw = json.loads((to_transformers(checkpoint("tiny"), tmp_path / "source") / "config.json").read_text())
    raw["vision_config"] |= {"architecture": "fastvit_mci2", "model_args": {"inference_mode": True}}
    (layout,) = (layout for layout in LAYOUTS if layout.name == "transformers")
    config = read_config(raw | {"image_seq_length": tokens}, layout, "name", "config.json", {})
    assert config.vision == vision_config("mci2", side, {})
    assert config.projector.input_dim == 1280
