"""Which tensors of a base an adapter changes, and whether the two belong together at all."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from fastvlm_convert.configs import read_config
from fastvlm_convert.keymap import detect_layout, llava_name, map_tensors
from fastvlm_convert.lora_config import LoraConfig
from fastvlm_convert.lora_model import vocabulary_error
from fastvlm_convert.source import Checkpoint, StoredTensor, TensorFiles
from fastvlm_mlx.errors import CheckpointError

# `lora_A.weight`, or with the adapter's name between, as older versions of PEFT wrote it.
_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<factor>[AB])(?:\.(?!(?:weight|bias)$)\w+)?(?:\.weight)?"
)
_WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
_EMBEDDING = "model.embed_tokens.weight"
_ENDS = {"lm_head.weight", _EMBEDDING}
_NEWLINE = "model.image_newline"  # AnyRes' line break: a model that learns to unpad tiles has it, its base needn't
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
        added: what `whole` becomes, where the base has no such tensor.
    """

    whole: str | None = None
    factors: tuple[str, ...] = ()
    scale: float = 1.0
    is_embedding: bool = False
    added: StoredTensor | None = None


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
                plan.put(_WRAPPER.sub("", name), stored)
    for (module, is_embedding), pair in pairs.items():
        if len(pair) < 2:
            plan.faults.append(f"{module} has a factor {next(iter(pair))} without the other")
            continue
        names = (pair["A"], pair["B"])
        plan.add(f"{module}.weight", names, tuple(adapter.tensors[n].shape for n in names), is_embedding)
    if plan.faults:
        raise CheckpointError(_explain(folder, base.path, plan.faults, config))
    if plan.resized:
        raise vocabulary_error(folder, base.path, *plan.resized)
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
    """Collects changes by the base's own names, and everything that doesn't fit.

    Attributes:
        changes: what `plan_changes` returns.
        faults: in words.
        resized: tokens of the adapter's vocabulary and of the base's, where they differ; () where not.
    """

    def __init__(self, base: Checkpoint, config: LoraConfig) -> None:
        self.changes: dict[str, Change] = {}
        self.faults: list[str] = []
        self.resized: tuple[int, ...] = ()
        self._base, self._config = base, config
        self._layout = detect_layout(base.tensors, base.path)
        mapped, _ = map_tensors(base, self._layout)
        self._llava = {tensor.source: name for name, tensor in mapped.items()}
        self._source = {name: tensor.source for name, tensor in mapped.items()} | {n: n for n in base.tensors}

    def put(self, name: str, given: StoredTensor) -> None:
        """Put the adapter's tensor `given` in a tensor's place, or beside the base's where it is the line break."""
        names = _inner_names(name)
        if _NEWLINE in names and _NEWLINE not in self._source:
            self._put_newline(given)
            return
        if (source := self._find(names)) is None:
            return
        stored = self._base.tensors[source].shape
        if self._is_resized(source, given.shape[:1]) and given.shape[1:] == stored[1:]:
            self.resized = (given.shape[0], stored[0])
        elif stored != given.shape:
            self.faults.append(f"{names[0]} is {given.shape} instead of the base's {stored}")
        self.changes[source] = replace(self.changes.get(source, Change()), whole=given.name)

    def add(self, name: str, factors: tuple[str, str], shapes: tuple[Shape, ...], is_embedding: bool) -> None:
        """Add a product to a tensor: A (r, in) and B (out, r) to (out, in); a convolution's kernel is A's."""
        names = _inner_names(name)
        if (source := self._find(names)) is None:
            return
        weight, module = self._base.tensors[source].shape, names[0].removesuffix(".weight")
        rank = self._config.rank_of(module)
        rows = shapes[0][1:2] if is_embedding else shapes[1][:1]
        if self._is_resized(source, rows) and shapes == _factor_shapes((*rows, *weight[1:]), rank, is_embedding):
            self.resized = (rows[0], weight[0])
        elif len(weight) < 2 or shapes != _factor_shapes(weight, rank, is_embedding):
            self.faults.append(
                f"{names[0]} {weight} can't take factors of {shapes[0]} and {shapes[1]} with rank {rank}"
            )
        change = self.changes.get(source, Change())
        scale = self._config.scale_of(module)
        self.changes[source] = replace(change, factors=factors, scale=scale, is_embedding=is_embedding)

    def _put_newline(self, given: StoredTensor) -> None:
        """In the type of the base's embedding, among whose rows it will stand."""
        if llava_name(_NEWLINE, self._layout) != _NEWLINE:
            self.faults.append(f"a base in the {self._layout.name} layout has no place for {_NEWLINE}")
        elif source := self._find((_EMBEDDING,)):
            embedding = self._base.tensors[source]
            right = embedding.shape[1:]
            if given.shape != right:
                self.faults.append(f"{_NEWLINE} is {given.shape} instead of {right}")
            added = StoredTensor(given.shard, _NEWLINE, right, embedding.dtype)
            self.changes[_NEWLINE] = Change(whole=given.name, added=added)

    def _is_resized(self, source: str, rows: Shape) -> bool:
        """Whether this is another number of rows than the base's embedding or head has."""
        return self._llava.get(source) in _ENDS and rows != self._base.tensors[source].shape[:1]

    def _find(self, names: tuple[str, ...]) -> str | None:
        """The base's own name of a tensor; notes why it can't be changed.

        Names that the base's files don't have may be those of its layout all the same: transformers loads older
        files under newer names, and adapters are saved under the latter.
        """
        renamed = (llava_name(name, self._layout) for name in names)
        source = next((self._source[name] for name in (*names, *renamed) if name in self._source), None)
        if source is None:
            self.faults.append(f"the base has no {names[0]}")
            return None
        stored = self._base.tensors[source]
        if stored.dtype == "U32":
            self.faults.append(f"the base's {names[0]} is quantised")
        elif len(stored.shape) > 2 and self._layout.channels_last:
            self.faults.append(f"the base's {names[0]} is stored channels last")
        return source

    def check_head(self, folder: Path) -> None:
        """Refuse to change one of two that the base holds as one."""
        ends = sorted(_ENDS & {self._llava.get(source, "") for source in self.changes})
        if not ends:
            return
        base = self._base
        config = read_config(base.config, self._layout, base.path.name, str(base.config_file), {})
        if config.decoder.tie_word_embeddings or "lm_head.weight" not in self._source:
            raise CheckpointError(
                f"{folder} changes {' and '.join(ends)}, but the base's head is its embedding (tie_word_embeddings); "
                "merge it with PEFT and convert the result"
            )


def _factor_shapes(weight: Shape, rank: int, is_embedding: bool) -> tuple[Shape, ...]:
    """Shapes that A and B must have for a weight."""
    if is_embedding:
        return (rank, *weight[:1]), (*weight[1:], rank)
    return (rank, *weight[1:]), (*weight[:1], rank, *(1 for _ in weight[2:]))


def _inner_names(name: str) -> tuple[str, ...]:
    """What a tensor may be called in the model that was wrapped, likeliest first.

    PEFT puts `base_model.model.` before its names; of LLaVA's other tensors people take off one part, or both.
    """
    inner = name.removeprefix("base_model.")
    shorter = inner.removeprefix("model.")
    return (inner, shorter) if inner == name else (shorter, inner)
