"""One tokenizer.json, whatever files the source ships."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastvlm_convert.sentencepiece_model import read_sentencepiece
from fastvlm_convert.source import read_json
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import CheckpointError, InputError, MissingDependencyError
from fastvlm_mlx.template import TEMPLATES, special_tokens

# Qwen2's and Qwen2.5's split into words before byte pair encoding.
# Source: Qwen/Qwen2-0.5B tokenizer.json; published FastVLM repositories ship vocab.json + merges.txt only.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_tokenizer(path: Path) -> Tokenizer | None:
    """The source's tokenizer, from the first of READERS whose files are all there, and added_tokens.json.

    Returns None where the source has none: such a model answers prompts given as ids.

    Raises:
        CheckpointError: the files are damaged or don't belong together. MissingDependencyError: a package is missing
            that reads them.
    """
    try:
        for names, read in READERS.items():
            if all((path / name).exists() for name in names):
                return read(path)
    except (CheckpointError, MissingDependencyError):
        raise
    except Exception as exc:  # tokenizers raises bare Exception
        raise CheckpointError(f"the tokenizer files of {path} are damaged ({exc}); download them again") from exc
    return None


def with_tokenizer(path: Path, config: ModelConfig, asked: bool) -> tuple[Tokenizer | None, ModelConfig, list[str]]:
    """A source's tokenizer, the config with what it says, and warnings.

    Args:
        path: the source's folder.
        config: of its model.
        asked: whether the user chose the config's template.

    Raises:
        CheckpointError or MissingDependencyError: as `read_tokenizer`. InputError: as `check_template`.
    """
    tokenizer = read_tokenizer(path)
    if tokenizer is None:
        return None, config, []
    warnings = check_template(tokenizer, config.template, asked)
    return tokenizer, replace(config, prefix_after_special=prefixes_after_special(path, tokenizer)), warnings


def check_template(tokenizer: Tokenizer, name: str, asked: bool) -> list[str]:
    """Whether conversations can be written as a template says.

    Args:
        tokenizer: the source's.
        name: of `fastvlm_mlx.template.TEMPLATES`.
        asked: whether the user chose it; then it must fit.

    Returns:
        Warnings: it lacks special tokens, so that the bundle takes prompts as ids only.

    Raises:
        InputError: it lacks them, and the user chose the template.
    """
    lacking = [token for token in special_tokens(name) if tokenizer.token_to_id(token) is None]
    if not lacking:
        return []
    found = f"template {name} needs {', '.join(lacking)}, which the source's tokenizer doesn't have"
    if asked:
        raise InputError(f"{found}; leave --template out, or choose another of {', '.join(TEMPLATES)}")
    return [f"{found}: the bundle takes prompts as ids only, unless it is converted with another --template"]


def prefixes_after_special(path: Path, tokenizer: Tokenizer) -> bool:
    """Whether a text behind a special token begins with a space of the tokenizer's own, where one at the start does.

    What transformers calls a "legacy" tokenizer does so, LLaMA's first; those of Llama 2 and Vicuna 1.5 don't. The
    official code takes the slow tokenizer, which goes by tokenizer_config.json.
    """
    splitter = tokenizer.pre_tokenizer
    if isinstance(splitter, pre_tokenizers.Metaspace):
        return splitter.prepend_scheme != "first"
    return _settings(path).get("legacy") is not False


def _settings(path: Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    return read_json(file) if file.exists() else {}


def _tokenizer_json(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path / "tokenizer.json"))


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
    return _with_added(tokenizer, path)


def _sentencepiece(path: Path) -> Tokenizer:
    return _with_added(read_sentencepiece(path / "tokenizer.model"), path)


def _with_added(tokenizer: Tokenizer, path: Path) -> Tokenizer:
    """Put in the tokens of added_tokens.json: special ones, without text, unless tokenizer_config.json differs."""
    added = read_json(path / "added_tokens.json") if (path / "added_tokens.json").exists() else {}
    described = _settings(path).get("added_tokens_decoder") or {}
    for text, index in sorted(added.items(), key=lambda item: item[1]):
        special = described.get(str(index), {}).get("special", True)
        token = AddedToken(text, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(text) != index:
            raise CheckpointError(
                f"{path / 'added_tokens.json'} puts {text} at {index}, "
                f"the vocabulary leads to {tokenizer.token_to_id(text)}"
            )
    return tokenizer


# The files that a tokenizer is read from, all of them needed -> what reads it.
READERS: dict[tuple[str, ...], Callable[[Path], Tokenizer]] = {
    ("tokenizer.json",): _tokenizer_json,
    ("vocab.json", "merges.txt"): _qwen2,
    ("tokenizer.model",): _sentencepiece,
}
