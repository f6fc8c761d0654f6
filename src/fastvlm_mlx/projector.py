"""The MLP that turns vision features into the decoder's embeddings."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from fastvlm_mlx.config import ProjectorConfig
from fastvlm_mlx.errors import ConfigError


class MLPProjector(nn.Module):
    """linear, exact GELU, linear (LLaVA's `mlp2x_gelu`); holds AnyRes' line break where there is one."""

    def __init__(self, config: ProjectorConfig, newline: bool = False) -> None:
        super().__init__()
        if config.kind != "mlp2x_gelu":
            raise ConfigError(f"projector.kind is {config.kind!r}; this version knows mlp2x_gelu")
        self.linear_1 = nn.Linear(config.input_dim, config.hidden_dim)
        self.linear_2 = nn.Linear(config.hidden_dim, config.hidden_dim)
        if newline:
            self.image_newline = mx.zeros((config.hidden_dim,))

    @property
    def newline(self) -> mx.array | None:
        """(hidden,), AnyRes' line break; None where the weights have none."""
        return self.image_newline if "image_newline" in self else None

    def __call__(self, features: mx.array) -> mx.array:
        """(..., C) -> (..., hidden)."""
        return self.linear_2(nn.gelu(self.linear_1(features)))
