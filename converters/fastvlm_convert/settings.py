"""Settings of a source's config that change what a model computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastvlm_mlx.errors import CheckpointError


def require(raw: Mapping[str, Any], key: str, allowed: tuple[object, ...]) -> None:
    """Raise CheckpointError, naming what is known, unless a key has one of these values; None allows none at all."""
    if raw.get(key) not in allowed:
        named = ", ".join(repr(value) for value in allowed if value is not None) or "nothing"
        raise CheckpointError(f"{key} is {raw[key]!r}; this version knows {named}")
