"""Saved Core ML packages: opened, and executed in float32 and float16."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref

import numpy as np
import pytest

from fastvlm_convert.mil_check import Comparison, compare, execute, open_package
from fastvlm_mlx.errors import BundleError, InputError
from support.mil_programs import quiet, save_functions, save_program, save_torch, weight_file

torch = pytest.importorskip("torch")
with quiet():
    ct = pytest.importorskip("coremltools")
    from coremltools.converters.mil.mil import Builder as mb

RANDOM = np.random.default_rng(7)
WEIGHT = (RANDOM.normal(size=(8, 3, 3, 3)) / 4).astype(np.float32)


class Network(torch.nn.Module):
    """What FastViTHD is made of: convolutions, GELU, a squeeze-and-excite, a LayerNorm, attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = torch.nn.Conv2d(3, 32, 3, stride=2, padding=1)
        self.depthwise = torch.nn.Conv2d(32, 32, 7, padding=3, groups=32)
        self.squeeze, self.excite = torch.nn.Conv2d(32, 4, 1), torch.nn.Conv2d(4, 32, 1)
        # The epsilon and the scale of the attention are powers of two: float16 has them exactly.
        self.norm, self.qkv = torch.nn.LayerNorm(32, eps=2**-16), torch.nn.Linear(32, 96)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.gelu(self.stem(x))
        x = x + self.depthwise(x)
        scale = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        tokens = self.norm((x * scale).flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).reshape(1, -1, 3, 2, 16).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q @ k.transpose(-1, -2) * 16**-0.5).softmax(-1)
        return (attention @ v).transpose(1, 2).flatten(2)


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(2).random((1, 3, 24, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def network(tmp_path_factory, pixels):
    """Precision -> the network's package."""
    folder = tmp_path_factory.mktemp("network")
    return {
        name: save_torch(
            folder / f"{name}.mlpackage",
            Network(),
            torch.from_numpy(pixels),
            inputs=[ct.TensorType(name="x", shape=pixels.shape)],
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision[name],
        )
        for name in ("FLOAT32", "FLOAT16")
    }


def through_torch(module, pixels):
    with torch.inference_mode():
        return module.eval()(torch.from_numpy(pixels)).numpy()


def run(path, inputs, precision="float32", function=None):
    return execute(open_package(path).program(function), inputs, precision, trace=True)


def only(execution):
    (output,) = execution.outputs.values()
    return output


def test_a_float32_package_equals_torch(network, pixels):
    right = through_torch(Network(), pixels)
    # Not zero: coremltools rewrites the linear layer and the scale of the attention.
    assert compare(only(run(network["FLOAT32"], {"x": pixels})), right).relative_l2 < 1e-6


def test_a_float16_package_computed_in_float32_equals_torch_with_rounded_weights(network, pixels):
    rounded = Network().half().float()
    found = only(run(network["FLOAT16"], {"x": pixels}))
    assert compare(found, through_torch(rounded, pixels)).relative_l2 < 1e-6
    assert compare(found, through_torch(Network(), pixels)).relative_l2 > 1e-5  # the weights' own rounding


def test_rounding_every_op_costs_what_float16_costs(network, pixels):
    found = only(run(network["FLOAT16"], {"x": pixels}, "float16"))
    assert 1e-4 < compare(found, through_torch(Network(), pixels)).relative_l2 < 5e-3
    assert np.array_equal(found, found.astype(np.float16))


def test_each_value_goes_after_its_last_use(network, pixels, monkeypatch):
    from fastvlm_convert.mil_check import machine

    alive, most = weakref.WeakSet(), []

    def watched(handler):
        def call(args):
            made = handler(args)
            alive.update(made if isinstance(made, tuple) else (made,))
            most.append(len(alive))
            return made

        return call

    monkeypatch.setattr(machine, "HANDLERS", {op: watched(handler) for op, handler in machine.HANDLERS.items()})
    run(network["FLOAT32"], {"x": pixels})
    assert len(most) > 20
    assert max(most) <= 6  # qkv with its three parts, one of them transposed


@pytest.mark.parametrize(("layout", "channels"), [("RGB", slice(None)), ("BGR", slice(None, None, -1))])
@pytest.mark.parametrize("batched", [True, False])
def test_an_image_goes_in_as_core_ml_hands_it_over(tmp_path, layout, channels, batched):
    convolution = torch.nn.Conv2d(3, 8, 3, bias=False)
    convolution.weight.data = torch.from_numpy(WEIGHT)
    image = ct.ImageType(
        name="image", shape=(1, 3, 8, 6), scale=0.5, bias=[-1.0, 2.0, 3.0], color_layout=ct.colorlayout[layout]
    )
    path = save_torch(
        tmp_path / "image.mlpackage", convolution, torch.zeros(1, 3, 8, 6), inputs=[image],
        compute_precision=ct.precision.FLOAT32, minimum_deployment_target=ct.target.iOS17,
    )  # fmt: skip
    feature = open_package(path).functions["main"].inputs[0]
    assert (feature.name, feature.kind, feature.shape) == ("image", "image", (1, 3, 8, 6))

    picture = RANDOM.integers(0, 256, (8, 6, 3), dtype=np.uint8)
    as_seen = picture[..., channels].astype(np.float32) * 0.5 + np.array([-1, 2, 3], np.float32)
    right = through_torch(convolution, np.ascontiguousarray(as_seen.transpose(2, 0, 1))[None])
    found = only(run(path, {"image": picture[None] if batched else picture}))
    assert compare(found, right).relative_l2 < 1e-6


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    return save_functions(tmp_path_factory.mktemp("several"), (8, 16), lambda x: mb.conv(x=x, weight=WEIGHT, name="y"))


def test_several_functions_share_their_weights(several):
    package = open_package(several)
    assert list(package.functions) == ["r8", "r16"]
    assert package.default_function == "r16"
    assert package.program().function == "r16"
    assert weight_file(several).stat().st_size < 1.5 * WEIGHT.nbytes
    for side in (8, 16):
        info = package.functions[f"r{side}"]
        assert [(i.name, i.kind, i.shape, i.dtype) for i in info.inputs] == [
            ("x", "tensor", (1, 3, side, side), "fp32")
        ]
        assert [(o.name, o.shape, o.dtype) for o in info.outputs] == [("y", (1, 8, side - 2, side - 2), "fp32")]
        x = RANDOM.normal(size=(1, 3, side, side)).astype(np.float32)
        right = torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(WEIGHT)).numpy()
        assert np.array_equal(only(run(several, {"x": x}, function=f"r{side}")), right)


def test_a_missing_function_is_named_with_those_there(several):
    with pytest.raises(BundleError, match=r"no function 'r32'; it has r8, r16"):
        open_package(several).program("r32")


@pytest.fixture
def growing(tmp_path):
    """An exponential, then its square, then a difference that turns infinity into NaN."""

    def build(x):
        large = mb.square(x=mb.exp(x=x, name="exponential"), name="large")
        return mb.sub(x=large, y=mb.mul(x=large, y=np.float16(2)), name="difference")

    return save_program(tmp_path / "growing.mlpackage", build, [(1, 4)], half=True)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_first_overflow_is_named(growing, precision):
    x = np.array([[0, 1, 2, 6]], np.float32)  # e^12 = 162755 > 65504
    execution = run(growing, {"x": x}, precision)
    first = execution.first_overflow
    assert (first.name, first.type, first.shape, first.overflowed) == ("large", "square", (1, 4), True)
    assert first.max_abs == pytest.approx(np.exp(12), rel=2e-3)  # before it's rounded
    assert [(op.name, op.overflowed) for op in execution.trace][:2] == [("exponential", False), ("large", True)]
    last = only(execution)[0, 3]
    assert np.isnan(last) if precision == "float16" else last == pytest.approx(-np.exp(12), rel=1e-5)


def test_nothing_overflows_up_to_the_largest_float16(growing):
    x = np.log(np.sqrt(np.array([[1, 2, 3, 32000]]))).astype(np.float32)
    execution = execute(open_package(growing).program(), {"x": x}, "float16")
    assert execution.first_overflow is None
    assert execution.trace == ()
    assert np.isfinite(only(execution)).all()


def test_compare():
    right = np.array([3.0, 4.0], np.float32)
    assert compare(right, right) == Comparison(0.0, 0.0)
    assert compare(right * 0, right) == Comparison(1.0, 4.0)
    assert compare(right, right * 0) == Comparison(float("inf"), 4.0)
    assert compare(right * np.nan, right) == Comparison(float("inf"), float("inf"))
    with pytest.raises(InputError, match="shape"):
        compare(right, right[None])


def test_the_package_is_light_to_import():
    code = "import sys, fastvlm_convert.mil_check as m; sys.exit(bool({'torch', 'coremltools'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": os.pathsep.join(sys.path)}).returncode == 0
