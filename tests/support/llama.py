"""Seeded checkpoints with a LLaMA decoder, what NumPy computes of them in float64, and a small SentencePiece model."""

from __future__ import annotations

import functools
import io
import json
import math
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from support.seeded import seeded_script

PIECES = 700  # of the tokenizer; the decoder has 1024 rows
PROJECTOR = "model.mm_projector."


@dataclass(frozen=True)
class Shape:
    """What a checkpoint has besides the tiny preset's shapes; by default as Vicuna: no biases, no shared heads."""

    projector: str = "mlp2x_gelu"
    tied: bool = False
    kv_heads: int = 4
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: dict[str, Any] | None = None


def write_llama(out: Path, shape: Shape | None = None, tokenizer: bool = False, **config: Any) -> Path:
    """Write a checkpoint in LLaVA's layout, as `LlavaLlamaForCausalLM` is saved.

    The values are drawn as those of golden/seeded_checkpoint.py. Its config leaves out what Vicuna's does: the base of
    the rotations.
    """
    shape, script = shape or Shape(), seeded_script()
    preset = dict(script.PRESETS["tiny"], tie=shape.tied, lm_head=not shape.tied, kv_heads=shape.kv_heads)
    if shape.projector == "identity":
        preset["hidden"] = 2 * preset["dims"][-1]
    shapes = script.vision_shapes(preset) | _decoder_shapes(script.decoder_shapes(preset), shape)
    tensors = {name: mx.array(script.values(name, of, "tiny", 0)) for name, of in shapes.items()}
    kept = {n: t if t.dtype == mx.int64 else t.astype(mx.bfloat16) for n, t in tensors.items()}  # exact, see there
    out.mkdir(parents=True)
    mx.save_safetensors(str(out / "model.safetensors"), kept, {"format": "pt"})
    raw = {key: value for key, value in script.config(preset, "tiny").items() if key not in _QWEN_ONLY} | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "attention_bias": shape.attention_bias,
        "max_position_embeddings": 4096,
        "mlp_bias": shape.mlp_bias,
        "mm_projector_type": shape.projector,
        "model_type": "llava_llama",
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": shape.rope_scaling,
        "tokenizer_model_max_length": 2048,
    }
    (out / "config.json").write_text(json.dumps(raw | config, indent=2) + "\n")
    if tokenizer:
        write_tokenizer(out)
    return out


_QWEN_ONLY = ("max_window_layers", "rope_theta", "sliding_window", "use_sliding_window")


def _decoder_shapes(qwen: dict[str, tuple[int, ...]], shape: Shape) -> dict[str, tuple[int, ...]]:
    """Qwen2's tensors with LLaMA's biases and the projector of this kind."""
    out = {n: s for n, s in qwen.items() if not n.endswith("_proj.bias") and not n.startswith(PROJECTOR)}
    for name in list(out):
        biased = shape.attention_bias if ".self_attn." in name else shape.mlp_bias and ".mlp." in name
        if biased and name.endswith("_proj.weight"):
            out[name.removesuffix("weight") + "bias"] = out[name][:1]
    hidden, inputs = qwen[f"{PROJECTOR}0.weight"]
    for number, name in enumerate(projector_names(shape.projector)):
        out |= {f"{name}weight": (hidden, hidden if number else inputs), f"{name}bias": (hidden,)}
    return out


def projector_names(kind: str) -> list[str]:
    """What LLaVA's code calls the linear layers: nn.Linear alone, or at every second place of an nn.Sequential."""
    if kind in ("linear", "identity"):
        return [PROJECTOR] if kind == "linear" else []
    return [f"{PROJECTOR}{2 * number}." for number in range(int(kind[3:-6]))]


