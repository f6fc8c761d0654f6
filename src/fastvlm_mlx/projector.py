"""What turns vision features into the decoder's embeddings."""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.config import ProjectorConfig


class MLPProjector(nn.Module):
    """Linear layers, exact GELU between them: LLaVA's `linear`, `mlpNx_gelu` and, without any, `identity`.

    The layers are `linear_1`, `linear_2` and so on. It holds AnyRes' line break where there is one.
    """

    def __init__(self, config: ProjectorConfig, newline: bool = False) -> None:
        super().__init__()
        self._depth = config.depth
        widths = [config.input_dim] + [config.hidden_dim] * config.depth
        for number, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            self[f"linear_{number}"] = nn.Linear(inputs, outputs)
        if newline:
            self.image_newline = mx.zeros((config.hidden_dim,))

    @property
    def newline(self) -> mx.array | None:
        """(hidden,), AnyRes' line break; None where the weights have none."""
        return self.image_newline if "image_newline" in self else None

    def __call__(self, features: mx.array) -> mx.array:
        """(..., C) -> (..., hidden)."""
        for number in range(1, self._depth + 1):
            features = self[f"linear_{number}"](features if number == 1 else nn.gelu(features))
        return features
