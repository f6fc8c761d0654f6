"""The projector's start: what the linear heads read of the features, each direction at the same size.

The encoder's features have a few channels that are fifty times larger than the others. A projector with the usual
initialisation passes little but those on; the heads, which are linear too, read colours and shapes from the same
features in 97 of 100 cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOOR = 0.03  # of the largest spread: directions below it are mostly noise and are not brought to full size
EMBEDDED = 0.5  # root mean square of the image's embeddings; text starts with 0.1


@torch.no_grad()
def start_projector(projector: nn.Sequential, heads: Tensor, features: Tensor) -> None:
    """Set both layers of a projector.

    Args:
        projector: (C -> D), GELU, (D -> D).
        heads: (K, C) weights of everything that reads the features linearly.
        features: (N, C) of some pictures.
    """
    first, last = projector[0], projector[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    mean = features.mean(0)
    logits = (features - mean) @ heads.T
    size = logits.std(0).clamp(min=1e-6)  # a class that is rare counts as much as one that is not
    read, heads = logits / size, heads / size[:, None]
    _, spread, directions = torch.linalg.svd(read, full_matrices=False)
    kept = min(first.out_features, len(spread))
    spread = spread[:kept].clamp(min=FLOOR * float(spread[0])) / len(features) ** 0.5
    whitened = (directions[:kept] @ heads) / spread[:, None]  # (kept, C)
    mixing = torch.empty(first.out_features, kept, device=features.device)
    nn.init.orthogonal_(mixing, gain=(first.out_features / kept) ** 0.5)  # GELU would lose each direction's one side
    first.weight.copy_(mixing @ whitened)
    first.bias.copy_(-first.weight @ mean)
    hidden = nn.functional.gelu(first(features))
    middle = hidden.mean(0)
    nn.init.orthogonal_(last.weight)
    last.weight.mul_(EMBEDDED / float(((hidden - middle) @ last.weight.T).square().mean().sqrt()))
    last.bias.copy_(-(last.weight @ middle))
