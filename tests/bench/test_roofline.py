"""Operations and bytes of the stages by hand, and the limits that follow."""

from __future__ import annotations

import pytest

from fastvlm_bench.layers import Storage, vision_layers
from fastvlm_bench.peaks import Peaks
from fastvlm_bench.roofline import Limit, Work, limit, stage_work
from fastvlm_mlx.errors import InputError, ResolutionError
from support.shapes import FULL, HALF, SMALL, half_billion, model_config

BLOCK = 2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864  # matrices of a block: q and o, k and v, MLP


def test_vision_at_1024_px():
    """243.4 GMAC; each is a product and a sum."""
    work = stage_work(half_billion(), 1024, 24, vision=HALF, decoder=HALF)["vision"]
    assert round(work.flops / 2e9, 1) == 243.4


def test_vision_is_the_sum_of_its_layers():
    """`test_layers` has them by hand."""
    work = stage_work(model_config(), (128, 64), 3, vision=FULL, decoder=HALF)["vision"]
    layers = list(vision_layers(SMALL, 128, 64))
    assert work.flops == 2 * sum(n.macs for n in layers)
    assert work.bytes == 4 * sum(n.parameters + n.read + n.written for n in layers)


def test_decoding_with_qwen2_half_billion():
    """One token after 280 positions, bfloat16, by hand."""
    config = half_billion()
    work = stage_work(config, 1024, 24, vision=HALF, decoder=HALF)["decode"]
    matrices = 24 * BLOCK + 151936 * 896  # = 494 M, the embedding as head
    assert work.flops == 2 * (matrices + 24 * 2 * 281 * 896)
    weights = matrices + 24 * (896 + 128 + 128) + 49 * 896 + 896  # biases, norms, the token's own row
    cached = 24 * 2 * 281 * 128  # keys and values
    block = (896 + 1152) + (896 + 896) + (2 * 896 + 896) + (896 + 4864) + (4864 + 896 + 896)
    assert work.bytes == 2 * (weights + cached + 896 + 24 * block + 896 + 151936)


def test_prefill_of_qwen2_half_billion():
    """256 positions of the image and 24 of text, float32, by hand; the head sees one row."""
    config = half_billion()
    work = stage_work(config, 1024, 24, vision=HALF, decoder=FULL)
    pairs = 280 * 281 // 2
    assert work["prefill"].flops == 2 * (280 * 24 * BLOCK + 24 * 2 * pairs * 896 + 151936 * 896)
    weights = 24 * BLOCK + 151936 * 896 + 24 * 1152 + 49 * 896
    block = (896 + 1152) + (896 + 2 * 128 + 896) + (2 * 896 + 896) + (896 + 4864) + (4864 + 896 + 896)
    assert work["prefill"].bytes == 4 * (weights + 2 * 24 * 896 + 24 * 280 * block + 896 + 151936)
    assert work["projector"].flops == 2 * 256 * (3072 * 896 + 896 * 896)
    moved = 3072 * 896 + 896 + 896 * 896 + 896 + 256 * (3072 + 896 + 896 + 896)
    assert work["projector"].bytes == 4 * moved


def test_decoding_grows_evenly_with_the_context():
    first, middle, last = (
        stage_work(model_config(), 64, 9, vision=HALF, decoder=HALF, context=n)["decode"] for n in (10, 15, 20)
    )
    assert middle.flops - first.flops == last.flops - middle.flops == 2 * 5 * 2 * 2 * 128
    assert middle.bytes - first.bytes == last.bytes - middle.bytes == 2 * 5 * 2 * 2 * 64
    assert first == stage_work(model_config(), 64, 9, vision=HALF, decoder=HALF)["decode"]


def test_quantised_bytes_by_hand():
    storage = Storage("float16", bits=4, group_size=32)
    assert storage.name == "4 bits, float16"
    assert storage.matrix_bytes(10, 64) == 10 * 64 // 2 + 10 * 2 * (2 + 2)  # two groups a row, a scale and a bias each
    assert storage.matrix_bytes(10, 48) == 10 * 48 * 2  # the group doesn't divide the row: left plain
    config = model_config()
    plain = stage_work(config, 64, 3, vision=HALF, decoder=HALF)
    packed = stage_work(config, 64, 3, vision=HALF, decoder=Storage("bfloat16", 4))
    assert plain["projector"] == packed["projector"]
    matrices = 2 * (128 * 256 + 128 * 128 + 3 * 128 * 192) + 300 * 128
    assert plain["decode"].bytes - packed["decode"].bytes == (matrices + 128) * 23 // 16  # 2 bytes, or 1/2 + 4/64
    assert plain["decode"].flops == packed["decode"].flops


def test_the_longer_of_the_two_is_the_limit():
    peaks = Peaks({"float32": 100.0, "bfloat16": 400.0}, bandwidth=10.0)
    assert limit(Work(1000, 50, FULL), peaks) == Limit(10.0, "compute")
    assert limit(Work(1000, 50, HALF), peaks) == Limit(5.0, "memory")
    assert Limit(10.0, "compute").share(40.0) == 0.25
    assert Limit(10.0, "compute").share(8.0) == 1.25  # above the peak, and said so
    with pytest.raises(InputError, match="rate of float16"):
        limit(Work(1, 1, Storage("float16")), peaks)


def test_what_there_is_no_shape_for_is_left_out():
    assert list(stage_work(model_config(vision=None), 64, 3, vision=HALF, decoder=HALF)) == [
        "projector",
        "prefill",
        "decode",
    ]


def test_wrong_arguments():
    with pytest.raises(ResolutionError, match="multiple of 64"):
        stage_work(model_config(), (128, 100), 3, vision=HALF, decoder=HALF)
    with pytest.raises(InputError, match="got -1 and None"):
        stage_work(model_config(), 64, -1, vision=HALF, decoder=HALF)
    with pytest.raises(InputError, match="got 3 and -2"):
        stage_work(model_config(), 64, 3, vision=HALF, decoder=HALF, context=-2)
