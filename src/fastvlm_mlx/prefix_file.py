"""The prefix cache as a file: safetensors, with the identity of the model that computed it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from fastvlm_mlx.cache import PrefixCache, Rows
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import replaced_file
from fastvlm_mlx.mlx_lm_parts import KVCache

FORMAT = "fastvlm-mlx prefix 1"


def write_prefixes(path: Path, cache: PrefixCache, identity: str) -> int:
    """Write everything that is kept; returns the number of positions."""
    numbers: dict[int, int] = {}
    tensors: dict[str, mx.array] = {}
    parents: list[int] = []
    for number, node in enumerate(cache.nodes()):
        numbers[id(node)] = number
        parents.append(numbers.get(id(node.parent), -1))
        tensors[f"{number}.keys"] = mx.array(node.keys)
        for block, (keys, values) in enumerate(node.rows):
            tensors |= {f"{number}.{block}.k": keys, f"{number}.{block}.v": values}
    metadata = {"format": FORMAT, "identity": identity, "parents": json.dumps(parents)}
    with replaced_file(path) as file:
        mx.save_safetensors(file, tensors or {"none": mx.zeros(1)}, metadata)
    return sum(len(node.keys) for node in cache.nodes())


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
            raise InputError(f"{path} is no prefix file of this version; expected one that save_prefix wrote")
        if metadata["identity"] != identity:
            raise InputError(
                f"{path} was computed by another model, or with other types; it is for {metadata['identity']}, this "
                f"is {identity}; compute it again"
            )
        return _add(cache, tensors, json.loads(metadata["parents"]))
    except (KeyError, ValueError, IndexError, RuntimeError) as exc:
        raise InputError(f"{path} is damaged ({type(exc).__name__}: {exc}); compute it again") from exc


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
