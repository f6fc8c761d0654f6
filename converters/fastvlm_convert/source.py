"""Open a source checkpoint: its config and its tensors, read one at a time and one shard at a time."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from fastvlm_mlx.errors import CheckpointError, MissingDependencyError
from fastvlm_mlx.manifest import AdapterRecord

# safetensors' names, the ones that published checkpoints use
DTYPES = {
    "BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, "U32": mx.uint32, "I64": mx.int64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies and what it is; nothing of it has been read."""

    shard: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name

    @property
    def nbytes(self) -> int:
        """Size of its values in bytes."""
        return int(np.prod(self.shape)) * DTYPES[self.dtype].size


class TensorFiles:
    """Files that hold tensors, `.safetensors` or `.bin`.

    Attributes:
        shards: the files.
        tensors: name -> where it lies, in the order of the files.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        """Read every file's header.

        Raises:
            CheckpointError: a file is damaged, or two hold the same name.
            MissingDependencyError: `.bin` files, and torch isn't installed.
        """
        self.shards = list(shards)
        self.tensors: dict[str, StoredTensor] = {}
        self._open: _SafetensorsShard | _BinShard | None = None
        for shard in self.shards:
            for tensor in _headers(shard):
                if tensor.name in self.tensors:
                    raise CheckpointError(f"{tensor.name} is in {self.tensors[tensor.name].shard} and in {shard}")
                self.tensors[tensor.name] = tensor

    def read(self, name: str) -> mx.array:
        """Read one tensor. Only its own shard stays open, and what was read isn't kept."""
        shard = self.tensors[name].shard
        if self._open is None or self._open.path != shard:
            self._open = None  # let the other shard's memory go before this one's is taken
            self._open = _open(shard)
        return self._open.read(name)


class Checkpoint(TensorFiles):
    """A checkpoint folder.

    Attributes:
        path: the folder.
        config: the parsed config.json.
        config_file: where that came from.
        adapter: what was merged into the tensors that it gives; None for the checkpoint as it lies there.
    """

    def __init__(self, path: Path) -> None:
        """Read the config and every shard's header.

        Raises:
            CheckpointError: a file is missing, truncated or not what its name says.
            MissingDependencyError: `.bin` shards, and torch isn't installed.
        """
        if not path.is_dir():
            raise CheckpointError(f"no checkpoint folder at {path}; give the folder that holds config.json")
        self.path = path
        self.config_file = path / "config.json"
        self.config = read_json(self.config_file)
        self.adapter: AdapterRecord | None = None
        super().__init__(_shards(path))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: missing, unreadable or no object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        reason = "is missing" if isinstance(exc, FileNotFoundError) else f"can't be read: {exc}"
        raise CheckpointError(f"{path} {reason}; give a checkpoint folder as published") from exc
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} should hold a JSON object, found {type(data).__name__}")
    return data


def _shards(path: Path) -> list[Path]:
    """The files that hold the weights, from the index if there is one."""
    for index_name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (path / index_name).exists():
            places = read_json(path / index_name).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                raise CheckpointError(f"{path / index_name} has no weight_map of names; download it again")
            names = sorted(set(places.values()))
            missing = [name for name in names if not (path / name).is_file()]
            if missing or not names:
                what = f"names {', '.join(missing)}, not there" if missing else "names no files"
                raise CheckpointError(f"{path / index_name} {what}; download the checkpoint again")
            return [path / name for name in names]
    for pattern in ("*.safetensors", "pytorch_model*.bin"):
        if found := sorted(path.glob(pattern)):
            return found
    raise CheckpointError(f"{path} has no weights: expected model.safetensors, shards with an index, or *.bin")


class _SafetensorsShard:
    """A `.safetensors` file; MLX reads a tensor's bytes when it is first used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = cast("dict[str, mx.array]", mx.load(str(path)))

    def headers(self) -> list[StoredTensor]:
        """Names, shapes and types of all tensors."""
        with safe_open(str(self.path), "np") as file:
            views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return [StoredTensor(self.path, n, tuple(v.get_shape()), v.get_dtype()) for n, v in views.items()]

    def read(self, name: str) -> mx.array:
        """One tensor; the lazy original is dropped, or its values would stay with the shard."""
        if name not in self._tensors:  # read before
            self._tensors = cast("dict[str, mx.array]", mx.load(str(self.path)))
        tensor = self._tensors.pop(name)
        try:
            mx.eval(tensor)
        except RuntimeError as exc:
            raise CheckpointError(f"can't read {name} from {self.path}: {exc}") from exc
        return tensor


class _BinShard:
    """A `.bin` file: PyTorch's unpickler that only builds tensors, their bytes mapped from the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            import torch
        except ImportError as exc:
            raise MissingDependencyError(
                f"{path.name} needs PyTorch to be read: pip install 'fastvlm-mlx[convert]', or use safetensors"
            ) from exc
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as exc:  # torch raises pickle, zip, runtime and value errors here, without a common root
            raise CheckpointError(f"{path} is damaged or holds more than tensors ({exc}); download it again") from exc
        if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
            raise CheckpointError(f"{path} should hold a dictionary of tensors, as published; found something else")
        self._tensors: dict[str, Any] = state
        self._names = {
            torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64",
        }  # fmt: skip

    def headers(self) -> list[StoredTensor]:
        """Names, shapes and types of all tensors."""
        return [
            StoredTensor(self.path, str(name), tuple(t.shape), self._names.get(t.dtype, str(t.dtype)))
            for name, t in self._tensors.items()
        ]

    def read(self, name: str) -> mx.array:
        """One tensor, copied."""
        import torch

        tensor = self._tensors[name]
        if tensor.dtype == torch.bfloat16:  # numpy has no bfloat16: pass the bits
            return mx.array(tensor.view(torch.uint16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())


def _open(shard: Path) -> _SafetensorsShard | _BinShard:
    try:
        return _BinShard(shard) if shard.suffix == ".bin" else _SafetensorsShard(shard)
    except (RuntimeError, ValueError) as exc:  # MLX, on a file that is no safetensors
        raise CheckpointError(f"{shard} is damaged or no safetensors file ({exc}); download it again") from exc


def _headers(shard: Path) -> list[StoredTensor]:
    try:
        tensors = _open(shard).headers()
    except (SafetensorError, OSError) as exc:
        raise CheckpointError(f"{shard} is damaged or no safetensors file ({exc}); download it again") from exc
    if strange := {t.dtype for t in tensors} - set(DTYPES):
        raise CheckpointError(f"{shard} holds tensors of type {', '.join(sorted(strange))}; known: {', '.join(DTYPES)}")
    return tensors
