"""The six stages: what each trains, and how fast.

The order is a finding: end to end from nothing, the decoder learns the answers' grammar and then answers by
chance for a long time. An encoder that first learnt what stands in which cell gives it something to talk about.

So is the encoder's rate, and the small batch: with 2e-3 and 32 pictures it named no letter after 40,000 pictures; with
1e-2 and 8 to 16 one in seven after 1,600 pages. No layer on its main path normalises, and the gradient is clipped.

The decoder wants less. Asked for colours alone, of features that say them, it was at chance (12 %) after 250 steps with
2e-3 and 5e-3, at 28 % with 5e-4, and at 40 % where its embeddings start five times as large, too. With these, 1e-3 is
faster still: asked for everything, 41 % of the kinds of shapes instead of 22 % after 200 steps, and 62 % where every
question weighs the same (`objectives.answer_loss`). It learns fastest while the encoder stands still: 500 steps of
everything, the encoder at 1e-3, took exact answers from 47 % to 41 %, where as many of the decoder alone add 5 points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn, optim

WARMUP = 100  # steps, or a tenth of a short stage
LAST_RATE = 0.02  # of the highest, at the end of a stage
WEIGHT_DECAY = 0.05
CLIP = 1.0
# Weights of the dense heads' loss. Most of it reaches the first three stages without passing the last two, and it has
# many positions for every cell; beside answers it is only there to keep what was learnt.
DENSE, DENSE_BESIDE_ANSWERS = 1.0, 0.1


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage of the training.

    Attributes:
        rates: part of the model -> its highest learning rate; parts that are not named are frozen.
        heads: weight of the linear heads' loss.
        dense: weight of the loss of those on the maps inside the encoder.
        answers: whether answers are learnt. Batch norms then keep their statistics: the decoder has learnt on features
            made with them, and those of 16 pictures would be others in every step.
        pages: part of the pictures that are pages full of text, about which nothing is asked.
        signs: part of them that are scenes with a sign, beside those among the others.
        shapes: part of them that are scenes of shapes, beside those among the others.
        zoom: side of the pictures, as a part of the model's. The work grows with its square, and most is learnt on
            small ones as well: exact answers fell from 87 % at 256 px to 72 % at 320 px, and were 82 % after seven
            minutes of the readers alone.
    """

    name: str
    rates: Mapping[str, float]
    heads: float
    dense: float
    answers: bool
    pages: float = 0.0
    signs: float = 0.0
    shapes: float = 0.0
    zoom: float = 1.0

    def side(self, model: int) -> int:
        """Side of the pictures in pixels, for a model's: the nearest multiple of 64 that the encoder can have."""
        return max(round(self.zoom * model / 64), 1) * 64

    def trains(self, part: str) -> bool:
        """Whether a part's weights change."""
        return part in self.rates


STAGES = (
    Stage(
        "encoder",
        {"early": 1e-2, "late": 1e-2, "heads": 1e-2},
        heads=1.0,
        dense=DENSE,
        answers=False,
        pages=0.6,
        zoom=0.8,
    ),
    Stage("projector", {"projector": 1e-3, "decoder": 1e-3}, heads=0.0, dense=0.0, answers=True, zoom=0.8),
    Stage(
        "everything",
        {"early": 3e-4, "late": 3e-4, "projector": 5e-4, "decoder": 5e-4, "heads": 3e-4},
        heads=0.5,
        dense=DENSE_BESIDE_ANSWERS,
        answers=True,
        pages=0.3,
        zoom=0.8,
    ),
    Stage(
        "readers",
        {"projector": 1e-3, "decoder": 1e-3, "heads": 1e-2},
        heads=1.0,
        dense=DENSE,
        answers=True,
        signs=0.4,
    ),
    Stage(
        "signs",
        {"early": 3e-4, "late": 1e-3, "projector": 7e-4, "decoder": 5e-4, "heads": 2e-3},
        heads=0.05,
        dense=DENSE_BESIDE_ANSWERS,
        answers=True,
        signs=0.4,
    ),
    Stage(
        "shapes",
        {"early": 2e-4, "late": 6e-4, "projector": 5e-4, "decoder": 5e-4},
        heads=0.0,
        dense=0.0,
        answers=True,
        signs=0.2,
        shapes=0.3,
    ),
)


STARTED = 3  # where a run begins that has the weights of a checkpoint, which has no heads; 0 steps leave a stage out


def outline(side: int) -> list[list[str | int]]:
    """Name and pictures' side of each stage, for a model's side; a run goes on only with those that it began with."""
    return [[stage.name, stage.side(side)] for stage in STAGES]


def rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to LAST_RATE."""
    warmup = min(WARMUP, max(steps // 10, 1))
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def freeze(parts: Mapping[str, nn.Module], stage: Stage) -> None:
    """Let a stage's parts train, and no others."""
    for name, module in parts.items():
        trains = stage.trains(name)
        module.train(trains)
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.train(trains and not stage.answers)
        for parameter in module.parameters():
            parameter.requires_grad_(trains)


def make_optimizer(parts: Mapping[str, nn.Module], stage: Stage) -> optim.AdamW:
    """AdamW; only matrices and kernels decay."""
    groups = []
    for name, rate in stage.rates.items():
        named = list(parts[name].named_parameters())
        scales = [p for n, p in named if p.ndim < 2 or "layer_scale" in n]
        matrices = [p for n, p in named if p.ndim >= 2 and "layer_scale" not in n]
        groups.append({"params": matrices, "lr": rate, "peak": rate, "weight_decay": WEIGHT_DECAY})
        groups.append({"params": scales, "lr": rate, "peak": rate, "weight_decay": 0.0})
    return optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def set_rate(optimizer: optim.Optimizer, factor: float) -> None:
    """Bring every group to this part of its highest rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor
