"""What answers about a live source leave in a model's caches, and how it goes again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fastvlm_mlx.cache import common_length

if TYPE_CHECKING:
    from fastvlm_mlx.engine import Engine


class Remains:
    """The rows of the latest prompt with its answer, and the features of its picture.

    What was there before stays, and what somebody else has asked for since, such as a chat about a frame.

    Args:
        engine: whose caches they are in.
    """

    def __init__(self, engine: Engine) -> None:
        self._rows, self._features = engine.prefixes, engine.vision.cache
        self._keys = np.zeros((0, 3), np.int64)  # of the prompt and its answer
        self._own = 0  # the first position that wouldn't be there without the watching
        self._common = 0  # positions that the prompt shares with the one before it
        self._digest: bytes | None = None  # of the picture; None if its features would be there anyway
        self._asked = self._answered = 0  # moments of the rows' clock
        self._seen = 0  # a moment of the features' clock

    def make_way(self, keys: np.ndarray, digest: bytes) -> None:
        """Forget what the latest prompt needed and the next one doesn't.

        Args:
            keys: of the next one's positions; see `cache.position_keys`.
            digest: of its picture.
        """
        wanted = self._rows.used_since(self._keys, self._answered)
        self._own = max(self._own, wanted)
        self._common = common_length(self._keys, keys)
        self._rows.drop(self._keys, max(self._common, self._own))
        # Who asked about the picture may do so again where its rows are of no use: in another place of a prompt.
        if wanted > _image_start(self._keys) or (self._digest and self._features.used_since(self._digest, self._seen)):
            self._digest = None
        if self._digest != digest:
            if self._digest:
                self._features.drop(self._digest)
            self._digest = None if self._features.get(digest) else digest
        self._asked = self._rows.clock

    def note(self, keys: np.ndarray) -> None:
        """Remember what the answer to the prompt of `make_way` has left.

        Args:
            keys: of the positions of the prompt and of its answer.
        """
        # What was there and isn't of the prompt before is somebody else's.
        known = self._rows.older_than(keys, self._asked)
        self._own = known if known > self._common else min(self._own, known)
        self._keys, self._answered, self._seen = keys, self._rows.clock, self._features.clock


def _image_start(keys: np.ndarray) -> int:
    """Where a prompt's picture begins; its end where there is none."""
    found = np.flatnonzero(keys[:, 2] >= 0)
    return int(found[0]) if len(found) else len(keys)
