"""What an export holds: its tensors, what its files say, and what gets lost on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
from tokenizers import Tokenizer

from fastvlm_convert.export_source import package_side
from fastvlm_convert.export_tokenizer import add_image
from fastvlm_convert.export_vision import CLIP_CHANNELS, CLIP_HEAD, clip_head, is_folded, plan_tower
from fastvlm_convert.exports import Form
from fastvlm_convert.inverse import own_name
from fastvlm_convert.keymap import VISION, Layout, Tensor
from fastvlm_convert.mlx_weights import Output, plan_decoder
from fastvlm_convert.options import DTYPES, Options
from fastvlm_convert.records import APPLE_PACKAGE
from fastvlm_convert.schema import vision_shapes
from fastvlm_convert.source import Checkpoint
from fastvlm_convert.tokenizer import read_tokenizer
from fastvlm_mlx.config import DOWNSAMPLING, ModelConfig
from fastvlm_mlx.errors import CheckpointError

HEAD, EMBEDDING, NEWLINE = "lm_head", "model.embed_tokens", "model.image_newline"


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """An export, before anything of it is written.

    Attributes:
        form: what it is for.
        checkpoint: the source.
        tensors: LLaVA name -> the source's tensor.
        config: of the model as it is written.
        outputs: of model.safetensors.
        tokenizer: as it is written.
        image_token: id that stands for an image.
        side: of the images, in pixels.
        warnings: for the user.
    """

    form: Form
    checkpoint: Checkpoint
    tensors: Mapping[str, Tensor]
    config: ModelConfig
    outputs: Sequence[Output]
    tokenizer: Tokenizer
    image_token: int
    side: int
    warnings: tuple[str, ...]

    @property
    def folded(self) -> bool:
        """Whether FastViTHD is written from a bundle's folded tensors."""
        return self.form.layout.has_vision and is_folded(self.tensors)

    @property
    def clip_channels(self) -> int:
        """Columns of CLIP's head, which mlx-vlm builds."""
        clip = self.tensors.get(CLIP_HEAD)
        return clip.shape[1] if clip else CLIP_CHANNELS


def plan_export(
    form: Form,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    options: Options,
    side: int | None,
) -> ExportPlan:
    """Plan an export.

    Args:
        form: what it is for.
        checkpoint: the source.
        tensors: LLaVA name -> source tensor, checked.
        config: of the source, with the quantisation of the output.
        options: dtypes and width; the projector is quantised too, as those runtimes' own tools do.
        side: of the images in pixels; None for the model's own.

    Raises:
        CheckpointError: the runtime hasn't got the code for the model, or needs something that it lacks.
    """
    _check_model(form, checkpoint, tensors, config)
    tokenizer = read_tokenizer(checkpoint.path)
    if tokenizer is None:
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer, which {form.runtime} needs; put its tokenizer.json there, "
            "or vocab.json and merges.txt"
        )
    image_token = form.image_token
    if image_token is None:
        image_token = add_image(tokenizer, config.decoder.vocab_size, checkpoint.path)
    side = side or _own_side(checkpoint, config)
    warnings = _losses(form, tensors, config, side)
    aspect = "pad" if config.aspect == "anyres" else config.aspect
    config = replace(config, image_newline=False, grid_pinpoints=(), patch_merge_type="flat", aspect=aspect)
    used = dict(tensors)
    dtype = options.dtype or form.dtype
    planned = plan_decoder(used, config, DTYPES[dtype] if dtype else None, options.width, quantize_projector=True)
    outputs = [_renamed(output, form.layout) for output in planned]
    if form.own_head and config.decoder.tie_word_embeddings:
        outputs += [_renamed(o, form.layout, HEAD) for o in planned if o.sources[0].startswith(EMBEDDING)]
    if form.layout.has_vision:
        assert config.vision
        used |= clip_head(checkpoint)
        outputs += plan_tower(form.layout, used, config.vision, DTYPES.get(options.vision_dtype or ""))
    return ExportPlan(form, checkpoint, used, config, outputs, tokenizer, image_token, side, warnings)