class Reference:
    """LLaMA and LLaVA's projectors in NumPy, float64, straight from a checkpoint's tensors.

    Written from the papers: RMSNorm, rotations of the halves of each head, SwiGLU, causal attention.
    """

    def __init__(self, folder: Path, theta: float = 10_000.0) -> None:
        tensors = mx.load(str(folder / "model.safetensors"))
        self._w = {n: np.array(t.astype(mx.float32), np.float64) for n, t in tensors.items()}
        self._config, self._theta = json.loads((folder / "config.json").read_text()), theta

    def project(self, features: np.ndarray) -> np.ndarray:
        """(N, C) features -> (N, hidden)."""
        x = features.astype(np.float64)
        for number, name in enumerate(projector_names(self._config["mm_projector_type"])):
            x = x if number == 0 else x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
            x = x @ self._w[f"{name}weight"].T + self._w[f"{name}bias"]
        return x

    def embed(self, ids: list[int]) -> np.ndarray:
        """(T, hidden)."""
        return self._w["model.embed_tokens.weight"][ids]

    def logits(self, x: np.ndarray) -> np.ndarray:
        """(T, hidden) embeddings -> (V,) logits after the last position."""
        for block in range(self._config["num_hidden_layers"]):
            name = f"model.layers.{block}."
            x = x + self._attention(name + "self_attn.", self._norm(x, name + "input_layernorm"))
            y = self._norm(x, name + "post_attention_layernorm")
            gate = self._linear(y, name + "mlp.gate_proj")
            y = gate / (1 + np.exp(-gate)) * self._linear(y, name + "mlp.up_proj")
            x = x + self._linear(y, name + "mlp.down_proj")
        head = self._w.get("lm_head.weight", self._w["model.embed_tokens.weight"])
        return self._norm(x[-1:], "model.norm")[0] @ head.T

    def greedy(self, x: np.ndarray, count: int) -> list[int]:
        """The most likely ids after these embeddings, each computed from all before it."""
        ids: list[int] = []
        for _ in range(count):
            ids.append(int(self.logits(x).argmax()))
            x = np.concatenate([x, self.embed(ids[-1:])])
        return ids

    def _norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self._config["rms_norm_eps"]) * self._w[f"{name}.weight"]

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._w[f"{name}.weight"].T + self._w.get(f"{name}.bias", 0.0)

    def _attention(self, name: str, x: np.ndarray) -> np.ndarray:
        length, heads = len(x), self._config["num_attention_heads"]
        shared = heads // self._config["num_key_value_heads"]  # queries that read the same keys

        def split(part: str) -> np.ndarray:
            return self._linear(x, f"{name}{part}_proj").reshape(length, -1, self._config["hidden_size"] // heads)

        q, k, v = self._rotate(split("q")), self._rotate(split("k")), split("v")
        k, v = np.repeat(k, shared, axis=1), np.repeat(v, shared, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
        scores = np.where(np.tril(np.ones((length, length), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return self._linear(np.einsum("hqk,khd->qhd", weights, v).reshape(length, -1), f"{name}o_proj")

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        factor = (self._config["rope_scaling"] or {}).get("factor", 1.0)
        angles = np.arange(len(x))[:, None] / factor * self._theta ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        low, high = x[..., :half], x[..., half:]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def write_tokenizer(folder: Path, legacy: bool | None = False) -> Path:
    """Write tokenizer.model and tokenizer_config.json as Vicuna's; `legacy` None leaves it out, as older ones do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(trained())
    settings = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                "tokenizer_class": "LlamaTokenizer"}  # fmt: skip
    settings |= {} if legacy is None else {"legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.model"


@functools.cache
def trained(**options: Any) -> bytes:
    """A SentencePiece model of LLaMA's kind, trained on the repository's own words; options replace LLaMA's."""
    from sentencepiece import SentencePieceTrainer, set_min_log_level

    set_min_log_level(2)
    root = Path(__file__).resolve().parents[2]
    names = ("LICENSE", "README.md", "CHANGELOG.md")
    lines = [line for name in names for line in (root / name).read_text(encoding="utf-8").splitlines()]
    lines += [
        "Grüße aus Köln, naïve façade: USER ASSISTANT",
        "            indented    by    many  spaces -------- ====",
    ] * 20  # often enough to be pieces whatever else those files say
    lines += [
        f"{letter}<s {letter}</s {letter}<unk >" for letter in string.ascii_letters
    ] * 3  # for pieces of these, see test_sentencepiece.py
    like_llama = {
        "model_type": "bpe", "vocab_size": PIECES, "byte_fallback": True, "split_digits": True,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": True,
        "allow_whitespace_only_pieces": True, "character_coverage": 0.999, "num_threads": 1,
    }  # fmt: skip
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(lines * 2), model_writer=model, **like_llama | options)
    return model.getvalue()
