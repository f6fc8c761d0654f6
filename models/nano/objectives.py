"""What is minimised and what is counted: linear heads on 4x4 cells, and the next token of answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano.network import NanoVLM
from nano.targets import IGNORE, Batch, attention_mask

GRID = 4  # cells of a scene per side
TARGETS = ("background", "shape", "colour", "letters")


class Heads(nn.Module):
    """Linear classifiers on features: cheap targets that teach the encoder to see.

    Args:
        features: channels.
        backgrounds, shapes, colours, letters: classes, "none" included.
        places: characters of a cell.
    """

    def __init__(self, features: int, backgrounds: int, shapes: int, colours: int, letters: int, places: int) -> None:
        super().__init__()
        self.background = nn.Linear(features, backgrounds)
        self.shape, self.colour = nn.Linear(features, shapes), nn.Linear(features, colours)
        self.letters, self.places = nn.Linear(features, places * letters), places

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """(B, N, C) -> logits: background (B, K), the others (B, 4, 4, K), letters (B, 4, 4, places, K)."""
        batch, tokens, channels = features.shape
        side = int(tokens**0.5)
        cells = features
        if side != GRID:  # larger pictures have more tokens than cells
            grid = features.transpose(1, 2).reshape(batch, channels, side, side)
            cells = F.adaptive_avg_pool2d(grid, GRID).flatten(2).transpose(1, 2)
        cells = cells.reshape(batch, GRID, GRID, channels)
        return {
            "background": self.background(features.mean(1)),
            "shape": self.shape(cells),
            "colour": self.colour(cells),
            "letters": self.letters(cells).unflatten(-1, (self.places, -1)),
        }


def head_targets(batch: Batch) -> dict[str, Tensor]:
    """The right classes, in the heads' shapes; IGNORE for a background that is none of the plain ones."""
    background = batch["background"]
    return {
        "background": torch.where(background < 0, IGNORE, background),
        "shape": batch["cells"][..., 0],
        "colour": batch["cells"][..., 1],
        "letters": batch["letters"],
    }


def head_loss(logits: dict[str, Tensor], batch: Batch) -> Tensor:
    """Sum of the four cross-entropies.

    A cell that holds something weighs as much as all the empty ones would: most cells are empty, and of their
    places for characters most are, too.
    """
    total = torch.zeros((), device=batch["pixels"].device)
    for name, right in head_targets(batch).items():
        loss = F.cross_entropy(logits[name].flatten(0, -2), right.flatten(), ignore_index=IGNORE, reduction="none")
        known = right.flatten() != IGNORE
        if name == "background":
            total = total + loss.sum() / known.sum().clamp(min=1)
            continue
        full = (right.flatten() > 0).float()
        empty = 1.0 - full
        total = total + (loss * full).sum() / full.sum().clamp(min=1) + (loss * empty).sum() / empty.sum().clamp(min=1)
    return total


def head_counts(logits: dict[str, Tensor], batch: Batch) -> dict[str, tuple[int, int]]:
    """Right and all, per target; of cells only those that hold something count."""
    out = {}
    for name, right in head_targets(batch).items():
        counted = right != IGNORE if name == "background" else right > 0
        hits = (logits[name].argmax(-1) == right) & counted
        out[name] = (int(hits.sum()), int(counted.sum()))
    return out


def answer_logits(model: NanoVLM, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (M, V) and labels (M,) of all positions that predict a token of an answer."""
    image = model.projector(features)
    start = int(batch["image_start"])
    embedded = model.decoder.model.embed_tokens(batch["ids"])
    embedded = torch.cat([embedded[:, :start], image, embedded[:, start + image.shape[1] :]], dim=1)
    hidden = model.decoder.model(
        inputs_embeds=embedded,
        attention_mask=attention_mask(batch["segment"]),
        position_ids=batch["position"],
        use_cache=False,
    ).last_hidden_state
    learnt = batch["label"] != IGNORE
    return model.decoder.lm_head(hidden[learnt]), batch["label"][learnt]


def exact_matches(logits: Tensor, labels: Tensor, batch: Batch) -> Tensor:
    """(Q,) True where greedy decoding would give the answer, token by token to its end.

    The most likely token after a right beginning is what greedy decoding takes, so if every one of them is
    right under the right answer's own tokens, the decoded answer is the right one.
    """
    owner = batch["owner"][batch["label"] != IGNORE]
    wrong = torch.zeros(len(batch["kind"]), dtype=torch.long, device=labels.device)
    wrong.index_add_(0, owner, (logits.argmax(-1) != labels).long())
    return wrong == 0
