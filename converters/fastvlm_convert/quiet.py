"""Keep what coremltools says of itself off the user's terminal."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def quiet() -> Iterator[None]:
    """Silence coremltools' progress bars and version warnings, and torch's warnings of an export."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # they log to the root logger too; what fails raises besides
    # Their bars take no option and know of no logger, so new bars are made disabled for this while.
    original = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(original, disable=True)  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        tqdm.__init__ = original  # type: ignore[method-assign]
        logging.disable(before)
