"""Which tensors of a base an adapter changes, and whether the two belong together at all."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from fastvlm_convert.keymap import detect_layout, map_tensors
from fastvlm_convert.lora_config import LoraConfig
from fastvlm_convert.source import Checkpoint, TensorFiles
from fastvlm_mlx.errors import CheckpointError

# `lora_A.weight`, or with the adapter's name between, as older versions of PEFT wrote it.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(?:\.(?!(?:weight|bias)$)\w+)?(?:\.weight)?"
)
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
_ENDS = {"lm_head.weight", "model.embed_tokens.weight"}
_SHOWN = 3  # faults that an error names

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """What an adapter does to one tensor.

    Attributes:
        whole: the adapter's tensor that takes its place.
        factors: names of A and B, whose product is added; () for none.
        scale: what the product is multiplied by.
        is_embedding: the factors are those of the transpose.
    """

    whole: str | None = None
    factors: tuple[str, ...] = ()
    scale: float = 1.0
    is_embedding: bool = False


def plan_changes(
    base: Checkpoint, folder: Path, config: LoraConfig, adapter: TensorFiles, rest: TensorFiles
) -> dict[str, Change]:
    """What an adapter does to the tensors of a base.

    Args:
        base: the checkpoint as it lies there.
        folder: the adapter's, for messages.
        config: of the adapter.
        adapter: its factors, and what it holds whole.
        rest: LLaVA's other trained tensors, all whole.

    Returns:
        The base's own name of a tensor -> what becomes of it.

    Raises:
        CheckpointError: the adapter doesn't fit the base; names the first faults.
    """
    plan = _Plan(base, config)
    pairs: dict[tuple[str, bool], dict[str, str]] = {}
    for files in (adapter, rest):
        for name, stored in files.tensors.items():
            match = _FACTOR.fullmatch(name) if files is adapter else None
            if match:
                pair = pairs.setdefault((match["module"], bool(match["kind"])), {})
                if pair.setdefault(match["factor"], name) != name:
                    raise CheckpointError(f"{folder} holds several adapters; give a folder with one")
            elif "lora_" in name:
                plan.faults.append(f"{name} is no factor A or B")
            else:
                plan.put(_WRAPPER.sub("", name), name, stored.shape)
    for (module, is_embedding), pair in pairs.items():
        if len(pair) < 2:
            plan.faults.append(f"{module} has a factor {next(iter(pair))} without the other")
            continue
        names = (pair["A"], pair["B"])
        plan.add(f"{module}.weight", names, tuple(adapter.tensors[n].shape for n in names), is_embedding)
    if plan.faults:
        raise CheckpointError(_explain(folder, base.path, plan.faults, config))
    plan.check_head(folder)
    if not plan.changes:
        raise CheckpointError(f"{folder} changes nothing; give an adapter as PEFT saves it")
    return plan.changes


def _explain(folder: Path, base: Path, faults: list[str], config: LoraConfig) -> str:
    first, more = "; ".join(faults[:_SHOWN]), len(faults) - _SHOWN
    trained = f", which its config calls {config.base!r}" if config.base else ""
    return (
        f"the adapter {folder} doesn't fit {base}: {first}{f'; and {more} more' if more > 0 else ''}; "
        f"give the base that it was trained on with --base{trained}"
    )


class _Plan:
    """Collects changes by the base's own names, and everything that doesn't fit."""

    def __init__(self, base: Checkpoint, config: LoraConfig) -> None:
        self.changes: dict[str, Change] = {}
        self.faults: list[str] = []
        self._base, self._config = base, config
        self._layout = detect_layout(base.tensors, base.path)
        mapped, _ = map_tensors(base, self._layout)
        self._llava = {tensor.source: name for name, tensor in mapped.items()}
        self._source = {name: tensor.source for name, tensor in mapped.items()} | {n: n for n in base.tensors}

    def put(self, name: str, given: str, shape: Shape) -> None:
        """Put the adapter's tensor `given` in a tensor's place."""
        if (source := self._find(_plain(name))) is None:
            return
        stored = self._base.tensors[source].shape
        if stored != shape:
            self.faults.append(f"{_plain(name)} is {shape} instead of the base's {stored}")
        self.changes[source] = replace(self.changes.get(source, Change()), whole=given)

    def add(self, name: str, factors: tuple[str, str], shapes: tuple[Shape, ...], is_embedding: bool) -> None:
        """Add a product to a tensor: A (r, in) and B (out, r) to (out, in); a convolution's kernel is A's."""
        plain = _plain(name)
        if (source := self._find(plain)) is None:
            return
        weight, module = self._base.tensors[source].shape, plain.removesuffix(".weight")
        rank = self._config.rank_of(module)
        right: tuple[Shape, ...] = ((rank, *weight[1:]), (*weight[:1], rank, *(1 for _ in weight[2:])))
        if is_embedding:
            right = ((rank, *weight[:1]), (*weight[1:], rank))
        if len(weight) < 2 or shapes != right:
            self.faults.append(f"{plain} {weight} can't take factors of {shapes[0]} and {shapes[1]} with rank {rank}")
        change = self.changes.get(source, Change())
        scale = self._config.scale_of(module)
        self.changes[source] = replace(change, factors=factors, scale=scale, is_embedding=is_embedding)

    def _find(self, plain: str) -> str | None:
        """The base's own name of a tensor; notes why it can't be changed."""
        source = self._source.get(plain)
        if source is None:
            self.faults.append(f"the base has no {plain}")
            return None
        stored = self._base.tensors[source]
        if stored.dtype == "U32":
            self.faults.append(f"the base's {plain} is quantised")
        elif len(stored.shape) > 2 and self._layout.channels_last:
            self.faults.append(f"the base's {plain} is stored channels last")
        return source

    def check_head(self, folder: Path) -> None:
        """Refuse to change one of two that the base holds as one."""
        config = self._base.config
        tied = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings", False))
        ends = sorted(_ENDS & {self._llava.get(source, "") for source in self.changes})
        if ends and (tied or "lm_head.weight" not in self._source):
            raise CheckpointError(
                f"{folder} changes {' and '.join(ends)}, but the base's head is its embedding (tie_word_embeddings); "
                "merge it with PEFT and convert the result"
            )


def _plain(name: str) -> str:
    """A tensor's name in the model that was wrapped."""
    name = name.removeprefix("base_model.")
    return name.removeprefix("model.") if name.startswith(("model.model.", "model.lm_head.")) else name
