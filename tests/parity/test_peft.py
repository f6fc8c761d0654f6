"""Merged LoRA adapters against PEFT's own merge, from files that PEFT saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_convert.lora import open_checkpoint

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # their warnings are none of ours

# float32 on both sides; B A is summed in another order: 2e-7 of the largest value measured.
TOLERANCE = 1e-6
TARGETS = ["q_proj", "v_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "plain": {"r": 8, "lora_alpha": 16},
    "rsLoRA": {"r": 8, "lora_alpha": 16, "use_rslora": True},
    "patterns": {
        "r": 8,
        "lora_alpha": 16,
        "rank_pattern": {"down_proj": 2, r"layers\.0\.self_attn\.q_proj": 4},
        "alpha_pattern": {"v_proj": 4, r"model\.layers\.1\.mlp\.down_proj": 32},
    },
    "rsLoRA and patterns": {"r": 8, "lora_alpha": 16, "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "biases of its layers": {"r": 4, "bias": "lora_only"},
    "all biases": {"r": 4, "bias": "all"},
    "the head whole": {"r": 4, "modules_to_save": ["lm_head"]},
    "the embedding": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "fan in, fan out": {"r": 4, "fan_in_fan_out": True},
}


@pytest.fixture(scope="module")
def base(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-untied in float32, so that nothing is rounded on either side."""
    source, target = checkpoint("tiny-untied"), tmp_path_factory.mktemp("base") / "base"
    target.mkdir()
    weights = {n: v.astype(mx.float32) if v.dtype == mx.bfloat16 else v
               for n, v in mx.load(str(source / "model.safetensors")).items()}  # fmt: skip
    mx.save_safetensors(str(target / "model.safetensors"), weights)
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


def qwen2(base: Path) -> Any:
    """The base's decoder as transformers has it."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    raw = json.loads((base / "config.json").read_text())
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "vocab_size", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**{name: raw[name] for name in sizes}))
    weights = mx.load(str(base / "model.safetensors"))
    state = {name: torch.from_numpy(np.array(weights[name])) for name in model.state_dict()}
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(base: Path, tmp_path: Path, case: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"} | CASES[case]
    tuned = get_peft_model(qwen2(base), LoraConfig(**settings))
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:  # as if it had been trained; B starts at 0
                parameter += 0.1 * torch.randn_like(parameter)
    tuned.save_pretrained(tmp_path / "adapter")
    right = tuned.merge_and_unload().state_dict()
    before = qwen2(base).state_dict()
    found = open_checkpoint(tmp_path / "adapter", base)
    changed = 0
    for name, tensor in right.items():
        value, wanted = np.array(found.read(name)), tensor.numpy()
        assert np.abs(value - wanted).max() <= TOLERANCE * np.abs(wanted).max(), name
        changed += not torch.equal(tensor, before[name])
    assert changed >= 2
