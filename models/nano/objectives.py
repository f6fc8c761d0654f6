"""What is minimised and what is counted: linear heads on cells and finer maps, and the next token of answers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nano.network import NanoVLM
from nano.targets import IGNORE, Batch, attention_mask

GRID = 4  # cells of a scene per side
TARGETS = ("background", "shape", "colour", "ninth", "ink", "letters")
NINTHS = 9  # of a picture, in which its things are said to be
# In the order of a scene's dense grid; then letters by their centres, as the map of stage 4 and the features have them.
DENSE_TARGETS = ("shape", "colour", "letter", "spot within", "spot")


class Heads(nn.Module):
    """Linear classifiers on features and on the encoder's maps: cheap targets that teach the encoder to see.

    Args:
        features: channels.
        maps: channels of the maps of stages 3 and 4.
        backgrounds, shapes, colours, letters: classes, "none" included.
        places: characters of a cell.
    """

    def __init__(
        self,
        features: int,
        maps: tuple[int, int],
        backgrounds: int,
        shapes: int,
        colours: int,
        letters: int,
        places: int,
    ) -> None:
        super().__init__()
        self.background = nn.Linear(features, backgrounds)
        self.shape, self.colour = nn.Linear(features, shapes), nn.Linear(features, colours)
        self.ninth, self.ink = nn.Linear(features, NINTHS + 1), nn.Linear(features, colours)
        self.letters, self.places = nn.Linear(features, places * letters), places
        self.classes = [shapes, colours, letters]
        self.fine, self.coarse = nn.Linear(maps[0], sum(self.classes)), nn.Linear(maps[1], shapes + colours)
        self.spots = nn.ModuleList([nn.Linear(maps[1], 4 * letters), nn.Linear(features, 16 * letters)])

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
            "ninth": self.ninth(cells),
            "ink": self.ink(cells),
            "letters": self.letters(cells).unflatten(-1, (self.places, -1)),
        }

    @property
    def on_features(self) -> Tensor:
        """(K, C) weights of all heads on the features."""
        heads = (self.background, self.shape, self.colour, self.ninth, self.ink, self.letters)
        return torch.cat([head.weight for head in heads])

    def dense(self, maps: Sequence[Tensor], features: Tensor) -> list[Tensor]:
        """Maps (B, C, H, W) of stages 3 and 4, features (B, N, C) -> logits (B, H, W, K) in `dense_targets`' order."""
        fine, coarse = (x.permute(0, 2, 3, 1) for x in maps)
        side = int(features.shape[1] ** 0.5)
        grids = coarse, features.unflatten(1, (side, side))
        spots = [_unfold(head(grid), self.classes[-1]) for head, grid in zip(self.spots, grids, strict=True)]
        return [*self.fine(fine).split(self.classes, -1), *self.coarse(coarse).split(self.classes[:2], -1), *spots]


