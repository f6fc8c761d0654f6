"""Counts of layers and weights against hand counts and against what the network really runs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from fastvlm_bench.layers import Storage, count_parameters, decoder_layers, projector_layers, vision_layers
from fastvlm_bench.seeded_model import model_config as seeded_config
from fastvlm_bench.sizes import published_size
from fastvlm_mlx.config import ProjectorConfig
from fastvlm_mlx.decoder import Decoder, build_network
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.projector import MLPProjector
from fastvlm_mlx.vision import fastvithd
from fastvlm_mlx.vision.fastvithd import FastViTHD
from support.shapes import FULL, HALF, PUBLISHED, SMALL, decoder_config, half_billion, model_config


def test_fastvithd_at_1024_px():
    """243.4 GMAC as in Core ML's program of it (see tests/convert/test_full_size.py), by what computes them."""
    macs = Counter()
    for layer in vision_layers(PUBLISHED, 1024, 1024):
        macs[layer.kind] += layer.macs
    sides, dims, blocks = (256, 128, 64, 32, 16), PUBLISHED.embed_dims, PUBLISHED.layers
    squares = [side * side * dim for side, dim in zip(sides, dims, strict=True)]  # values of each stage's map
    matrices = [256 * 256 * 96 * 96]  # the stem's
    matrices += [square * dim for square, dim in zip(squares[1:], dims[1:], strict=True)]  # patch embeddings
    matrices += [n * 8 * square * dim for n, square, dim in zip(blocks, squares, dims, strict=True)]  # MLPs, ratio 4
    matrices += [
        n * 4 * square * dim for n, square, dim in zip((4, 2), squares[3:], dims[3:], strict=True)
    ]  # qkv, proj
    matrices += [2 * 3072 * 192]  # squeeze and excite
    depthwise = [squares[0] * 9, *(square * 49 for square in squares[1:])]  # stem, patch embeddings
    depthwise += [n * square * (9 + 49) for n, square in zip(blocks[:3], squares[:3], strict=True)]
    depthwise += [(n + 1) * square * 49 for n, square in zip(blocks[3:], squares[3:], strict=True)]  # and positions
    depthwise += [16 * 16 * 3072 * 9]
    assert macs["convolution"] == 512 * 512 * 96 * 27
    assert macs["matrix"] == sum(matrices)
    assert macs["depthwise"] == sum(depthwise)
    assert macs["attention"] == 2 * (4 * 1024 * 1024 * 768 + 2 * 256 * 256 * 1536)
    assert [round(macs[kind] / 1e9, 1) for kind in ("matrix", "attention", "depthwise", "convolution")] == [
        230.1,
        6.8,
        5.7,
        0.7,
    ]
    assert round(sum(macs.values()) / 1e9, 1) == 243.4


def small_encoder():
    """SMALL at 128 x 64 px: (multiply-accumulates, weights, values read, values written) of each layer, by hand."""
    expected = {
        "stem.conv": (64 * 32 * 8 * 27, 8 * 27 + 8, 128 * 64 * 3, 64 * 32 * 8),
        "stem.depthwise": (32 * 16 * 8 * 9, 8 * 9 + 8, 64 * 32 * 8, 32 * 16 * 8),
        "stem.pointwise": (32 * 16 * 8 * 8, 8 * 8 + 8, 512 * 8, 512 * 8),
        "stages.0.blocks.0.mixer": (512 * 8 * 9, 80, 512 * 8, 512 * 8),
        "stages.0.blocks.0.ffn.depthwise": (512 * 8 * 49, 8 * 50, 512 * 8, 512 * 8),
        "stages.0.blocks.0.ffn.fc1": (512 * 8 * 24, 8 * 24 + 24, 512 * 8, 512 * 24),
        "stages.0.blocks.0.ffn.fc2": (512 * 24 * 8, 24 * 8 + 8, 512 * (24 + 8), 512 * 8),
        "stages.1.downsample.depthwise": (128 * 16 * 49, 16 * 50, 512 * 8, 128 * 16),
        "stages.1.downsample.pointwise": (128 * 16 * 16, 16 * 17, 128 * 16, 128 * 16),
        "stages.1.blocks.0.mixer": (128 * 16 * 9, 16 * 10, 2048, 2048),
        "stages.1.blocks.0.ffn.depthwise": (128 * 16 * 49, 16 * 50, 2048, 2048),
        "stages.1.blocks.0.ffn.fc1": (128 * 16 * 48, 17 * 48, 2048, 3 * 2048),
        "stages.1.blocks.0.ffn.fc2": (128 * 16 * 48, 49 * 16, 4 * 2048, 2048),
        "stages.2.downsample.depthwise": (32 * 32 * 49, 32 * 50, 2048, 1024),
        "stages.2.downsample.pointwise": (32 * 32 * 32, 32 * 33, 1024, 1024),
    }
    for number in range(2):
        expected |= {
            f"stages.2.blocks.{number}.mixer": (1024 * 9, 320, 1024, 1024),
            f"stages.2.blocks.{number}.ffn.depthwise": (1024 * 49, 1600, 1024, 1024),
            f"stages.2.blocks.{number}.ffn.fc1": (1024 * 96, 33 * 96, 1024, 3072),
            f"stages.2.blocks.{number}.ffn.fc2": (3072 * 32, 97 * 32, 4096, 1024),
        }
    for stage, before, pixels in (("stages.3", 32 * 32, 8), ("stages.4", 8 * 64, 2)):
        size = pixels * 64
        expected |= {
            f"{stage}.downsample.depthwise": (size * 49, 64 * 50, before, size),
            f"{stage}.downsample.pointwise": (size * 64, 64 * 65, size, size),
            f"{stage}.position": (size * 49, 64 * 50, size, size),
            f"{stage}.blocks.0.mixer.qkv": (size * 192, 65 * 192, size, 3 * size),
            f"{stage}.blocks.0.mixer.attention": (2 * pixels * pixels * 64, 0, 3 * size, size),
            f"{stage}.blocks.0.mixer.proj": (size * 64, 65 * 64, 2 * size, size),
            f"{stage}.blocks.0.ffn.depthwise": (size * 49, 64 * 50, size, size),
            f"{stage}.blocks.0.ffn.fc1": (size * 192, 65 * 192, size, 3 * size),
            f"{stage}.blocks.0.ffn.fc2": (3 * size * 64, 193 * 64, 4 * size, size),
        }
    return expected | {
        "expand.depthwise": (2 * 128 * 9, 128 * 10, 2 * 64, 2 * 128),
        "expand.reduce": (128 * 8, 129 * 8, 128, 8),
        "expand.expand": (8 * 128, 9 * 128, 8, 128),
        "expand.gate": (0, 0, 2 * 128 + 128, 2 * 128),
    }


