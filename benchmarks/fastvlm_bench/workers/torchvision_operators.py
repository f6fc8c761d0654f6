"""Let torchvision be imported beside a CPU build of torch."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any


@functools.cache  # a second declaration is an error
def declare_torchvision_operators() -> None:
    """Declare those of torchvision's operators that its import extends, where its own don't load.

    timm and transformers import it for transforms that nobody here uses. PyPI's build for Linux wants CUDA's
    libraries, so beside a CPU build of torch its operators don't load, and the import fails at the first one
    that it extends. Declared without a body, they are there by name.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    import torch

    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))  # as torchvision itself does
    except OSError:
        for name in ("nms", "qnms"):
            _operators().define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@functools.cache
def _operators() -> Any:
    """Kept as long as the process: its declarations go when it goes."""
    import torch

    return torch.library.Library("torchvision", "DEF")