def _unfold(logits: Tensor, classes: int) -> Tensor:
    """(B, h, w, r * r * K) -> (B, h * r, w * r, K): what a coarse position says of each finer one within it."""
    batch, height, width, channels = logits.shape
    ratio = round((channels // classes) ** 0.5)
    split = logits.reshape(batch, height, width, ratio, ratio, classes).transpose(2, 3)
    return split.reshape(batch, height * ratio, width * ratio, classes)


def dense_targets(batch: Batch) -> list[Tensor]:
    """The right classes.

    Shape, colour and letter at stage 3's stride, shape and colour at stage 4's, and twice, for the map of stage 4 and
    for the features, the letters whose centres lie at each position of stage 3's.
    """
    shape, colour, letter = batch["dense"].unbind(-1)
    # Of four positions one stands for all, shapes before bars; both numbers come from the same one.
    code = F.max_pool2d((shape * 64 + colour).float(), 2).long()
    return [shape, colour, letter, code // 64, code % 64, batch["spots"], batch["spots"]]


def dense_loss(logits: Sequence[Tensor], batch: Batch) -> Tensor:
    """Sum of the cross-entropies of all dense heads."""
    pairs = zip(logits, dense_targets(batch), strict=True)
    return torch.stack([_balanced(found, right) for found, right in pairs]).sum()


def dense_counts(logits: Sequence[Tensor], batch: Batch) -> dict[str, tuple[int, int]]:
    """Right and all, of DENSE_TARGETS; only positions that hold something count."""
    measured = zip(logits, dense_targets(batch), strict=True)
    named = zip(DENSE_TARGETS, [pair for index, pair in enumerate(measured) if index not in (3, 4)], strict=True)
    return {name: _hits(found, right, right > 0) for name, (found, right) in named}


def _balanced(logits: Tensor, right: Tensor) -> Tensor:
    """Cross-entropy in which all that holds something weighs as much as all that is empty; IGNORE weighs nothing."""
    loss = F.cross_entropy(logits.flatten(0, -2), right.flatten(), reduction="none")
    full = (right.flatten() > 0).float()
    empty = (right.flatten() == 0).float()
    return (loss * full).sum() / full.sum().clamp(min=1) + (loss * empty).sum() / empty.sum().clamp(min=1)


def _hits(logits: Tensor, right: Tensor, counted: Tensor) -> tuple[int, int]:
    return int(((logits.argmax(-1) == right) & counted).sum()), int(counted.sum())


def head_targets(batch: Batch) -> dict[str, Tensor]:
    """The right classes, in the heads' shapes; IGNORE for a background that is none of the plain ones."""
    background = batch["background"]
    return {
        "background": torch.where(background < 0, IGNORE, background),
        "shape": batch["cells"][..., 0],
        "colour": batch["cells"][..., 1],
        "ninth": batch["cells"][..., 2],
        "ink": batch["inks"],
        "letters": batch["letters"],
    }


def head_loss(logits: dict[str, Tensor], batch: Batch) -> Tensor:
    """Sum of the cross-entropies.

    A cell that holds something weighs as much as all the empty ones would: most cells are empty, and of their
    places for characters most are, too.
    """
    right = head_targets(batch)
    known = right["background"] != IGNORE
    total = F.cross_entropy(logits["background"], right["background"], ignore_index=IGNORE, reduction="sum")
    total = total / known.sum().clamp(min=1)
    for name in TARGETS[1:]:
        total = total + _balanced(logits[name], right[name])
    return total


def head_counts(logits: dict[str, Tensor], batch: Batch) -> dict[str, tuple[int, int]]:
    """Right and all, per target; of cells only those that hold something count."""
    out = {}
    for name, right in head_targets(batch).items():
        counted = right != IGNORE if name == "background" else right > 0
        out[name] = _hits(logits[name], right, counted)
    return out


def answer_logits(model: NanoVLM, features: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits (M, V) and labels (M,) of all positions that predict a token of an answer."""
    learnt = batch["label"] != IGNORE
    asked = learnt.any(1)  # pages have no questions
    image = model.projector(features[asked])
    start = int(batch["image_start"])
    embedded = model.decoder.model.embed_tokens(batch["ids"][asked])
    embedded = torch.cat([embedded[:, :start], image, embedded[:, start + image.shape[1] :]], dim=1)
    hidden = model.decoder.model(
        inputs_embeds=embedded,
        attention_mask=attention_mask(batch["segment"][asked]),
        position_ids=batch["position"][asked],
        use_cache=False,
    ).last_hidden_state
    return model.decoder.lm_head(hidden[learnt[asked]]), batch["label"][learnt]


def answer_loss(logits: Tensor, labels: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in which every question weighs the same, however long its answer.

    Most tokens are those of descriptions and of spelt words. Where each token weighed the same, the decoder named 13 %
    of the colours after 200 steps; so, 22 %.
    """
    owner = batch["owner"][batch["label"] != IGNORE]
    lengths = torch.bincount(owner, minlength=len(batch["kind"]))
    return (F.cross_entropy(logits, labels, reduction="none") / lengths[owner]).sum() / len(lengths)


def exact_matches(logits: Tensor, labels: Tensor, batch: Batch) -> Tensor:
    """(Q,) True where greedy decoding would give the answer, token by token to its end.

    The most likely token after a right beginning is what greedy decoding takes, so if every one of them is
    right under the right answer's own tokens, the decoded answer is the right one.
    """
    owner = batch["owner"][batch["label"] != IGNORE]
    wrong = torch.zeros(len(batch["kind"]), dtype=torch.long, device=labels.device)
    wrong.index_add_(0, owner, (logits.argmax(-1) != labels).long())
    return wrong == 0
