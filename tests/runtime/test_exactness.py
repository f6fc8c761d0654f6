"""Constants that the tiny presets don't show: against formulas written out here in numpy, and in float64."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from fastvlm_convert.pipeline import convert
from fastvlm_mlx import FastVLM, load
from fastvlm_mlx.image import preprocess
from fastvlm_mlx.prefill import embed, prefill
from fastvlm_mlx.timing import Stopwatch
from fastvlm_mlx.vision.fastvithd import AttentionBlock
from support.seeded import golden_prompt, relative_l2

ROUNDING = 1e-5  # float32 against float64; measured 1e-7 (LayerNorm) and 1.6e-6 (the decoder)


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def attention_of(block: AttentionBlock, x: np.ndarray, head_dim: int, eps: float) -> np.ndarray:
    """The first branch of a block on (N, C) pixels: LayerNorm without affine, then attention."""
    centred = x - x.mean(-1, keepdims=True)
    normalised = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    weights = {n: np.array(v, np.float64) for n, v in tree_flatten(block.mixer.parameters())}
    qkv = normalised @ weights["qkv.weight"].T + weights["qkv.bias"]
    q, k, v = qkv.reshape(len(x), 3, -1, head_dim).transpose(1, 2, 0, 3)
    mixed = softmax(q @ k.swapaxes(1, 2) / np.sqrt(head_dim)) @ v
    return mixed.transpose(1, 0, 2).reshape(x.shape) @ weights["proj.weight"].T + weights["proj.bias"]


@pytest.mark.parametrize("deviation", [1.0, 3e-3, 1e-3])
def test_layer_norm_adds_1e_5_to_the_variance(deviation):
    """At variances around 1e-5, where the eps decides; the golden features are far above."""
    rng, dim, head_dim = np.random.default_rng(3), 64, 32
    mx.random.seed(3)
    block = AttentionBlock(dim, 2 * dim, head_dim)
    block.ffn.fc2.update({"weight": mx.zeros((dim, 2 * dim)), "bias": mx.zeros(dim)})  # the other branch adds 0
    x = (rng.standard_normal((4, 6, dim)) * deviation).astype(np.float32)
    branch = np.array(block(mx.array(x[None]))[0], np.float64) - x
    flat = x.reshape(-1, dim).astype(np.float64)
    found = branch.reshape(-1, dim)
    assert relative_l2(found, attention_of(block, flat, head_dim, 1e-5)) <= ROUNDING
    if deviation < 1:  # the measure tells other usual values from it
        for other in (1e-6, 1e-12, 1e-3):
            assert relative_l2(found, attention_of(block, flat, head_dim, other)) > 1e-2


@pytest.mark.parametrize(
    ("width", "height"),
    [(128, 127), (127, 128), (128, 1), (1, 128), (128, 63), (99, 60), (60, 99), (65, 64), (64, 65), (5, 2), (2, 5)],
)
def test_odd_margins_are_larger_below_and_to_the_right(width, height):
    """Images that needn't shrink: the margin's odd pixel goes after the picture."""
    rng = np.random.default_rng(width * 1000 + height)
    picture = rng.integers(1, 256, (height, width, 3), np.uint8)  # nowhere black
    square = max(width, height)
    margin = square - min(width, height)
    assert margin % 2
    before, after = margin // 2, margin // 2 + 1
    rows, columns = ((before, after), (0, 0)) if width > height else ((0, 0), (before, after))
    right = np.pad(picture, (rows, columns, (0, 0)))
    if square != 128:
        right = np.asarray(Image.fromarray(right).resize((128, 128), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(preprocess(picture, 128, "pad"), right)
    np.testing.assert_array_equal(preprocess(Image.fromarray(picture), 128, "pad"), right)


def qwen2_logits(weights: dict[str, np.ndarray], config: dict[str, Any], ids: list[int]) -> np.ndarray:
    """Qwen2 after the last of `ids`, float64: (V,) logits."""
    heads, groups, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    width, length = config["hidden_size"] // heads, len(ids)
    angles = np.outer(np.arange(length), config["rope_theta"] ** -(np.arange(0, width, 2) / width))
    cos, sin = np.cos(angles), np.sin(angles)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weights[f"{name}.weight"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def split(x: np.ndarray) -> np.ndarray:  # (T, H D) -> (H, T, D)
        return x.reshape(length, -1, width).swapaxes(0, 1)

    def rotate(x: np.ndarray) -> np.ndarray:  # the halves of a head are the two coordinates
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = weights["model.embed_tokens.weight"][ids]
    future = np.triu(np.full((length, length), -np.inf), 1)
    for layer in (f"model.layers.{i}" for i in range(config["num_hidden_layers"])):
        y = norm(x, f"{layer}.input_layernorm")
        q, k, v = (split(linear(y, f"{layer}.self_attn.{part}_proj")) for part in "qkv")
        k, v = (np.repeat(part, heads // groups, axis=0) for part in (rotate(k), v))
        y = softmax(rotate(q) @ k.swapaxes(1, 2) / np.sqrt(width) + future) @ v
        x = x + linear(y.swapaxes(0, 1).reshape(length, -1), f"{layer}.self_attn.o_proj")
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate = linear(y, f"{layer}.mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm(x[-1], "model.norm") @ head.T


def logits(model: FastVLM, ids: list[int]) -> np.ndarray:
    spans = model.expand(ids, [])
    return np.array(prefill(model.decoder, embed(model.decoder, spans, []), model.decoder.new_cache())[0])


@pytest.mark.parametrize("change", [{}, {"rope_theta": 1e4}, {"rope_theta": 10}, {"rms_norm_eps": 1e-2}])
def test_the_decoder_computes_with_its_configs_numbers(checkpoint, model, tmp_path, change):
    source = shutil.copytree(checkpoint("tiny"), tmp_path / "source")
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    folder = convert(source, tmp_path / "bundle").path
    stored = json.loads((folder / "config.json").read_text())["decoder"]
    assert change.items() <= stored.items()
    tensors = mx.load(str(source / "model.safetensors"))
    weights = {name: np.array(tensor.astype(mx.float32), np.float64) for name, tensor in tensors.items()}
    ids = golden_prompt("tiny", "text").ids
    found = logits(load(folder), ids)
    assert relative_l2(found, qwen2_logits(weights, config, ids)) <= ROUNDING
    if change:  # and the numbers matter
        assert relative_l2(found, logits(model("tiny"), ids)) > 1e-3


def is_pending(array: mx.array) -> bool:
    """Whether something is still to be computed for an array: only then does it have a graph."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return "label" in graph.getvalue()


