"""Tokenizers of any size for the seeded checkpoints, whose embedding has 1024 rows."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from support.qwen_files import byte_letters

SPECIAL = ("<|im_start|>", "<|endoftext|>", "<|im_end|>")


def write_tokenizer(path: Path, size: int = 1023) -> None:
    """Bytes, ChatML's tokens and words that no text has: `size` tokens."""
    words = [*SPECIAL, *byte_letters()]
    words += [f"w{number}" for number in range(size - len(words))]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(path))


def with_tokenizer(checkpoint: Path, target: Path, size: int = 1023) -> Path:
    """A copy of a checkpoint with a tokenizer; 1023 tokens leave a row for `<image>`."""
    shutil.copytree(checkpoint, target)
    write_tokenizer(target / "tokenizer.json", size)
    return target
