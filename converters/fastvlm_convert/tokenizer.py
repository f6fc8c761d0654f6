"""One tokenizer.json, whatever files the source ships."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastvlm_convert.source import read_json
from fastvlm_mlx.errors import CheckpointError

# Qwen2's split into words before byte pair encoding.
# Source: Qwen/Qwen2-0.5B tokenizer.json; published FastVLM repositories ship vocab.json + merges.txt only.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The source's tokenizer, from tokenizer.json or from vocab.json + merges.txt + added_tokens.json.

    Returns None where the source has neither: such a model answers prompts given as ids.

    Raises:
        CheckpointError: the files are damaged or don't belong together.
    """
    try:
        if (path / "tokenizer.json").exists():
            return Tokenizer.from_file(str(path / "tokenizer.json"))
        if (path / "vocab.json").exists() and (path / "merges.txt").exists():
            return _qwen2(path)
    except CheckpointError:
        raise
    except Exception as exc:  # tokenizers raises bare Exception
        raise CheckpointError(f"the tokenizer files of {path} are damaged ({exc}); download them again") from exc
    return None


def _qwen2(path: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(path / "vocab.json"), str(path / "merges.txt")))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = read_json(path / "added_tokens.json") if (path / "added_tokens.json").exists() else {}
    for text, index in sorted(added.items(), key=lambda item: item[1]):
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        if tokenizer.token_to_id(text) != index:
            raise CheckpointError(
                f"{path / 'added_tokens.json'} puts {text} at {index}, "
                f"the vocabulary leads to {tokenizer.token_to_id(text)}"
            )
    return tokenizer
