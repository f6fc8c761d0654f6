"""A LoRA adapter's adapter_config.json, as PEFT writes it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastvlm_convert.source import read_json
from fastvlm_mlx.errors import CheckpointError

_T = TypeVar("_T")
ADAPTER_CONFIG = "adapter_config.json"

# What may be set without another way to merge: the names of the layers show in the tensors' own names, dropout and
# the way of initialising are over, `fan_in_fan_out` is for layers that no FastVLM has (PEFT ignores it for others).
_HARMLESS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "modules_to_save", "parent_library", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type",
    "use_rslora",
}  # fmt: skip
# These start by changing the weights of the base, so the published base isn't what the adapter goes with.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """How an adapter is merged.

    Attributes:
        rank: columns of A and rows of B, where `rank_pattern` has no other.
        alpha: the numerator of the scale, where `alpha_pattern` has no other.
        rslora: divide it by the root of the rank instead of by the rank.
        rank_pattern: regular expression for the end of a module's name -> its rank.
        alpha_pattern: the same for alpha.
        base: what the adapter was trained on, as the config says; a folder or a name on a hub.
    """

    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base: str | None

    def rank_of(self, module: str) -> int:
        """A module's rank."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by, before it is added to a module's weight."""
        rank, alpha = self.rank_of(module), _matching(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter instead of a checkpoint."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_lora_config(folder: Path) -> LoraConfig:
    """Read an adapter's config.

    Raises:
        CheckpointError: not there, of another kind than LoRA, or with a setting that this version can't merge.
    """
    path = folder / ADAPTER_CONFIG
    raw = read_json(path)
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {raw.get('peft_type')!r}; this version merges LORA adapters")
    if unknown := sorted(key for key, value in raw.items() if value and key not in _HARMLESS):
        raise CheckpointError(
            f"{path} sets {', '.join(unknown)}, which this version can't merge; merge it with PEFT "
            "(merge_and_unload) and convert the result"
        )
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"{path}: init_lora_weights is {start!r}, which changes the base; save the adapter as plain LoRA "
            "(PEFT's path_initial_model_for_weight_conversion), or merge it with PEFT and convert the result"
        )
    try:
        return _parse(raw)
    except (TypeError, ValueError, AttributeError, OverflowError, re.error) as exc:
        raise CheckpointError(f"{path}: a value has another type than PEFT writes ({exc})") from exc


def _parse(raw: Mapping[str, Any]) -> LoraConfig:
    base, rslora = raw.get("base_model_name_or_path"), raw.get("use_rslora")
    if not isinstance(base, str | None) or not isinstance(rslora, bool | None):
        raise TypeError(f"base_model_name_or_path {base!r}, use_rslora {rslora!r}")
    return LoraConfig(
        rank=_rank(raw.get("r", 8)),
        alpha=_alpha(raw.get("lora_alpha", 8)),
        rslora=bool(rslora),
        rank_pattern={re.compile(k).pattern: _rank(v) for k, v in (raw.get("rank_pattern") or {}).items()},
        alpha_pattern={re.compile(k).pattern: _alpha(v) for k, v in (raw.get("alpha_pattern") or {}).items()},
        base=base,
    )


def _rank(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"a rank of {value!r}")
    return value


def _alpha(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"an alpha of {value!r}")
    return float(value)


def _matching(patterns: Mapping[str, _T], module: str, default: _T) -> _T:
    """The value of the first pattern that matches a name, or its last parts."""
    return next((v for key, v in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{key})", module)), default)