def _check_model(form: Form, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raise CheckpointError for a model that a runtime hasn't got the code for."""
    for part, found, known in (
        ("decoder", config.decoder.model_type, "qwen2"),
        ("projector", config.projector.kind, "mlp2x_gelu"),
        ("vision encoder", config.vision.family if config.vision else "fastvithd", "fastvithd"),
    ):
        if found != known:
            raise CheckpointError(
                f"{form.runtime} runs a FastVLM with the {part} {known}, {checkpoint.path} has {found}; "
                "convert it into a bundle (--layout bundle)"
            )
    if config.vision and config.vision.multi_scale:
        raise CheckpointError(
            f"{checkpoint.path} has multi-scale features, which {form.runtime} doesn't know; convert it into a bundle "
            "(--layout bundle)"
        )
    if config.decoder.rope_factor != 1 and not form.stretches:
        raise CheckpointError(
            f"{checkpoint.path} stretches positions by rope_scaling {config.decoder.rope_factor:g}, at which "
            f"{form.runtime} stops; convert it into a bundle (--layout bundle)"
        )
    if form.layout.has_vision:
        _check_tower(form, checkpoint, tensors, config)
    if config.vision is None and not (checkpoint.path / APPLE_PACKAGE).is_dir():
        raise CheckpointError(
            f"{checkpoint.path} has neither vision weights nor {APPLE_PACKAGE}; give the PyTorch checkpoint"
        )


def _check_tower(form: Form, checkpoint: Checkpoint, tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raise CheckpointError unless FastViTHD's tensors can be written: fused, or a bundle's that aren't quantised."""
    if is_folded(tensors):
        return
    if not any(name.startswith(VISION) for name in tensors):
        why, give = "no vision weights", "the PyTorch checkpoint"
        if config.vision:
            why, give = "FastViTHD quantised", "what it was made from, or a bundle made without --quantize-vision"
        raise CheckpointError(f"{checkpoint.path} has {why}, and {form.runtime} needs its weights; give {give}")
    if config.vision and any(name not in tensors for name in vision_shapes(config.vision)):
        raise CheckpointError(
            f"{checkpoint.path} has convolutions in the branches of training, which {form.runtime} doesn't know; "
            "convert it into a bundle, and that with --layout"
        )


def _own_side(checkpoint: Checkpoint, config: ModelConfig) -> int:
    """The side that the weights were trained at, in pixels.

    Where the source has a package instead, that of its images; Apple's exports have it in the tower's name, too.
    """
    if config.vision is None and (packaged := package_side(checkpoint.path / APPLE_PACKAGE)):
        return packaged
    side = str(checkpoint.config.get("mm_vision_tower")).rpartition("_")[2]
    return int(side) if config.vision is None and side.isdigit() else config.image_size


def _losses(form: Form, tensors: Mapping[str, Tensor], config: ModelConfig, side: int) -> tuple[str, ...]:
    """What the user should know of the runtime's limits."""
    warnings = []
    if config.aspect == "anyres" or NEWLINE in tensors:
        warnings.append(f"{form.runtime} knows no AnyRes: tiles and their line break are left out, images are padded")
    features = (side // DOWNSAMPLING) ** 2, config.projector.input_dim
    if form.features and features != form.features:
        warnings.append(
            f"{form.runtime} takes features of {form.features[0]} x {form.features[1]} only, "
            f"this model's are {features[0]} x {features[1]}: its code has to be changed for it"
        )
    vision = config.vision
    if form.vision_shape and vision and (vision.layers, vision.embed_dims) != form.vision_shape:
        warnings.append(
            f"{form.runtime} builds FastViTHD of {list(form.vision_shape[1])} only, whatever the config says, "
            f"this model's has {list(vision.embed_dims)}: its code has to be changed for it"
        )
    return tuple(warnings)


def _renamed(output: Output, layout: Layout, stem: str | None = None) -> Output:
    """An output under a layout's own names; `stem` is another LLaVA name for it than its source's."""
    source = output.sources[0]
    stem = stem or source.rpartition(".")[0]
    names = [own_name(f"{stem}.{spec.name.rpartition('.')[2]}", layout) for spec in output.specs]
    specs = tuple(replace(spec, name=str(name)) for spec, name in zip(output.specs, names, strict=True))

    def make(sources: Sequence[mx.array]) -> Sequence[mx.array]:
        made = output.make(sources)
        if any(value.dtype == mx.float16 and not mx.isfinite(value).all().item() for value in made):
            raise CheckpointError(f"{source} is beyond the range of float16; give --dtype bfloat16")
        return made

    return Output(specs, output.sources, make)
