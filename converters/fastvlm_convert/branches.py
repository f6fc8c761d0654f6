"""Convolutions that training keeps as several branches, fused into one each, in float64.

While it is trained, FastViT computes most of its convolutions as a sum: of kernels of one or two sizes and of the
input itself, each followed by a batch norm (MobileOne, RepLKNet), or of the input and a scaled difference (RepMixer).
All branches are linear, so one kernel and one bias do the same. Published FastVLM checkpoints hold those; MobileCLIP's
hold the branches, as does what is fine-tuned from them. Each convolution may be in either form.

Source: FastViT (arXiv 2303.14189), section 3; names as in apple/ml-fastvlm 592b4ad,
llava/model/multimodal_encoder/mobileclip/mci.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastvlm_convert.families import FAMILIES
from fastvlm_mlx.config import VisionConfig

Array = np.ndarray
Shapes = dict[str, tuple[int, ...]]
BATCH_NORM = ("weight", "bias", "running_mean", "running_var")
BATCH_NORM_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Branch:
    """One term of the sum.

    Attributes:
        name: below the convolution's own.
        kernel: side of its kernel, which is centred in the fused one; 0 for the input itself.
        sign: 1, or -1 where it is subtracted.
        normed: a batch norm follows; otherwise the kernel has a bias.
    """

    name: str
    kernel: int
    sign: int = 1
    normed: bool = True


@dataclass(frozen=True, slots=True)
class Block:
    """A convolution of the network.

    Attributes:
        name: published name of its module.
        fused: of the fused convolution, below it.
        shape: of the fused kernel: (outputs, inputs of a group, side, side).
        branches: that it is trained as.
        adds_input: the input is added to them; to the scaled sum where there is a `scale`.
        scale: name of the layer scale of the sum, below the convolution's own; None where it has none.
    """

    name: str
    fused: str
    shape: tuple[int, int, int, int]
    branches: tuple[Branch, ...]
    adds_input: bool = False
    scale: str | None = None

    def fused_shapes(self) -> Shapes:
        """Its tensors when it is fused."""
        return {f"{self.name}.{self.fused}.weight": self.shape, f"{self.name}.{self.fused}.bias": self.shape[:1]}

    def branch_shapes(self) -> Shapes:
        """Its tensors while it is trained."""
        outputs, inputs = self.shape[:2]
        out: Shapes = {}
        for branch in self.branches:
            name = f"{self.name}.{branch.name}"
            kernel = (outputs, inputs, branch.kernel, branch.kernel)
            if not branch.normed:
                out |= {f"{name}.weight": kernel, f"{name}.bias": (outputs,)}
                continue
            if branch.kernel:
                out[f"{name}.conv.weight"] = kernel
            norm = f"{name}.bn" if branch.kernel else name
            out |= {f"{norm}.{part}": (outputs,) for part in BATCH_NORM}
        if self.scale:
            out[f"{self.name}.{self.scale}"] = (outputs, 1, 1)
        return out

    def is_fused(self, names: Collection[str]) -> bool:
        """Whether a checkpoint with these names has it fused; yes, too, where it has nothing of it."""
        fused = any(name in names for name in self.fused_shapes())
        return fused or not any(name in names for name in self.branch_shapes())

    def shapes(self, names: Collection[str]) -> Shapes:
        """Its tensors in a checkpoint with these names, those included that it lacks."""
        return self.fused_shapes() if self.is_fused(names) else self.branch_shapes()


class Parameter(NamedTuple):
    """How the weight or the bias of a convolution comes from tensors; `exact` says that it is one of them."""

    sources: tuple[str, ...]
    make: Callable[[Sequence[Array]], Array]
    exact: bool


def parameters(block: Block, names: Collection[str]) -> tuple[Parameter, Parameter]:
    """Weight, (outputs, inputs of a group, side, side), and bias of a convolution.

    Args:
        block: the convolution.
        names: of the checkpoint's tensors, as `network_blocks` names them.
    """
    if block.is_fused(names):
        return stored(*block.fused_shapes())
    sources = tuple(block.branch_shapes())

    def make(index: int) -> Callable[[Sequence[Array]], Array]:
        return lambda tensors: fuse(block, dict(zip(sources, tensors, strict=True)))[index]

    return Parameter(sources, make(0), False), Parameter(sources, make(1), False)


def stored(weight: str, bias: str) -> tuple[Parameter, Parameter]:
    """Weight and bias that a checkpoint has as such, by their names."""

    def make(tensors: Sequence[Array]) -> Array:
        return tensors[0]

    return Parameter((weight,), make, True), Parameter((bias,), make, True)


def fuse(block: Block, tensors: Mapping[str, Array]) -> tuple[Array, Array]:
    """Kernel and bias, in float64, that do what the branches do together.

    Args:
        block: the convolution.
        tensors: its branches, by the names of `Block.branch_shapes`.
    """
    side = block.shape[-1]
    kernel, bias = np.zeros(block.shape), np.zeros(block.shape[0])
    for branch in block.branches:
        part, shift = _branch(block, branch, tensors)
        margin = (side - part.shape[-1]) // 2
        inner = slice(margin, side - margin)
        kernel[:, :, inner, inner] += branch.sign * part
        bias += branch.sign * shift
    if block.scale:
        scale = tensors[f"{block.name}.{block.scale}"].astype(np.float64).reshape(-1)
        kernel, bias = kernel * scale[:, None, None, None], bias * scale
    if block.adds_input:
        kernel += _identity(block, side)
    return kernel, bias


def _branch(block: Block, branch: Branch, tensors: Mapping[str, Array]) -> tuple[Array, Array]:
    name = f"{block.name}.{branch.name}"
    if not branch.normed:
        return tensors[f"{name}.weight"].astype(np.float64), tensors[f"{name}.bias"].astype(np.float64)
    kernel = tensors[f"{name}.conv.weight"].astype(np.float64) if branch.kernel else _identity(block, 1)
    norm = f"{name}.bn" if branch.kernel else name
    gain, shift = batch_norm_affine([tensors[f"{norm}.{part}"] for part in BATCH_NORM])
    return kernel * gain[:, None, None, None], shift


def _identity(block: Block, side: int) -> Array:
    """The kernel that leaves its input as it is."""
    outputs, inputs = block.shape[:2]
    kernel = np.zeros((outputs, inputs, side, side))
    channels = np.arange(outputs)
    kernel[channels, channels % inputs, side // 2, side // 2] = 1
    return kernel


def batch_norm_affine(parts: Sequence[Array]) -> tuple[Array, Array]:
    """What a batch norm multiplies each channel by, and what it adds then; `parts` in the order of BATCH_NORM."""
    gamma, beta, mean, variance = (part.astype(np.float64) for part in parts)
    gain = gamma / np.sqrt(variance + BATCH_NORM_EPS)
    return gain, beta - mean * gain


def network_blocks(config: VisionConfig, names: Collection[str]) -> dict[str, Block]:
    """Every convolution that may be in branches, by name.

    Args:
        config: the encoder's shape.
        names: of the checkpoint's tensors: they tell how many equal branches a convolution has.
    """
    dims = config.embed_dims
    family = FAMILIES.get(config.family)
    scales = family is None or family.stem_scales
    found = [
        _mobile_one("patch_embed.0", (dims[0], 3, 3, 3), names, scales=scales),
        _mobile_one("patch_embed.1", (dims[0], 1, 3, 3), names, scales=scales),
        _mobile_one("patch_embed.2", (dims[0], dims[0], 1, 1), names, skips=True),
    ]
    for stage, embed, position, blocks in stage_indices(config):
        dim = dims[stage]
        if embed is not None:
            large = Branch("lkb_origin", 7), Branch("small_conv", 3)
            found.append(Block(f"network.{embed}.proj.0", "lkb_reparam", (dim, 1, 7, 7), large))
            found.append(_mobile_one(f"network.{embed}.proj.1", (dim, dim, 1, 1), names, skips=True))
        if position is not None:
            bare = (Branch("pe", 7, normed=False),)
            found.append(Block(f"network.{position}", "reparam_conv", (dim, 1, 7, 7), bare, adds_input=True))
        else:
            mixers = (f"network.{blocks}.{block}.token_mixer" for block in range(config.layers[stage]))
            found += [_rep_mixer(name, dim, names) for name in mixers]
    found.append(_mobile_one("conv_exp", (2 * dims[-1], 1, 3, 3), names))
    return {block.name: block for block in found}


def stage_indices(config: VisionConfig) -> Iterator[tuple[int, int | None, int | None, int]]:
    """For each stage: its number, and the places of its patch embedding, positional convolution and blocks.

    The published names number them flat in one list, `network`.
    """
    index = 0
    for stage in range(len(config.layers)):
        embed = position = None
        if stage:
            embed, index = index, index + 1
        if config.attends(stage):
            position, index = index, index + 1
        yield stage, embed, position, index
        index += 1


def _mobile_one(
    name: str, shape: tuple[int, int, int, int], names: Collection[str], skips: bool = False, scales: bool = True
) -> Block:
    """Kernels of the full size, a 1x1 kernel beside larger ones, the input itself where its shape is the output's."""
    return Block(name, "reparam_conv", shape, _mobile_one_branches(name, shape[-1], names, skips, scales))


def _mobile_one_branches(
    name: str, side: int, names: Collection[str], skips: bool, scales: bool, below: str = ""
) -> tuple[Branch, ...]:
    pattern = re.compile(re.escape(f"{name}.{below}rbr_conv.") + r"(\d+)\.")
    count = 1 + max((int(match[1]) for match in map(pattern.match, names) if match), default=0)
    found = [Branch(f"{below}rbr_conv.{index}", side) for index in range(count)]
    if side > 1 and scales:
        found.append(Branch(f"{below}rbr_scale", 1))
    if skips:
        found.append(Branch(f"{below}rbr_skip", 0))
    return tuple(found)


def _rep_mixer(name: str, dim: int, names: Collection[str]) -> Block:
    """The input, and the scaled difference of a MobileOne block and a batch norm."""
    mixer = _mobile_one_branches(name, 3, names, skips=True, scales=True, below="mixer.")
    branches = (*mixer, Branch("norm.rbr_skip", 0, sign=-1))
    return Block(name, "reparam_conv", (dim, 1, 3, 3), branches, adds_input=True, scale="layer_scale")
