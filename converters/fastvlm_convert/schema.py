"""Names and shapes that a checkpoint of a given config must have, under the LLaVA names."""

from __future__ import annotations

from collections.abc import Iterator

from fastvlm_convert.keymap import PROJECTOR, VISION
from fastvlm_mlx.config import DecoderConfig, ProjectorConfig, VisionConfig

Shapes = dict[str, tuple[int, ...]]

BATCH_NORM = ("weight", "bias", "running_mean", "running_var")


def stage_indices(config: VisionConfig) -> Iterator[tuple[int, int | None, int | None, int]]:
    """For each stage: its number, and the places of its patch embedding, positional convolution and blocks.

    The published names number them flat in one list, `network`.
    """
    index = 0
    for stage in range(len(config.layers)):
        embed = position = None
        if stage:
            embed, index = index, index + 1
        if stage >= 3:
            position, index = index, index + 1
        yield stage, embed, position, index
        index += 1


def vision_shapes(config: VisionConfig) -> Shapes:
    """FastViTHD's tensors; convolutions are (out, in / groups, k, k)."""
    dims = config.embed_dims
    out: Shapes = {}

    def conv(name: str, outputs: int, inputs: int, kernel: int, bias: bool = True) -> None:
        out[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        if bias:
            out[f"{name}.bias"] = (outputs,)

    conv("patch_embed.0.reparam_conv", dims[0], 3, 3)
    conv("patch_embed.1.reparam_conv", dims[0], 1, 3)
    conv("patch_embed.2.reparam_conv", dims[0], dims[0], 1)
    for stage, embed, position, blocks in stage_indices(config):
        dim = dims[stage]
        if embed is not None:
            conv(f"network.{embed}.proj.0.lkb_reparam", dim, 1, 7)
            conv(f"network.{embed}.proj.1.reparam_conv", dim, dim, 1)
        if position is not None:
            conv(f"network.{position}.reparam_conv", dim, 1, 7)
        for block in range(config.layers[stage]):
            name = f"network.{blocks}.{block}"
            if position is None:
                out[f"{name}.layer_scale"] = (dim, 1, 1)
                conv(f"{name}.token_mixer.reparam_conv", dim, 1, 3)
            else:
                out |= {f"{name}.layer_scale_{i}": (dim, 1, 1) for i in (1, 2)}
                out |= {f"{name}.norm.{part}": (dim,) for part in ("weight", "bias")}
                out[f"{name}.token_mixer.qkv.weight"] = (3 * dim, dim)
                out[f"{name}.token_mixer.proj.weight"] = (dim, dim)
                out[f"{name}.token_mixer.proj.bias"] = (dim,)
            conv(f"{name}.convffn.conv.conv", dim, 1, 7, bias=False)
            out |= {f"{name}.convffn.conv.bn.{part}": (dim,) for part in BATCH_NORM}
            conv(f"{name}.convffn.fc1", config.mlp_ratio * dim, dim, 1)
            conv(f"{name}.convffn.fc2", dim, config.mlp_ratio * dim, 1)
    wide = config.feature_dim
    conv("conv_exp.se.reduce", wide // 16, wide, 1)
    conv("conv_exp.se.expand", wide, wide // 16, 1)
    conv("conv_exp.reparam_conv", wide, 1, 3)
    return {VISION + name: shape for name, shape in out.items()}


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
