"""A checkpoint with a LoRA adapter merged into it, tensor by tensor while it is read.

W + scale B A is computed in float32 and rounded to the type that W is stored in. What the adapter holds whole
(biases, `modules_to_save`, the projector in LLaVA's non_lora_trainables.bin) takes the place of the base's.
Names are those of the PyTorch model: of LLaVA, or of the base's own layout.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from fastvlm_convert.lora_config import ADAPTER_CONFIG, LoraConfig, is_adapter, read_lora_config
from fastvlm_convert.lora_model import read_trained_config
from fastvlm_convert.lora_plan import plan_changes
from fastvlm_convert.quantize import ROWS_BYTES
from fastvlm_convert.source import DTYPES, Checkpoint, TensorFiles
from fastvlm_mlx.bundle import CONFIG
from fastvlm_mlx.errors import CheckpointError, InputError
from fastvlm_mlx.files import sha256
from fastvlm_mlx.manifest import AdapterRecord

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
REST = "non_lora_trainables.bin"  # what LLaVA's training saves beside the adapter


def open_checkpoint(folder: Path, base: Path | None = None) -> Checkpoint:
    """Open a checkpoint; an adapter's folder is opened as its base with the adapter merged into it.

    Args:
        folder: of a checkpoint, or of an adapter.
        base: the checkpoint that the adapter was trained on; default what its config names, if that is a folder.

    Raises:
        InputError: a base without an adapter. CheckpointError: the base is missing, another one, or damaged.
    """
    if not is_adapter(folder):
        if base is not None:
            raise InputError(f"{folder} holds no {ADAPTER_CONFIG}, so it is no adapter; leave --base out")
        return Checkpoint(folder)
    config = read_lora_config(folder)
    if base is None and config.base and Path(config.base).is_dir():
        base = Path(config.base)
    if base is None:
        trained = f"trained on {config.base!r}, which is no folder here" if config.base else "of an unnamed base"
        raise CheckpointError(f"{folder} is an adapter {trained}; give its base's folder with --base")
    if is_adapter(base):
        raise CheckpointError(f"the base {base} is an adapter itself; merge that one first")
    return MergedCheckpoint(base, folder, config)


class MergedCheckpoint(Checkpoint):
    """A base whose tensors are read with an adapter merged into them."""

    def __init__(self, base: Path, folder: Path, config: LoraConfig) -> None:
        """Read both headers and see that they belong together; errors as `open_checkpoint`."""
        super().__init__(base)
        files = [folder / name for name in WEIGHTS if (folder / name).is_file()][:1]
        if not files:
            raise CheckpointError(f"{folder} has no {WEIGHTS[0]}; give an adapter as PEFT saves it")
        self._folder = folder
        self._adapter = TensorFiles(files)
        self._rest = TensorFiles([folder / REST] if (folder / REST).is_file() else [])
        read = [folder / ADAPTER_CONFIG, *files, *self._rest.shards]
        if trained := read_trained_config(self, folder):
            self.config, self.config_file = trained, folder / CONFIG
            read.append(self.config_file)
        self._changes = plan_changes(self, folder, config, self._adapter, self._rest)
        self.tensors |= {name: change.added for name, change in self._changes.items() if change.added}
        merged = sum(bool(change.factors) for change in self._changes.values())
        whole = sum(change.whole is not None for change in self._changes.values())
        kind = f"rank {config.rank}, alpha {config.alpha:g}{', rsLoRA' if config.rslora else ''}"
        self.adapter = AdapterRecord(
            id=folder.resolve().name,
            files={f.name: sha256(f) for f in read},
            changes=f"LoRA adapter {folder.resolve().name} merged into {merged} matrices ({kind})"
            + (f", {whole} tensors taken from it whole" if whole else "")
            + (f", with its {CONFIG}" if trained else ""),
        )

    def read(self, name: str) -> mx.array:
        """One tensor of the base, as the adapter leaves it, in its stored type.

        Raises:
            CheckpointError: the adapter makes values of it that aren't finite.
        """
        change = self._changes.get(name)
        if change is None:
            return super().read(name)
        kept = DTYPES[self.tensors[name].dtype]
        value = super().read(name) if change.whole is None else self._part(change.whole)
        if change.factors:
            a, b = (self._part(factor) for factor in change.factors)
            value = _merge(value, *((b.T, a.T) if change.is_embedding else (a, b)), change.scale)
        value = value.astype(kept)
        mx.eval(value)
        if not _is_finite(value):
            raise CheckpointError(
                f"{name} isn't finite with {self._folder} merged into it: its training diverged, or its alpha is "
                "wrong; give the adapter of an earlier step, or correct its config"
            )
        return value

    def _part(self, name: str) -> mx.array:
        return (self._adapter if name in self._adapter.tensors else self._rest).read(name)


def _merge(weight: mx.array, a: mx.array, b: mx.array, scale: float) -> mx.array:
    """W + scale B A in float32, rounded to W's type; block by block, so that no big matrix lies there in float32.

    Args:
        weight: (out, in, ...) with the kernel's axes where it is a convolution's.
        a: (r, in, ...).
        b: (out, r, ...), whose kernel has one place.
        scale: what B A is multiplied by.
    """
    rows = weight.reshape(weight.shape[0], -1)
    a, b = (factor.astype(mx.float32).reshape(factor.shape[0], -1) for factor in (a, b))
    parts = []
    for block in _blocks(rows):
        part = rows[block].astype(mx.float32) + scale * (b[block] @ a)
        parts.append(part.astype(weight.dtype))
        mx.eval(parts[-1])
    return mx.concatenate(parts).reshape(weight.shape)


def _is_finite(value: mx.array) -> bool:
    """Whether a tensor holds no infinity and no NaN; block by block, as its copies are as big as it is."""
    rows = value.reshape(len(value), -1) if value.ndim else value.reshape(1, 1)
    return all(mx.isfinite(rows[block]).all().item() for block in _blocks(rows))


def _blocks(rows: mx.array) -> list[slice]:
    """Parts of a matrix that have ROWS_BYTES in float32."""
    step = max(1, ROWS_BYTES // (4 * rows.shape[1]))
    return [slice(start, start + step) for start in range(0, len(rows), step)]
