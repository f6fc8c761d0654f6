"""What we use of mlx-lm, without what its package imports first.

`import mlx_lm` brings in transformers, and torch where that is installed: 1.3 to 3.3 s, of which the decoder, the
caches and the samplers need nothing; they take 20 ms. So the package is registered with its own folder, but its
`__init__` doesn't run before somebody asks the package for a name; both ways of using it work, in either order.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

PACKAGE = "mlx_lm"
_ITS_OWN = ("__version__", "__all__")  # of the names with underscores, those that `__init__` defines


class _Deferred(ModuleType):
    """A package whose `__init__` runs when a name is asked for that it would define."""

    def __getattr__(self, name: str) -> object:
        spec = self.__spec__
        if (name.startswith("__") and name not in _ITS_OWN) or spec is None or spec.loader is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self.__class__ = ModuleType  # type: ignore[assignment]  # from here on an ordinary package
        try:
            spec.loader.exec_module(self)
        except BaseException:
            self.__class__ = _Deferred  # fails again, in the same way, for the next one who asks
            raise
        return getattr(self, name)


def _register() -> None:
    """Put the package into sys.modules, unless somebody has imported it already."""
    spec = None if PACKAGE in sys.modules else importlib.util.find_spec(PACKAGE)
    if spec is not None:
        package = importlib.util.module_from_spec(spec)
        package.__class__ = _Deferred
        sys.modules[PACKAGE] = package


_register()

from mlx_lm.models import llama, qwen2  # noqa: E402
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache  # noqa: E402
from mlx_lm.sample_utils import make_logits_processors, make_sampler  # noqa: E402

__all__ = [
    "KVCache",
    "QuantizedKVCache",
    "RotatingKVCache",
    "llama",
    "make_logits_processors",
    "make_sampler",
    "qwen2",
]
