"""The tokenizer's files in the other runtimes' folders."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from fastvlm_convert.export_config import write_json
from fastvlm_convert.source import read_json
from fastvlm_mlx.bundle import TOKENIZER
from fastvlm_mlx.errors import CheckpointError

IMAGE = "<image>"
_ADDED, _CONFIG = "added_tokens.json", "tokenizer_config.json"
_COPIED = ("vocab.json", "merges.txt", "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
           "chat_template.json", _ADDED, _CONFIG)  # fmt: skip

# ChatML, with the system prompt that the models were trained with.
_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(source: Path, folder: Path, tokenizer: Tokenizer) -> None:
    """Copy the source's files, and write those that it may lack: tokenizer.json and tokenizer_config.json.

    Args:
        source: the checkpoint's folder.
        folder: what is being written.
        tokenizer: the source's, or with `<image>` by `add_image`; then the copies say so too.
    """
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    tokenizer.save(str(folder / TOKENIZER))
    image = tokenizer.token_to_id(IMAGE)
    if image is not None and (folder / _ADDED).exists():
        write_json(folder / _ADDED, read_json(folder / _ADDED) | {IMAGE: image})
    config = read_json(folder / _CONFIG) if (folder / _CONFIG).exists() else _plain_config(tokenizer)
    entries = {str(index): _entry(token) for index, token in sorted(tokenizer.get_added_tokens_decoder().items())}
    config["added_tokens_decoder"] = entries | config.get("added_tokens_decoder", {})
    write_json(folder / _CONFIG, config)


def add_image(tokenizer: Tokenizer, rows: int, where: object) -> int:
    """The id of `<image>`, which the tokenizer gets where it hasn't got it.

    Args:
        tokenizer: changed in place.
        rows: of the embedding, which every id must be one of.
        where: the source, for the message.

    Raises:
        CheckpointError: the embedding has no row left.
    """
    if tokenizer.token_to_id(IMAGE) is None:
        tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    index = tokenizer.token_to_id(IMAGE)
    assert index is not None
    if index >= rows:
        raise CheckpointError(
            f"the tokenizer of {where} leaves no id for {IMAGE}: it would be {index}, the embedding has {rows} rows; "
            "give a checkpoint with a larger embedding"
        )
    return index


def _plain_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """What transformers and swift-transformers need to know of a tokenizer.json."""
    known = {key: token for key, token in (("eos_token", "<|im_end|>"), ("pad_token", "<|endoftext|>"))
             if tokenizer.token_to_id(token) is not None}  # fmt: skip
    return {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": _TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    } | known


def _entry(token: AddedToken) -> dict[str, object]:
    return {
        "content": token.content,
        "lstrip": token.lstrip,
        "normalized": token.normalized,
        "rstrip": token.rstrip,
        "single_word": token.single_word,
        "special": token.special,
    }
