"""FastVLM on Apple silicon: ask about an image, get the first token in a fraction of a second.

    from fastvlm_mlx import load

    model = load()
    print(model.generate("photo.jpg", "What is in this picture?"))

Importing this package is cheap: MLX and everything else heavy is imported by `load()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastvlm_mlx._version import __version__

if TYPE_CHECKING:
    from fastvlm_mlx.chat import Chat
    from fastvlm_mlx.errors import FastVLMError
    from fastvlm_mlx.loading import load
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.types import Frame, GenerationResult, ImageFeatures, Piece, Timings
    from fastvlm_mlx.video import read_frames
    from fastvlm_mlx.watch import FrameAnswer

__all__ = [
    "Chat",
    "FastVLM",
    "FastVLMError",
    "Frame",
    "FrameAnswer",
    "GenerationResult",
    "ImageFeatures",
    "Piece",
    "Timings",
    "__version__",
    "load",
    "read_frames",
]

_HOMES = {
    "Chat": "chat",
    "FastVLM": "model",
    "FastVLMError": "errors",
    "Frame": "types",
    "FrameAnswer": "watch",
    "GenerationResult": "types",
    "ImageFeatures": "types",
    "Piece": "types",
    "Timings": "types",
    "load": "loading",
    "read_frames": "video",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562), so that `import fastvlm_mlx` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fastvlm_mlx' has no attribute {name!r}")
    from importlib import import_module

    from fastvlm_mlx.accelerate import prepare_cpu

    prepare_cpu()
    return getattr(import_module(f"fastvlm_mlx.{_HOMES[name]}"), name)
