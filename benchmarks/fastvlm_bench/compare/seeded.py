"""A checkpoint of random weights in the published LLaVA layout, for comparisons without a download.

Names, shapes and values are those that `tests/golden/seeded_checkpoint.py` gives its presets: drawn from a
generator seeded by the tensor's name, and exact in bfloat16, float16 and float32, so that every library
computes with the same numbers whatever type it holds them in.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastvlm_bench.compare.plan import QUESTIONS
from fastvlm_bench.sizes import FASTVITHD, Size
from fastvlm_mlx.template import CHATML

VISION = "model.vision_tower.vision_tower.model."
TEXTS = ("system", "user", "assistant", CHATML.system, *QUESTIONS)  # of a prompt, so that it has a usual length
SPECIAL = ("<|im_start|>", "<|endoftext|>", "<|im_end|>")  # ids 0, 1, 2
Shapes = dict[str, tuple[int, ...]]


def write_seeded(size: Size, out: Path) -> None:
    """Write config.json, model.safetensors (bfloat16) and tokenizer.json into a folder that exists."""
    (out / "config.json").write_text(json.dumps(_config(size), indent=2) + "\n", encoding="utf-8")
    make_tokenizer(size.vocabulary).save(str(out / "tokenizer.json"))
    shapes = vision_shapes(size) | decoder_shapes(size)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        dtype, length = ("I64", 8) if _is_counter(name) else ("BF16", 2 * int(np.prod(shape)))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + length]}
        offset += length
    blob = json.dumps(header, separators=(",", ":")).encode()
    blob += b" " * (-len(blob) % 8)
    # By hand: NumPy has no bfloat16, and the tensors need not be in memory together.
    with (out / "model.safetensors").open("wb") as file:
        file.write(len(blob).to_bytes(8, "little") + blob)
        for name, shape in shapes.items():
            file.write(_bytes(name, shape))


def make_tokenizer(vocabulary: int) -> Tokenizer:
    """ChatML's tokens, one token for each byte and for each word of TEXTS, and `<N>` for each other id N.

    It has as many tokens as the embedding has rows: with fewer, a library that knows the tokenizer's size
    would leave the other rows out, and one that doesn't would not.
    """
    words = {word for text in TEXTS for word, _ in _byte_level().pre_tokenize_str(text)}
    # Each word is joined letter by letter from its start.
    joined = dict.fromkeys((word[:end], word[end]) for word in sorted(words) for end in range(1, len(word)))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, *dict.fromkeys("".join(pair) for pair in joined)]
    tokens += [f"<{index}>" for index in range(len(tokens), vocabulary)]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, list(joined)))
    tokenizer.pre_tokenizer = _byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def _byte_level() -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def vision_shapes(size: Size) -> Shapes:
    """FastViTHD's tensors; convolutions are (out, in / groups, k, k)."""
    dims = size.dims
    out: Shapes = {}

    def conv(name: str, outputs: int, inputs: int, kernel: int) -> None:
        out[f"{name}.weight"] = (outputs, inputs, kernel, kernel)
        out[f"{name}.bias"] = (outputs,)

    for index, (inputs, kernel) in enumerate(((3, 3), (1, 3), (dims[0], 1))):
        conv(f"patch_embed.{index}.reparam_conv", dims[0], inputs, kernel)
    index = 0  # the published names number positions, blocks and patch embeddings flat
    for stage, (depth, dim) in enumerate(zip(size.layers, dims, strict=True)):
        if stage >= 3:
            conv(f"network.{index}.reparam_conv", dim, 1, 7)
            index += 1
        for block in range(depth):
            out |= _block_shapes(f"network.{index}.{block}", dim, attention=stage >= 3)
        index += 1
        if stage < len(dims) - 1:
            conv(f"network.{index}.proj.0.lkb_reparam", dims[stage + 1], 1, 7)
            conv(f"network.{index}.proj.1.reparam_conv", dims[stage + 1], dims[stage + 1], 1)
            index += 1
    wide = 2 * dims[-1]
    conv("conv_exp.se.reduce", wide // 16, wide, 1)
    conv("conv_exp.se.expand", wide, wide // 16, 1)
    conv("conv_exp.reparam_conv", wide, 1, 3)
    out["head.proj"] = (wide, size.clip_dim)
    return {VISION + name: shape for name, shape in out.items()}


def _block_shapes(name: str, dim: int, attention: bool) -> Shapes:
    """A block of FastViTHD: attention or a convolution, then the feed-forward part."""
    if attention:
        out: Shapes = {f"{name}.layer_scale_{i}": (dim, 1, 1) for i in (1, 2)}
        out |= {f"{name}.norm.{part}": (dim,) for part in ("weight", "bias")}
        out[f"{name}.token_mixer.qkv.weight"] = (3 * dim, dim)
        out[f"{name}.token_mixer.proj.weight"] = (dim, dim)
        out[f"{name}.token_mixer.proj.bias"] = (dim,)
    else:
        out = {f"{name}.layer_scale": (dim, 1, 1)}
        out[f"{name}.token_mixer.reparam_conv.weight"] = (dim, 1, 3, 3)
        out[f"{name}.token_mixer.reparam_conv.bias"] = (dim,)
    ffn = f"{name}.convffn"
    out[f"{ffn}.conv.conv.weight"] = (dim, 1, 7, 7)
    out |= {f"{ffn}.conv.bn.{part}": (dim,) for part in ("weight", "bias", "running_mean", "running_var")}
    out[f"{ffn}.conv.bn.num_batches_tracked"] = ()
    return out | {
        f"{ffn}.fc1.weight": (4 * dim, dim, 1, 1),
        f"{ffn}.fc1.bias": (4 * dim,),
        f"{ffn}.fc2.weight": (dim, 4 * dim, 1, 1),
        f"{ffn}.fc2.bias": (dim,),
    }


def decoder_shapes(size: Size) -> Shapes:
    """The projector's and Qwen2's tensors."""
    dim, kv = size.hidden, size.hidden // size.heads * size.kv_heads
    out: Shapes = {
        "model.mm_projector.0.weight": (dim, 2 * size.dims[-1]),
        "model.mm_projector.0.bias": (dim,),
        "model.mm_projector.2.weight": (dim, dim),
        "model.mm_projector.2.bias": (dim,),
        "model.embed_tokens.weight": (size.vocabulary, dim),
        "model.norm.weight": (dim,),
    }
    if not size.tied:
        out["lm_head.weight"] = (size.vocabulary, dim)
    for index in range(size.blocks):
        layer = f"model.layers.{index}."
        for part, outputs in (("q", dim), ("k", kv), ("v", kv)):
            out[f"{layer}self_attn.{part}_proj.weight"] = (outputs, dim)
            out[f"{layer}self_attn.{part}_proj.bias"] = (outputs,)
        out |= {
            f"{layer}self_attn.o_proj.weight": (dim, dim),
            f"{layer}mlp.gate_proj.weight": (size.intermediate, dim),
            f"{layer}mlp.up_proj.weight": (size.intermediate, dim),
            f"{layer}mlp.down_proj.weight": (dim, size.intermediate),
            f"{layer}input_layernorm.weight": (dim,),
            f"{layer}post_attention_layernorm.weight": (dim,),
        }
    return out


def _bytes(name: str, shape: tuple[int, ...]) -> bytes:
    """A tensor as it lies in the file."""
    if _is_counter(name):
        return np.array(1000, "<i8").tobytes()
    return (_values(name, shape).view(np.uint32) >> 16).astype("<u2").tobytes()


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of a size that keeps activations in range through all layers, float32."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(f"0:{name}".encode())))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var" or ".bn.weight" in name or "norm.weight" in name:
        x = rng.random(shape, dtype=np.float32) * 0.5 + 0.75
    elif "layer_scale" in name:
        x = rng.random(shape, dtype=np.float32) * 0.2 + 0.05
    else:
        x = rng.standard_normal(shape, dtype=np.float32) * _deviation(name, leaf, shape)
    if name.endswith(".reparam_conv.weight") and (".token_mixer." in name or shape[-1] == 7):
        x *= 0.3
        x[:, 0, shape[-2] // 2, shape[-1] // 2] += 1  # the folded identity branch
    return _bfloat16_and_float16(x.astype(np.float32))


def _deviation(name: str, leaf: str, shape: tuple[int, ...]) -> Any:
    """Standard deviation of a weight or bias: a Python float, or NumPy's, which takes the product to float64."""
    if leaf in ("bias", "running_mean"):
        return 0.05
    return 0.5 if "embed_tokens" in name else 1.6 / np.sqrt(np.prod(shape[1:]))


def _bfloat16_and_float16(x: np.ndarray) -> np.ndarray:
    """Round to 8 significant bits and flush what float16 holds only as a subnormal."""
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    return np.where(np.abs(rounded) < 2.0**-14, np.float32(0), rounded)


def _config(size: Size) -> dict[str, Any]:
    """config.json as published; the shape of FastViTHD is said where it isn't the published one."""
    shape = {"mm_vision_config": {"layers": size.layers, "embed_dims": size.dims}}
    return {
        "architectures": ["LlavaQwen2ForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "image_aspect_ratio": "pad",
        "intermediate_size": size.intermediate,
        "max_position_embeddings": 32768,
        "max_window_layers": size.blocks,
        "mm_hidden_size": 2 * size.dims[-1],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_tower": f"mobileclip_l_{size.image_size}",
        "model_type": "llava_qwen2",
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.blocks,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": size.tied,
        "tokenizer_model_max_length": 8192,
        "tokenizer_padding_side": "right",
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": size.vocabulary,
    } | ({} if (size.layers, size.dims) == FASTVITHD[:2] else shape)
