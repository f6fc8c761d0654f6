"""The golden script's checkpoints, and what the official code computes from them."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import numpy as np

from fastvlm_mlx.types import IMAGE_TOKEN_ID
from support.tokenizers import write_tokenizer

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
PRESETS = ("tiny", "tiny-untied", "tiny-hot")
SPEAKING = "tiny-speaking"  # tiny with a tokenizer: any text can be asked, and answers are made of readable pieces
SIZES = ("256x256", "128x128", "256x384")
PROMPTS = ("one image", "two images", "text")


def seeded_script() -> ModuleType:
    """golden/seeded_checkpoint.py, which isn't in a package."""
    spec = importlib.util.spec_from_file_location("seeded_checkpoint", GOLDEN / "seeded_checkpoint.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_checkpoint(preset: str, out: Path) -> Path:
    """Write a seeded checkpoint in the published LLaVA layout: one of the script's presets, or SPEAKING."""
    seeded_script().write("tiny" if preset == SPEAKING else preset, out)
    if preset == SPEAKING:
        write_tokenizer(out / "tokenizer.json")
    return out


def golden(preset: str) -> dict[str, np.ndarray]:
    """What the official code computes from a preset, float32."""
    with np.load(GOLDEN / f"{preset}.npz") as arrays:
        return dict(arrays)


@dataclass(frozen=True)
class GoldenPrompt:
    """A prompt of the golden data and what must come out of it."""

    images: list[np.ndarray]
    ids: list[int]
    first_logits: np.ndarray
    greedy_ids: list[int]


def golden_prompt(preset: str, kind: str) -> GoldenPrompt:
    """One of PROMPTS."""
    data = golden(preset)
    before, after = data["prompt_ids_before"].tolist(), data["prompt_ids_after"].tolist()
    text = data["text_prompt_ids"].tolist()
    first, second = data["pixels_256x256"], data["pixels_second"]
    images, ids, prefix = {
        "one image": ([first], [*before, IMAGE_TOKEN_ID, *after], ""),
        "two images": (
            [first, second],
            [*before, IMAGE_TOKEN_ID, *text, IMAGE_TOKEN_ID, *after],
            "two_image_",
        ),
        "text": ([], text, "text_"),
    }[kind]
    return GoldenPrompt(images, ids, data[f"{prefix}first_logits"], data[f"{prefix}greedy_ids"].tolist())


def relative_l2(found: mx.array | np.ndarray, right: np.ndarray) -> float:
    """|found - right| / |right|."""
    return float(np.linalg.norm(np.array(found, np.float64) - right) / np.linalg.norm(right))
