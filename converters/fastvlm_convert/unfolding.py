"""Folded FastViTHD under the names of its checkpoints again, for runtimes that compute norms and layer scales.

A bundle's weights are folded (fastvlm_convert.folding) and can't be taken apart, but need not be: what folding took in
comes back as a batch norm and layer scales that change nothing. Only the bias that folding gave to qkv has no place of
its own: there the published network has none, and a LayerNorm before it whose shift is found for that bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fastvlm_convert.folding import PIXEL_MAX, fold_vision
from fastvlm_convert.keymap import VISION
from fastvlm_convert.schema import vision_shapes
from fastvlm_mlx.config import VisionConfig
from fastvlm_mlx.errors import CheckpointError

Array = np.ndarray

# A batch norm multiplies by weight / sqrt(variance + 1e-5). Beside 2^40 the epsilon is below float64's last digit, and
# root and quotient of powers of two are exact in any type: by 1, where a variance of 1 could only come near it.
VARIANCE, GAIN = 2.0**40, 2.0**20
STEM = VISION + "patch_embed.0.reparam_conv.weight"
# Of what is left of q's bias. It is a bias before a softmax: the error of the features is no larger.
BIAS_TOLERANCE = 1e-6
_CONSTANTS = {".bn.weight": GAIN, ".bn.running_mean": 0.0, ".bn.running_var": VARIANCE}


@dataclass(frozen=True, slots=True)
class Unfolded:
    """Tensors of a checkpoint that are made together.

    Attributes:
        names: LLaVA's.
        sources: of the folded tensors, by the names of fastvlm_convert.folding.
        make: float64 arrays of the sources -> those of the names, in PyTorch's order.
        exact: which of them hold a source's own values, so that its type holds them.
    """

    names: tuple[str, ...]
    sources: tuple[str, ...]
    make: Callable[[Sequence[Array]], Sequence[Array]]
    exact: tuple[bool, ...]


def unfold_vision(config: VisionConfig) -> list[Unfolded]:
    """All of FastViTHD's tensors, as `fastvlm_convert.schema.vision_shapes` lists them.

    Args:
        config: its shape; a family whose norm before attention is a LayerNorm.
    """
    folded = {f.sources[0]: f.name for f in fold_vision(config)}
    shapes = vision_shapes(config)
    out: list[Unfolded] = []
    for name, shape in shapes.items():
        block, _, part = name.partition(".token_mixer.")
        if part == "qkv.weight":
            out.append(_attention(block, folded[f"{block}.token_mixer.proj.weight"].removesuffix("proj.weight")))
        elif part == "proj.bias" or ".norm." in name:
            continue  # with their qkv
        elif (constant := _constant(name)) is not None:
            out.append(Unfolded((name,), ("stem.conv.bias",), _filled(shape, constant), (False,)))
        else:
            # Of a batch norm's parts, the first is what the folded bias is listed under.
            source = folded[name.replace(".bn.bias", ".bn.weight")]
            factor = PIXEL_MAX if name == STEM else 1.0
            out.append(Unfolded((name,), (source,), _laid_out(shape, factor), (name != STEM,)))
    return out


def _constant(name: str) -> float | None:
    """The value of what has been folded into other tensors; None for any other."""
    if ".layer_scale" in name:
        return 1.0
    return next((value for end, value in _CONSTANTS.items() if name.endswith(end)), None)


def _filled(shape: tuple[int, ...], value: float) -> Callable[[Sequence[Array]], Sequence[Array]]:
    return lambda _: (np.full(shape, value),)


def _laid_out(shape: tuple[int, ...], factor: float) -> Callable[[Sequence[Array]], Sequence[Array]]:
    """(O, kh, kw, I) -> (O, I, kh, kw), (O, I) -> (O, I, 1, 1)."""

    def make(tensors: Sequence[Array]) -> Sequence[Array]:
        value = tensors[0]
        ordered = value.transpose(0, 3, 1, 2) if value.ndim == 4 else value
        return (ordered.reshape(shape) * factor,)

    return make


def _attention(block: str, mixer: str) -> Unfolded:
    """The norm before a block's attention, qkv without a bias, and proj's bias."""
    names = (f"{block}.norm.weight", f"{block}.norm.bias", f"{block}.token_mixer.qkv.weight",
             f"{block}.token_mixer.proj.bias")  # fmt: skip
    sources = tuple(f"{mixer}{part}" for part in ("qkv.weight", "qkv.bias", "proj.weight", "proj.bias"))

    def make(tensors: Sequence[Array]) -> Sequence[Array]:
        try:
            return split_bias(*tensors)
        except ValueError as exc:
            raise CheckpointError(
                f"{sources[1]} can't be written for a runtime whose qkv has no bias ({exc}); "
                "give the checkpoint that the bundle was made from"
            ) from exc

    return Unfolded(names, sources, make, (True, False, True, False))


def split_bias(qkv: Array, bias: Array, proj: Array, proj_bias: Array) -> tuple[Array, Array, Array, Array]:
    """A norm's weight and shift, a matrix without a bias and proj's bias that do what a matrix with a bias does.

    Where the bias came from a shift, that is found again. Of a rounded bias something is left: q's part of it is
    undone by a little more shift; k's adds the same to all scores of a query, which a softmax doesn't see; v's
    goes through the softmax, whose weights sum to 1, into proj's bias.

    Args:
        qkv: (3 C, C), after a norm without weight and shift; float64, as the others.
        bias: (3 C,), added to it.
        proj: (C, C), after attention.
        proj_bias: (C,), added to it.

    Returns:
        The norm's weight, powers of two, and its shift, which float32 holds; qkv; proj's bias.

    Raises:
        ValueError: no shift gives q its bias.
    """
    dim = qkv.shape[1]
    norms = np.linalg.norm(qkv, axis=0)
    gain = np.exp2(np.round(np.log2(np.where(norms > 0, norms, 1.0))))  # columns alike: the shift is found precisely
    matrix = qkv / gain
    allowed = BIAS_TOLERANCE * float(np.linalg.norm(bias))
    shift = np.linalg.lstsq(matrix, bias, rcond=None)[0]
    rest = bias - matrix @ shift
    if np.linalg.norm(rest[:dim]) > allowed:
        shift = shift + np.linalg.lstsq(matrix[:dim], rest[:dim], rcond=None)[0]
    shift = shift.astype(np.float32).astype(np.float64)
    rest = bias - matrix @ shift
    if (left := float(np.linalg.norm(rest[:dim]))) > allowed:
        raise ValueError(f"{left:.1e} of q's bias is left, {allowed:.1e} would do")
    return gain, shift, matrix, proj_bias + proj @ rest[2 * dim :]
