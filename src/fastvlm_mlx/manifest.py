"""manifest.json: where a bundle came from, what was done to it, and what shows that it is right."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fastvlm_mlx.config import from_dict
from fastvlm_mlx.errors import BundleError


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What one file of the bundle must be."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """A fine-tuned adapter that was merged into the weights; `files` maps each file read to its SHA-256."""

    id: str
    files: dict[str, str]
    changes: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where the weights came from; `files` maps each file read to its SHA-256."""

    id: str
    layout: str
    files: dict[str, str]
    revision: str | None = None
    adapter: AdapterRecord | None = None

    @property
    def name(self) -> str:
        """What to call the model."""
        return f"{self.id} with {self.adapter.id}" if self.adapter else self.id


@dataclass(frozen=True, slots=True)
class CheckRecord:
    """One comparison of the Core ML package with its reference.

    Attributes:
        function: of the package, such as "r1024".
        executor: what ran it: "checker, float32", "checker, float16" or "Core ML, CPU_AND_NE" and the like.
        reference: what it was compared with, in words.
        picture: which picture it ran on.
        relative_l2: norm of the difference over the norm of the reference; None where a value isn't finite.
        max_abs: largest absolute difference; None likewise.
        gate: what relative_l2 may be at most.
        first_overflow: the first op beyond float16's range; None if there is none, or it isn't known.
        passed: within the gate, without overflow.
        error: why it couldn't run at all.
    """

    function: str
    executor: str
    reference: str
    picture: str
    relative_l2: float | None
    max_abs: float | None
    gate: float
    first_overflow: str | None
    passed: bool
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CoreMLRecord:
    """How vision.mlpackage was made.

    Attributes:
        calibration: the pictures that the ranges were measured on.
        exponents: "streams", "norms" and "hidden" -> place -> power of two that it is held down by.
        headroom: place -> bits between its largest magnitude and float16's limit, after scaling.
        checks: the gates that were run, and their outcome.
    """

    calibration: str
    exponents: dict[str, dict[str, int]]
    headroom: dict[str, float]
    checks: tuple[CheckRecord, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """manifest.json; `changes` says in words what was done, as the licence of the published weights asks."""

    tool: str
    source: Source
    options: dict[str, object]
    changes: tuple[str, ...]
    files: dict[str, FileRecord]
    licence: str | None = None
    coreml: CoreMLRecord | None = None

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_file(cls, path: Path) -> Manifest:
        """Read a manifest.

        Raises:
            BundleError: missing or unreadable. ConfigError: unknown or missing keys.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as exc:
            raise BundleError(f"can't read {path}: {exc}; convert the model again") from exc
        return from_dict(cls, data, str(path))