def test_a_stages_time_ends_when_its_values_are_there(model, monkeypatch):
    """Laps are counted instead of timed: each stage's is taken after its own work, and after all of it."""
    worth = {"features": 1.0, "embeddings": 10.0, "logits": 100.0}
    made: list[tuple[str, mx.array]] = []
    laps: list[tuple[list[str], list[str]]] = []  # since the last lap: what was made, and what of it is pending

    def recorded(name: str, function: Callable[[Any], mx.array]) -> Callable[[Any], mx.array]:
        def call(argument: Any) -> mx.array:
            made.append((name, function(argument)))
            return made[-1][1]

        return call

    def lap(_: Stopwatch) -> float:
        laps.append(([name for name, _ in made], [name for name, array in made if is_pending(array)]))
        made.clear()
        return sum(worth[name] for name in laps[-1][0])

    tiny, prompt = model("tiny"), golden_prompt("tiny", "two images")
    tiny.clear_cache()
    monkeypatch.setattr(tiny.engine.vision.encoder, "encode", recorded("features", tiny.engine.vision.encoder.encode))
    monkeypatch.setattr(tiny.engine.vision, "projector", recorded("embeddings", tiny.engine.vision.projector))
    monkeypatch.setattr(tiny.decoder, "head", recorded("logits", tiny.decoder.head))
    monkeypatch.setattr(Stopwatch, "lap", lap)
    monkeypatch.setattr(mx, "async_eval", lambda *_: None)  # what has only been started isn't there yet
    times = tiny.generate(prompt.images, prompt.ids, max_tokens=1).timings
    stages = [names for names, _ in laps if names]
    assert stages == [["features"], ["embeddings"], ["features"], ["embeddings"], ["logits"]]
    assert not any(pending for _, pending in laps)
    assert (times.vision, times.projector, times.prefill) == (2.0, 20.0, 100.0)
    assert (times.preprocess, times.tokenize, times.first_token) == (0.0, 0.0, 0.0)


def test_pending_is_told_from_computed():
    array = mx.ones((2, 2)) + 1
    assert is_pending(array)
    mx.eval(array)
    assert not is_pending(array)
