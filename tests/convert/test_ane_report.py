"""Multiply-accumulates by hand, and what the static report of a package's placement says."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("coremltools", reason="the convert extra isn't installed")

from fastvlm_convert.ane_report import report
from fastvlm_mlx.errors import BundleError
from support.ane_programs import MAP, conv, mb, rewrite, save, zeros
from support.mil_programs import operations


def wide(x):
    return [conv(x, (1, 20), f"wide{i}") for i in range(5)]


def steps(x):
    return [conv(x, (1, 1), f"s{s}", strides=[1, s]) for s in (4, 5, 7)]


def grouped(x):
    return mb.conv(x=x, weight=zeros(6, 2, 3, 3), groups=2, strides=[2, 1], pad_type="valid")


def dilated(x):
    return mb.conv(x=x, weight=zeros(5, 4, 3, 1), dilations=[2, 1], pad_type="valid")


def depthwise(x):
    return mb.conv(x=x, weight=zeros(8, 1, 3, 3), groups=4, pad_type="same")


def of_one_channel(x):
    return mb.conv(x=x, weight=zeros(8, 1, 3, 3), pad_type="same")


def pointwise(x):
    return mb.conv(x=x, weight=zeros(5, 4, 1, 1))


def in_a_row(x):
    return mb.conv(x=x, weight=zeros(5, 4, 3))


def spread(x):
    return mb.conv_transpose(x=x, weight=zeros(4, 3, 2, 2), strides=[2, 2])


def linear(x):
    return mb.linear(x=x, weight=zeros(7, 32))


def of_weights(x):
    return mb.matmul(x=x, y=zeros(32, 7))


def broadcast(x, y):
    return mb.matmul(x=x, y=y)


def first_transposed(x, y):
    return mb.matmul(x=x, y=y, transpose_x=True)


def second_transposed(x, y):
    return mb.matmul(x=x, y=y, transpose_y=True)


def both_transposed(x, y):
    return mb.matmul(x=x, y=y, transpose_x=True, transpose_y=True)


def sdpa(q, k, v):
    return mb.scaled_dot_product_attention(query=q, key=k, value=v)


def einsum(x, y):
    return mb.einsum(values=(x, y), equation="nchw,nwhu->nchu")


def lstm(x):
    weights = {"weight_ih": zeros(16, 8), "weight_hh": zeros(16, 4), "bias": zeros(16)}
    return mb.lstm(x=x, initial_h=zeros(2, 4), initial_c=zeros(2, 4), **weights)[0]


@pytest.mark.parametrize(
    ("build", "shapes", "macs"),
    [
        (grouped, [(1, 4, 16, 32)], {"other convolution": 6 * 7 * 30 * 2 * 9}),
        (dilated, [(2, 4, 16, 32)], {"other convolution": 2 * 5 * 12 * 32 * 4 * 3}),
        (depthwise, [(1, 4, 16, 32)], {"depthwise convolution": 8 * 16 * 32 * 9}),
        (of_one_channel, [(1, 1, 16, 32)], {"other convolution": 8 * 16 * 32 * 9}),
        (pointwise, [(1, 4, 16, 32)], {"1x1 convolution": 5 * 16 * 32 * 4}),
        (in_a_row, [(1, 4, 32)], {"other convolution": 5 * 30 * 4 * 3}),
        (spread, [(1, 4, 16, 32)], {"other convolution": 4 * 16 * 32 * 3 * 4}),
        (linear, [(2, 3, 32)], {"linear": 2 * 3 * 7 * 32}),
        (of_weights, [(2, 3, 32)], {"linear": 2 * 3 * 7 * 32}),
        (broadcast, [(2, 1, 3, 8), (1, 5, 8, 4)], {"attention": 2 * 5 * 3 * 4 * 8}),
        (first_transposed, [(8, 3), (8, 4)], {"attention": 3 * 4 * 8}),
        (second_transposed, [(5, 3, 8), (4, 8)], {"attention": 5 * 3 * 4 * 8}),
        (both_transposed, [(8, 3), (4, 8)], {"attention": 3 * 4 * 8}),
        (sdpa, [(1, 2, 5, 8), (1, 2, 7, 8), (1, 2, 7, 6)], {"attention": 2 * 5 * 7 * 8 + 2 * 5 * 7 * 6}),
        (einsum, [(1, 2, 3, 4), (1, 4, 3, 5)], {"attention": 1 * 2 * 3 * 4 * 5}),
        (lstm, [(3, 2, 8)], {"recurrent": 3 * 2 * (16 * 8 + 16 * 4)}),
    ],
)
def test_multiply_accumulates_by_hand(tmp_path, build, shapes, macs):
    (found,) = report(save(tmp_path, build, shapes))
    assert found.macs == macs
    assert found.eligible_share == (0.0 if build is lstm else 1.0)


def test_the_share_is_of_multiply_accumulates(tmp_path):
    def without(x):
        return mb.relu(x=x)

    def build(x):
        return [conv(x, (1, width), f"w{width}", pad_type="same") for width in (3, 12, 15)]

    (found,) = report(save(tmp_path, build, [MAP]))
    assert found.eligible_share == 0.5
    assert found.ops == {"conv": 3}
    (found,) = report(save(tmp_path, without, [MAP]))
    assert (found.macs, found.eligible_share) == ({}, 1.0)


def test_dynamic_sizes_count_once(tmp_path):
    """A lower bound, and none of it is expected on the Neural Engine."""

    def height_dynamic(specification):
        main = specification.mlProgram.functions["main"]
        last = operations(specification)[-1]
        for value in (main.inputs[0], last.outputs[0]):
            value.type.tensorType.dimensions[2].unknown.variadic = False

    (found,) = report(rewrite(save(tmp_path, pointwise, [(1, 4, 16, 32)]), height_dynamic))
    assert found.macs == {"1x1 convolution": 5 * 32 * 4}
    assert found.eligible_share == 0.0


def test_text_and_json(tmp_path):
    (found,) = report(save(tmp_path, steps, [MAP]))
    text = found.to_text()
    macs = 4 * 4 * 40 * (16 + 13 + 10)
    assert text.startswith(f"main: 100.0% of {macs / 1e9:.3g} GMAC expected on the Neural Engine (a heuristic: static")
    assert f"\n  1x1 convolution: {macs / 1e9:.3g} GMAC\n" in text
    assert "\n  stride outside 1, 2, 3, 4, 8, slower (2): conv s5, conv s7: strides [1, 5] [sbryngelson/" in text
    data = json.loads(found.to_json())
    assert (data["heuristic"], data["function"], data["ops"]) == (True, "main", {"conv": 3})
    assert data["macs"] == {"1x1 convolution": macs}
    first = data["findings"][0]
    assert first.keys() == {"rule", "op", "where", "detail", "source", "blocks"}
    assert (first["op"], first["where"], first["blocks"]) == ("conv", "s5", False)


def test_text_names_the_first_few(tmp_path):
    (found,) = report(save(tmp_path, wide, [MAP]))
    text = found.to_text()
    assert "large kernel, off the Neural Engine (5): conv wide0, conv wide1, conv wide2, ...: kernel (1, 20) [" in text
    assert len(found.findings) == 5 + 5  # the kernels, and each output's rows of 45 values


def test_text_without_findings(tmp_path):
    def build(x):
        return mb.relu(x=x)

    (found,) = report(save(tmp_path, build, [MAP]))
    assert found.to_text().endswith("\n  no finding")


def test_packages_that_cannot_be_read(tmp_path):
    with pytest.raises(BundleError, match="no readable Core ML package: it has no Manifest"):
        report(tmp_path)
    package = save(tmp_path, pointwise, [(1, 4, 16, 32)])
    with pytest.raises(BundleError, match="has no function r256; it has main"):
        report(package, "r256")

    def lose_weight(specification):
        next(op for op in operations(specification) if op.type == "conv").inputs.pop("weight")

    with pytest.raises(BundleError, match="lacks its parameter weight"):
        report(rewrite(package, lose_weight))

    def rename(specification):
        next(op for op in operations(specification) if op.type == "conv").inputs["x"].arguments[0].name = "nowhere"

    with pytest.raises(BundleError, match="takes nowhere, which nothing makes"):
        report(rewrite(save(tmp_path, depthwise, [(1, 4, 16, 32)]), rename))
