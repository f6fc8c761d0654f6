"""Our encoders against timm's `fastvit_mci*` on seeded weights: as trained, with all branches, and fused by timm."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from fastvlm_convert.families import FAMILIES, family_of_timm, vision_config
from fastvlm_convert.keymap import LAYOUTS, map_tensors
from fastvlm_convert.schema import vision_shapes
from fastvlm_convert.vision_weights import from_checkpoint
from fastvlm_mlx.config import VisionConfig
from support.fastvit import sample
from support.fastvit_checkpoint import InMemory, encoder_of
from support.seeded import relative_l2

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # their warnings are none of ours

MODELS = tuple(family.timm for family in FAMILIES.values())
SIZES = ((256, 256), (192, 320))
# Ours in float32 against theirs in float64: 9e-7 to 1.7e-6 measured, from sums of up to 48 blocks.
TOLERANCE = 1e-5


def fill(model: Any) -> None:
    """Seeded values for every parameter and statistic, batch norms' and layer scales' too."""
    import torch

    for name, value in model.state_dict().items():
        rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var"):
            drawn = rng.uniform(0.5, 1.5, value.shape)
        elif name.endswith("gamma"):
            drawn = rng.uniform(0.05, 0.2, value.shape)
        elif name.endswith(("bias", "running_mean")):
            drawn = 0.1 * rng.standard_normal(value.shape)
        elif value.ndim == 1:
            drawn = rng.uniform(0.5, 1.5, value.shape)
        else:
            drawn = rng.standard_normal(value.shape) / np.sqrt(np.prod(value.shape[1:]))
        value.copy_(torch.from_numpy(drawn.astype(np.float32)))


@pytest.fixture(scope="module", params=MODELS)
def theirs(request: pytest.FixtureRequest, timm_ready: None) -> Any:
    """As it is trained, in float64; its weights are float32's."""
    import timm
    import torch

    with torch.no_grad():
        model = timm.create_model(request.param, num_classes=0, pretrained=False).eval()
        fill(model)
    return request.param, model


def ours(model: Any, config: VisionConfig) -> Any:
    """The encoder that the converter makes of a model's tensors, by the names that transformers saves them under."""
    tensors = {
        f"model.vision_tower.timm_model.{name}": value.numpy().astype(np.int64 if value.ndim == 0 else np.float32)
        for name, value in model.state_dict().items()
    }
    checkpoint = InMemory(tensors)
    (layout,) = (layout for layout in LAYOUTS if layout.name == "transformers")
    mapped, unknown = map_tensors(checkpoint, layout)  # type: ignore[arg-type]
    assert not unknown
    expected = vision_shapes(config, mapped)
    assert {name: tensor.shape for name, tensor in mapped.items()} == expected
    return encoder_of(from_checkpoint(checkpoint, mapped, config), config)  # type: ignore[arg-type]


def features(model: Any, pixels: np.ndarray) -> np.ndarray:
    """(N, C) before pooling and head, computed in float64."""
    import torch

    with torch.inference_mode():
        found = model.forward_features(torch.from_numpy(pixels.astype(np.float64) / 255).permute(2, 0, 1)[None])
    return found[0].flatten(1).T.numpy()


def test_features(theirs: Any) -> None:
    import copy

    from timm.utils.model import reparameterize_model

    name, model = theirs
    family = family_of_timm(name)
    config = vision_config(family, FAMILIES[family].side, {})
    trained = copy.deepcopy(model).double()
    right = {size: features(trained, sample(*size)) for size in SIZES}
    del trained
    fused = reparameterize_model(model, inplace=False)
    assert sum("reparam_conv" in n for n in fused.state_dict()) > sum("conv_kxk" in n for n in fused.state_dict()) == 0
    for form in (model, fused):
        encoder = ours(form, config)
        for size, expected in right.items():
            found = encoder.encode(sample(*size)[None])[0]
            assert found.shape == expected.shape
            assert relative_l2(found, expected) <= TOLERANCE