def test_a_small_encoder_layer_by_layer():
    expected = small_encoder()
    found = {n.name: (n.macs, n.parameters, n.read, n.written) for n in vision_layers(SMALL, 128, 64)}
    assert found == expected
    assert list(found) == list(expected)


def test_each_layer_has_the_weights_of_its_module():
    modules = dict(FastViTHD(SMALL).named_modules())
    named = {n.name: n for n in vision_layers(SMALL, 64, 64)}
    assert {name for name in named if name not in modules} == {
        "stages.3.blocks.0.mixer.attention",
        "stages.4.blocks.0.mixer.attention",
        "expand.gate",
    }
    for name, layer in named.items():
        assert layer.parameters == (size(modules[name]) if name in modules else 0), name


def size(module):
    return sum(array.size for _, array in tree_flatten(module.parameters()))


@pytest.mark.parametrize(("tied", "newline"), [(True, False), (False, True)])
def test_parameters_are_those_of_the_modules(tied, newline):
    config = model_config(tied=tied, newline=newline)
    assert count_parameters(config) == {
        "vision": size(FastViTHD(config.vision)),
        "projector": size(MLPProjector(config.projector, newline)),
        "decoder": size(build_network(config.decoder)),
    }


def test_parameters_of_the_published_half_billion():
    config = half_billion()
    assert count_parameters(config) == {
        "vision": size(FastViTHD(PUBLISHED)),  # nothing of it is computed
        "projector": 3072 * 896 + 896 + 896 * 896 + 896,
        "decoder": 494_032_768,  # as Qwen2-0.5B's card counts them
    }
    assert "vision" not in count_parameters(model_config(vision=None))


@pytest.mark.parametrize("biases", [{}, {"qkv_bias": True, "output_bias": True}, {"mlp_bias": True}])
def test_parameters_of_llama(biases):
    decoder = replace(decoder_config(tied=False), **{"model_type": "llama", "qkv_bias": False} | biases)
    assert count_parameters(replace(model_config(), decoder=decoder))["decoder"] == size(build_network(decoder))


def test_parameters_of_vicuna():
    config = seeded_config("vicuna-7b")
    assert count_parameters(config)["decoder"] == 6_738_415_616  # as LLaMA-7B's and Llama-2-7B's cards count them
    assert size(build_network(config.decoder)) == 6_738_415_616
    assert (published_size(config), config.context_length) == ("vicuna-7b", 4096)


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp3x_gelu", "identity"])
def test_parameters_of_projectors(kind):
    config = ProjectorConfig(128, 128, kind)
    module, storage = MLPProjector(config), Storage.of(MLPProjector(config))
    layers = list(projector_layers(config, 6))
    assert sum(layer.parameters for layer in layers) == size(module)
    assert [layer.name for layer in layers] == sorted(dict(module.children()))
    assert sum(layer.moved_bytes(storage) for layer in layers) == 4 * (size(module) + len(layers) * 2 * 6 * 128)


