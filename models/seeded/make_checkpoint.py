#!/usr/bin/env python3
"""Write the checkpoint behind the embedded default: seeded random weights, and a tokenizer that fits them.

    make_checkpoint.py OUT [PRESET]

The weights are those of tests/golden/seeded_checkpoint.py (PRESET tiny unless given). The tokenizer is byte
level BPE with ChatML's tokens, trained on the repository's LICENSE: any text can be asked, and answers are
made of readable pieces, although they mean nothing.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = 1024  # rows of the preset's embedding
SPECIAL = ("<|im_start|>", "<|endoftext|>", "<|im_end|>")  # ids 0, 1, 2: the preset's config names 1 and 2


def make_tokenizer() -> Tokenizer:
    """Train it; the same text gives the same ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text(encoding="utf-8")], trainer)
    return tokenizer


def main(out: str, preset: str = "tiny") -> None:
    """Write the checkpoint folder."""
    script = ROOT / "tests" / "golden" / "seeded_checkpoint.py"
    subprocess.run([sys.executable, script, preset, out], check=True)
    make_tokenizer().save(str(Path(out) / "tokenizer.json"))


if __name__ == "__main__":
    main(*sys.argv[1:])
