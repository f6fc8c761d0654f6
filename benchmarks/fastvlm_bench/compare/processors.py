"""Tokenizer and processor files in the form that transformers reads, which mlx-vlm and mlx-lm use too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from fastvlm_mlx.config import DOWNSAMPLING
from fastvlm_mlx.prompt import PLACEHOLDER
from fastvlm_mlx.template import CHATML, END, START

# What `fastvlm_mlx.prompt` writes; contents are texts for mlx-vlm, lists of parts for transformers.
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    f"{START}system\n{CHATML.system}{END}\n"
    "{% endif %}"
    "{% for message in messages %}"
    f"{START}{{{{ message['role'] + '\n' }}}}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    f"{{% if part['type'] == 'image' %}}{PLACEHOLDER}{{% else %}}{{{{ '\n' + part['text'] }}}}{{% endif %}}"
    "{% endfor %}{% endif %}"
    f"{{{{ '{END}\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{START}assistant\n' }}}}{{% endif %}}"
)


def vocabulary(tokenizer: Path) -> tuple[int, int]:
    """How many tokens there are, and the id of `<image>`: its own, or the first one that is free."""
    backend = Tokenizer.from_file(str(tokenizer))
    tokens, image = backend.get_vocab_size(with_added_tokens=True), backend.token_to_id(PLACEHOLDER)
    return tokens, tokens if image is None else image


def write_tokenizer(tokenizer: Path, folder: Path, *, with_image: bool = False) -> None:
    """Write tokenizer.json as it is, or with `<image>` as a token of its own, and tokenizer_config.json."""
    backend = Tokenizer.from_file(str(tokenizer))
    if with_image:
        backend.add_special_tokens([AddedToken(PLACEHOLDER, special=True, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": "<|endoftext|>",
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write(folder / "tokenizer_config.json", config)


def write_processor(folder: Path) -> None:
    """Write transformers' processor_config.json."""
    config = {
        "processor_class": "LlavaProcessor",
        "image_token": PLACEHOLDER,
        "patch_size": DOWNSAMPLING,
        "num_additional_image_tokens": 0,
        "vision_feature_select_strategy": "full",
    }
    _write(folder / "processor_config.json", config)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def write_resolution(folder: Path, side: int) -> None:
    """Write preprocessor_config.json: the side of the image in pixels, as published otherwise."""
    config = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": [0.0, 0.0, 0.0],
        "image_std": [1.0, 1.0, 1.0],
        "resample": 3,
    }
    _write(folder / "preprocessor_config.json", config)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
