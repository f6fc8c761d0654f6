"""Quantised at every width: the error is the matrices' own, and the size is what the bits say."""

from __future__ import annotations

import shutil

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_convert.pipeline import Options, convert
from fastvlm_convert.quantize import Quantization, quantize
from fastvlm_mlx import FastVLM, load
from fastvlm_mlx.bundle import Bundle, read_tensors
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.loading import assemble
from fastvlm_mlx.manifest import Manifest
from fastvlm_mlx.prefill import embed, prefill
from support.seeded import golden, golden_prompt, relative_l2

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
# Packed and unpacked matmuls of the same values in float32: only the order of summation differs.
SAME_VALUES = 1e-5


def logits(model: FastVLM, kind: str = "one image") -> np.ndarray:
    prompt = golden_prompt("tiny", kind)
    images = [model.encode_image(image).embeddings for image in prompt.images]
    spans = model.expand(prompt.ids, [len(image) for image in images])
    return np.array(prefill(model.decoder, embed(model.decoder, spans, images), model.decoder.new_cache())[0])


def is_matrix(name: str, tensor: mx.array) -> bool:
    return name.endswith(".weight") and tensor.ndim == 2 and not name.startswith("projector.")


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory):
    return convert(checkpoint("tiny"), tmp_path_factory.mktemp("plain") / "b", Options(dtype="float32")).path


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_what_quantising_the_matrices_predicts(checkpoint, plain, tmp_path, bits, group):
    """The bundle's answer equals that of the plain decoder with each matrix rounded on its own."""
    options = Options(dtype="float32", q_bits=bits, q_group_size=group)
    packed = convert(checkpoint("tiny"), tmp_path / "packed", options).path
    opened = Bundle.open(packed)
    assert (opened.config.quantization.bits, opened.config.quantization.group_size) == (bits, group)

    predicted = shutil.copytree(plain, tmp_path / "predicted")
    tensors = read_tensors(plain / "decoder.safetensors")
    for name, tensor in tensors.items():
        if is_matrix(name, tensor):
            parts = mx.quantize(tensor, group_size=group, bits=bits)
            tensors[name] = mx.dequantize(*parts, group_size=group, bits=bits)
    mx.save_safetensors(str(predicted / "decoder.safetensors"), tensors)
    right = logits(unchecked(predicted))

    through_kernels = logits(assemble(opened, unpack=False))
    unpacked = logits(load(packed))
    assert relative_l2(through_kernels, right) <= SAME_VALUES
    assert relative_l2(unpacked, right) <= SAME_VALUES
    # And the rounding is really there: above float32's noise, more of it with fewer bits.
    error = relative_l2(right, golden_prompt("tiny", "one image").first_logits)
    assert error > 1e-3


def unchecked(folder) -> FastVLM:
    """Load a bundle whose weights the test has changed."""
    config = ModelConfig.from_file(folder / "config.json")
    return assemble(Bundle(folder, config, Manifest.from_file(folder / "manifest.json")))


def test_more_bits_less_error(checkpoint, plain, tmp_path):
    right = logits(load(plain))
    errors = []
    for bits in BITS:
        packed = convert(checkpoint("tiny"), tmp_path / str(bits), Options(dtype="float32", q_bits=bits)).path
        errors.append(relative_l2(logits(load(packed)), right))
    assert errors == sorted(errors, reverse=True)
    # Measured 3.0e-2: half a step of 1/255 of each group's range, in every matrix of the two blocks.
    assert errors[-1] < 5e-2


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", BITS)
def test_size_on_disk(checkpoint, bundle, tmp_path, bits, group):
    packed = convert(checkpoint("tiny"), tmp_path / "packed", Options(q_bits=bits, q_group_size=group)).path
    expected = 0.0
    for name, tensor in read_tensors(bundle("tiny") / "decoder.safetensors").items():
        if is_matrix(name, tensor):
            expected += tensor.size * (bits / 8 + 2 * 2 / group)  # a bfloat16 scale and bias per group
        else:
            expected += tensor.nbytes
    file = packed / "decoder.safetensors"
    header = int.from_bytes(file.read_bytes()[:8], "little") + 8
    assert file.stat().st_size - header == expected


def test_projector_and_vision_stay_unless_asked(checkpoint, tmp_path):
    def packed(**options: bool) -> tuple[bool, bool]:
        target = tmp_path / "-".join(["b", *options])
        convert(checkpoint("tiny"), target, Options(q_bits=4, **options))
        files = (read_tensors(target / f"{part}.safetensors") for part in ("decoder", "vision"))
        decoder, vision = ({n for n in file if n.endswith(".scales")} for file in files)
        return any(n.startswith("projector.") for n in decoder), bool(vision)

    assert packed() == (False, False)
    assert packed(quantize_projector=True) == (True, False)
    assert packed(quantize_vision=True) == (False, True)


def test_quantised_vision_works(checkpoint, tmp_path):
    options = Options(q_bits=8, quantize_projector=True, quantize_vision=True)
    model = load(convert(checkpoint("tiny"), tmp_path / "b", options).path)
    data = golden("tiny")
    found = model.encode_image(data["pixels_256x256"])
    # Measured 1.8e-2 and 2.6e-2: 8 bits in the matrices of all blocks.
    assert 1e-4 < relative_l2(found.features, data["features_256x256"]) < 3e-2
    assert relative_l2(found.embeddings, data["projected_256x256"]) < 4e-2


@pytest.mark.parametrize("bits", BITS)
def test_quantise_while_loading(plain, checkpoint, tmp_path, bits):
    """load(quantize=...) rounds as the converter does, to the bit."""
    converted = convert(checkpoint("tiny"), tmp_path / "b", Options(dtype="float32", q_bits=bits)).path
    np.testing.assert_array_equal(logits(load(plain, quantize=bits)), logits(load(converted)))


def test_a_quantised_bundle_is_not_quantised_again(checkpoint, tmp_path):
    packed = convert(checkpoint("tiny"), tmp_path / "b", Options(q_bits=4)).path
    with pytest.raises(InputError, match=r"quantised already \(4 bits\)"):
        load(packed, quantize=8)


def test_blocks_of_rows_are_the_whole(monkeypatch):
    weight = mx.random.normal((100, 128))
    whole = mx.quantize(weight, group_size=64, bits=4)
    monkeypatch.setattr("fastvlm_convert.quantize.ROWS_BYTES", 7 * 128 * 4)
    for part, right in zip(quantize(weight, Quantization(4)), whole, strict=True):
        assert mx.array_equal(part, right)


def test_rows_that_do_not_divide_are_left_alone():
    assert not Quantization(4, 64).fits((10, 96))
    assert Quantization(4, 32).fits((10, 96))
    assert not Quantization(4).fits((64,))
