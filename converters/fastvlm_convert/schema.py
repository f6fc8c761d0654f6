"""Names and shapes that a checkpoint of a given config must have, under the LLaVA names."""

from __future__ import annotations

from collections.abc import Collection

from fastvlm_convert.branches import BATCH_NORM, network_blocks, stage_indices
from fastvlm_convert.branches import Shapes as Shapes
from fastvlm_convert.keymap import PROJECTOR, VISION
from fastvlm_mlx.config import DecoderConfig, ProjectorConfig, VisionConfig


def vision_names(names: Collection[str]) -> set[str]:
    """The vision encoder's of LLaVA names, without their common beginning."""
    return {name.removeprefix(VISION) for name in names if name.startswith(VISION)}


def vision_shapes(config: VisionConfig, names: Collection[str] = ()) -> Shapes:
    """The encoder's tensors; convolutions are (out, in / groups, k, k).

    Args:
        config: its shape.
        names: of the checkpoint's tensors, which may have any of its convolutions fused or in the branches of
            training; without any, all are fused.

    What pools a stage N for multi-scale features by convolution is `multi_scale.N`, a name of our own: no published
    checkpoint and no released code has it.
    """
    there = vision_names(names)
    out: Shapes = {}
    for convolution in network_blocks(config, there).values():
        out |= convolution.shapes(there)
    for stage, embed, _, blocks in stage_indices(config):
        dim = config.embed_dims[stage]
        if embed is not None and config.squeezes(stage):
            squeezed = config.squeezed_dim(stage)
            out |= _convolution(f"network.{embed}.proj.0.se.fc1", squeezed, dim)
            out |= _convolution(f"network.{embed}.proj.0.se.fc2", dim, squeezed)
        for block in range(config.layers[stage]):
            out |= _block_shapes(config, stage, f"network.{blocks}.{block}")
        if config.pools(stage) and config.multi_scale and config.multi_scale.pooling == "depthwise":
            out |= _convolution(f"multi_scale.{stage}", dim, 1, config.pooling_ratio(stage))
    wide = 2 * config.embed_dims[-1]
    out |= _convolution("conv_exp.se.reduce", wide // 16, wide) | _convolution("conv_exp.se.expand", wide, wide // 16)
    return {VISION + name: shape for name, shape in out.items()}


def _convolution(name: str, outputs: int, inputs: int, kernel: int = 1) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def _block_shapes(config: VisionConfig, stage: int, name: str) -> Shapes:
    """What a block has besides its token mixer's convolution."""
    dim = config.embed_dims[stage]
    out: Shapes = {f"{name}.convffn.conv.conv.weight": (dim, 1, 7, 7)}
    out |= {f"{name}.convffn.conv.bn.{part}": (dim,) for part in BATCH_NORM}
    out |= _convolution(f"{name}.convffn.fc1", config.mlp_ratio * dim, dim)
    out |= _convolution(f"{name}.convffn.fc2", dim, config.mlp_ratio * dim)
    if not config.attends(stage):
        return out | {f"{name}.layer_scale": (dim, 1, 1)}
    norm = BATCH_NORM if config.norm == "batch" else BATCH_NORM[:2]
    out |= {f"{name}.norm.{part}": (dim,) for part in norm}
    out |= {f"{name}.layer_scale_{i}": (dim, 1, 1) for i in (1, 2)}
    out[f"{name}.token_mixer.qkv.weight"] = (3 * dim, dim)
    out[f"{name}.token_mixer.proj.weight"] = (dim, dim)
    out[f"{name}.token_mixer.proj.bias"] = (dim,)
    return out


def projector_layers(config: ProjectorConfig) -> list[str]:
    """LLaVA's names of a projector's linear layers: a lone one has no number, GELU counts between the others."""
    return [PROJECTOR] if config.kind == "linear" else [f"{PROJECTOR}{2 * number}." for number in range(config.depth)]


def projector_shapes(config: ProjectorConfig, newline: bool) -> Shapes:
    """The projector's linear layers, and AnyRes' line break where the checkpoint has one."""
    out: Shapes = {}
    for number, name in enumerate(projector_layers(config)):
        inputs = config.hidden_dim if number else config.input_dim
        out |= {f"{name}weight": (config.hidden_dim, inputs), f"{name}bias": (config.hidden_dim,)}
    if newline:
        out["model.image_newline"] = (config.hidden_dim,)
    return out


def decoder_shapes(config: DecoderConfig) -> Shapes:
    """The tensors of Qwen2 and LLaMA; a tied decoder has no lm_head."""
    dim, inner = config.hidden_size, config.intermediate_size
    kv = dim // config.num_attention_heads * config.num_key_value_heads
    out: Shapes = {"model.embed_tokens.weight": (config.vocab_size, dim), "model.norm.weight": (dim,)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        for part, outputs in (("q", dim), ("k", kv), ("v", kv)):
            out[f"{layer}self_attn.{part}_proj.weight"] = (outputs, dim)
            if config.qkv_bias:
                out[f"{layer}self_attn.{part}_proj.bias"] = (outputs,)
        out |= {
            f"{layer}self_attn.o_proj.weight": (dim, dim),
            f"{layer}mlp.gate_proj.weight": (inner, dim),
            f"{layer}mlp.up_proj.weight": (inner, dim),
            f"{layer}mlp.down_proj.weight": (dim, inner),
            f"{layer}input_layernorm.weight": (dim,),
            f"{layer}post_attention_layernorm.weight": (dim,),
        }
        if config.output_bias:
            out[f"{layer}self_attn.o_proj.bias"] = (dim,)
        if config.mlp_bias:
            out |= {f"{layer}mlp.{part}_proj.bias": (inner,) for part in ("gate", "up")}
            out[f"{layer}mlp.down_proj.bias"] = (dim,)
    if not config.tie_word_embeddings:
        out["lm_head.weight"] = (config.vocab_size, dim)
    return out