@pytest.fixture
def ran(monkeypatch):
    """(multiply-accumulates, values in and out) of what runs, seen from outside: shapes of arguments and results."""
    seen = []

    def watch(cls, macs, method="__call__"):
        real = getattr(cls, method)

        def call(self, x):
            y = real(self, x)
            seen.append((macs(self, x, y), x.size, y.size))
            return y

        monkeypatch.setattr(cls, method, call)

    def attention(q, k, v, **_):
        rows, columns = q.shape[2], k.shape[2]
        pairs = rows * columns - (rows * (rows - 1) // 2 if q.shape[1] == 4 else 0)  # the decoder has 4 heads: causal
        seen.append((2 * q.shape[1] * q.shape[3] * pairs, q.size + k.size + v.size, q.size))
        return real_attention(q, k, v, **_)

    real_attention = mx.fast.scaled_dot_product_attention
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)
    watch(nn.Linear, lambda self, x, y: x.size * self.weight.shape[0])
    watch(nn.Embedding, lambda self, x, y: x.size * self.weight.shape[0], "as_linear")
    watch(nn.Conv2d, lambda self, x, y: y.size * math.prod(self.weight.shape[1:]))
    watch(fastvithd.DepthwiseConv, lambda self, x, y: y.size * math.prod(self.weight.shape[1:]))
    return seen


def test_vision_counts_are_what_runs(ran):
    mx.eval(FastViTHD(SMALL)(mx.zeros((1, 128, 192, 3))))
    counted = list(vision_layers(SMALL, 128, 192))
    assert [macs for macs, _, _ in ran] == [n.macs for n in counted if n.kind != "pointwise"]
    residual = {n.name: n.written for n in counted if n.name.endswith((".proj", ".fc2"))}
    known = [(n.read - residual.get(n.name, 0), n.written) for n in counted if n.kind != "pointwise"]
    assert [(read, written) for _, read, written in ran] == known


@pytest.mark.parametrize("tied", [True, False])
def test_decoder_counts_are_what_runs(ran, tied):
    config = decoder_config(tied)
    decoder = Decoder(build_network(config), config)
    cache = decoder.new_cache()
    for positions, known in ((7, 0), (5, 7), (1, 12)):
        ran.clear()
        mx.eval(decoder.head(decoder.hidden(mx.zeros((1, positions, 128)), cache)[:, -1]))
        counted = list(decoder_layers(config, positions, known, text_tokens=3))
        assert sum(macs for macs, _, _ in ran) == sum(n.macs for n in counted)
        attended = [(n.macs, n.read, n.written) for n in counted if n.kind == "attention"]
        assert [seen for seen in ran if seen in attended] == attended
        assert len(attended) == 2
    assert cache[0].offset == 13


def test_projector_counts_are_what_runs(ran):
    config = ProjectorConfig(48, 128)
    mx.eval(MLPProjector(config)(mx.zeros((1, 6, 48))))
    assert ran == [(n.macs, n.read, n.written) for n in projector_layers(config, 6)]
    assert ran == [(6 * 48 * 128, 6 * 48, 6 * 128), (6 * 128 * 128, 6 * 128, 6 * 128)]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_weight_bytes_are_those_in_memory(bits, tied):
    config = decoder_config(tied)
    network = build_network(config)
    network.set_dtype(mx.bfloat16)
    nn.quantize(network, group_size=64, bits=bits)
    storage = Storage.of(network)
    assert storage == Storage("bfloat16", bits)
    counted = sum(n.weight_bytes(storage) for n in decoder_layers(config, 1, 0, 0))
    if not tied:
        counted += storage.matrix_bytes(config.vocab_size, config.hidden_size)
    assert counted == sum(array.nbytes for _, array in tree_flatten(network.parameters()))


def test_the_storage_of_loaded_modules():
    network = FastViTHD(SMALL)
    assert Storage.of(network) == FULL
    network.set_dtype(mx.bfloat16)
    assert Storage.of(network) == HALF
    mixed = MLPProjector(ProjectorConfig(64, 128))
    mixed.update(tree_unflatten([("linear_1.bias", mx.zeros(128, mx.float16))]))
    assert Storage.of(mixed) == FULL
    packed = MLPProjector(ProjectorConfig(64, 128))
    nn.quantize(packed, class_predicate=lambda path, _: {"bits": 8 if path == "linear_1" else 4, "group_size": 32})
    assert Storage.of(packed) == Storage("float32", 4, 32)  # linear_2 is the larger


def test_a_type_that_nothing_is_kept_in():
    with pytest.raises(InputError, match="one of float32, float16, bfloat16, got 'int8'"):
        Storage("int8")
