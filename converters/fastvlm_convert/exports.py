"""The folders that other runtimes load, as data.

- apple-app: Apple's demo app and mlx-swift. Decoder and projector as safetensors, FastViTHD as a Core ML package.
  Source: apple/ml-fastvlm 592b4ad, app/FastVLM/FastVLM.swift and model_export.
- mlx-vlm: everything as safetensors. Source: mlx-vlm 0.7.10, models/fastvlm.

The names are those that the converter reads, turned round (fastvlm_convert.inverse).
"""

from __future__ import annotations

from dataclasses import dataclass

from fastvlm_convert.families import FAMILIES
from fastvlm_convert.keymap import LAYOUTS, Layout
from fastvlm_mlx.errors import InputError

WEIGHTS = "model.safetensors"
PUBLISHED_VISION = FAMILIES["fastvithd"].layers, FAMILIES["fastvithd"].embed_dims


@dataclass(frozen=True, slots=True)
class Form:
    """A folder that another runtime loads.

    Attributes:
        name: as the command line has it.
        runtime: what loads it, in words.
        layout: the tensors' names, by which they are read again.
        dtype: what decoder and projector are cast to where nothing else is asked; None keeps the source's type.
        package: FastViTHD is a Core ML package beside the tensors, not among them.
        own_head: the head is written where it is tied, too, as the runtime's published files have it.
        image_token: id that stands for an image; None for one that the tokenizer has, or gets.
        processor: names of the processor and of its part for images.
        features: (tokens, channels) of the only features that the runtime takes; None for any.
        stretches: it takes positions stretched by linear rope scaling.
        vision_shape: (layers, embed_dims) of the only FastViTHD that it builds; None for any.
    """

    name: str
    runtime: str
    layout: Layout
    dtype: str | None
    package: bool
    own_head: bool
    image_token: int | None
    processor: tuple[str, str]
    stretches: bool = False
    features: tuple[int, int] | None = None
    vision_shape: tuple[tuple[int, ...], tuple[int, ...]] | None = None


_LAYOUT = {layout.name: layout for layout in LAYOUTS}
FORMS = {
    form.name: form
    for form in (
        Form(
            name="apple-app",
            runtime="Apple's app",
            layout=_LAYOUT["apple-mlx"],
            dtype="float16",
            package=True,
            own_head=True,
            image_token=None,
            processor=("LlavaProcessor", "CLIPImageProcessor"),
            features=(256, 3072),
        ),
        Form(
            name="mlx-vlm",
            runtime="mlx-vlm",
            layout=_LAYOUT["mlx-vlm"],
            dtype=None,
            package=False,
            own_head=False,
            image_token=-200,  # what its processor writes, whatever the config says
            processor=("FastVLMProcessor", "FastVLMImageProcessor"),
            stretches=True,
            vision_shape=PUBLISHED_VISION,
        ),
    )
}


def form_of(name: str) -> Form:
    """The form of that name; raises InputError for an unknown one."""
    if name not in FORMS:
        raise InputError(f"--layout must be one of bundle, {', '.join(FORMS)}, got {name!r}")
    return FORMS[name]
