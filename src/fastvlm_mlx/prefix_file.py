"""The prefix cache as a file: safetensors, with the identity of the model that computed it."""

from __future__ import annotations

import json
from hashlib import blake2b
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from fastvlm_mlx.cache import PrefixCache, Rows
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import replaced_file
from fastvlm_mlx.mlx_lm_parts import KVCache

FORMAT = "fastvlm-mlx prefix 2"
_REMEDY = "delete it or name another file, and compute it again"


def write_prefixes(path: Path, cache: PrefixCache, identity: str) -> int:
    """Write everything that is kept; returns the number of positions.

    Raises:
        InputError: the file can't be written there.
    """
    numbers: dict[int, int] = {}
    tensors: dict[str, mx.array] = {}
    parents: list[int] = []
    for number, node in enumerate(cache.nodes()):
        numbers[id(node)] = number
        parents.append(numbers.get(id(node.parent), -1))
        tensors[f"{number}.keys"] = mx.array(node.keys)
        for block, (keys, values) in enumerate(node.rows):
            tensors |= {f"{number}.{block}.k": keys, f"{number}.{block}.v": values}
    tensors = tensors or {"none": mx.zeros(1)}
    metadata = {"format": FORMAT, "identity": identity, "parents": json.dumps(parents)}
    try:
        with replaced_file(path) as file:
            mx.save_safetensors(file, tensors, metadata | {"digest": _digest(tensors, metadata)})
    except OSError as exc:
        raise InputError(f"{path} can't be written ({exc.strerror}); choose another file") from exc
    return sum(len(node.keys) for node in cache.nodes())


def _digest(tensors: dict[str, mx.array], metadata: dict[str, str]) -> str:
    """Of everything in the file: rows that changed by a bit would give other answers without a word."""
    found = blake2b(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        found.update(np.asarray(mx.contiguous(tensor).view(mx.uint8)).data)
    return found.hexdigest()


def read_prefixes(path: Path, cache: PrefixCache, identity: str) -> int:
    """Add what a file holds; returns the number of its positions.

    Raises:
        InputError: no such file, damaged, or of another model.
    """
    if not path.is_file():
        raise InputError(f"there is no prefix file {path}; check the path, or make one with save_prefix")
    try:
        loaded = mx.load(str(path), format="safetensors", return_metadata=True)
        tensors, metadata = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} is no prefix file of this version; {_REMEDY}")
        if metadata["identity"] != identity:
            raise InputError(
                f"{path} was computed by another model, or with other types; it is for {metadata['identity']}, this "
                f"is {identity}; {_REMEDY}"
            )
        if metadata.pop("digest") != _digest(tensors, metadata):
            raise ValueError("its bytes have changed")
        return _add(cache, tensors, json.loads(metadata["parents"]))
    except (KeyError, ValueError, RuntimeError) as exc:
        raise InputError(f"{path} is damaged ({type(exc).__name__}: {exc}); {_REMEDY}") from exc


def _add(cache: PrefixCache, tensors: dict[str, mx.array], parents: list[int]) -> int:
    keys = [np.array(tensors[f"{number}.keys"]) for number in range(len(parents))]
    blocks = len(tensors) // (2 * len(parents)) if parents else 0
    for leaf in set(range(len(parents))) - set(parents):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        rows: Rows = [
            tuple(mx.concatenate([tensors[f"{n}.{block}.{part}"] for n in path], axis=2) for part in "kv")  # type: ignore[misc]
            for block in range(blocks)
        ]
        whole = np.concatenate([keys[n] for n in path])
        cache.put(whole, [_cache_of(*pair) for pair in rows], np.cumsum([len(keys[n]) for n in path]).tolist())
    return sum(map(len, keys))


def _cache_of(keys: mx.array, values: mx.array) -> KVCache:
    cache = KVCache()
    cache.state = keys, values, keys.shape[2]
    return cache
