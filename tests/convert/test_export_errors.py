"""Flags and models that another runtime's folder can't be made of."""

from __future__ import annotations

import shutil

import pytest

from fastvlm_convert.cli import main
from support.layouts import to_apple_mlx
from support.tokenizers import with_tokenizer

pytest.importorskip("torch", reason="the convert extra isn't installed")
pytest.importorskip("coremltools", reason="the convert extra isn't installed")

PACKAGE = "fastvithd.mlpackage"
BAD = {
    "apple-app --resolutions 128,256": "takes images of one size, --resolutions names 2",
    "apple-app --resolutions 128x192": "takes square images",
    "apple-app --no-coreml": "leave --no-coreml out",
    "apple-app --vision-bits 8": "--vision-bits is for bundles",
    "apple-app --min-target macOS14": "--min-target is for bundles",
    "apple-app --upload-repo a/b": "--upload-repo is for bundles",
    "apple-app --vision-dtype float32": "leave --vision-dtype out",
    "apple-app -q --quantize-vision": "--quantize-vision is for bundles",
    "apple-app --attention sdpa": "needs macOS 15, Apple's package is for macOS 13",
    "apple-app -q --q-bits 7": "--q-bits must be one of",
    "mlx-vlm --resolutions 256": "leave --resolutions, --attention and --calibration out",
    "mlx-vlm --vision-dtype float16": "overflows float16",
    "mlx-vlm --attention batched": "leave --resolutions, --attention and --calibration out",
    "mlx-vlm --force": "--force is for bundles",
    "mlx-vlm --template vicuna_v1": "--template is for bundles",
    "apple-app --template chatml": "--template is for bundles",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_flags(worded, tmp_path, capsys, flags):
    assert main([str(worded("tiny")), "-o", str(tmp_path / "out"), "--layout", *flags.split()]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert BAD[flags] in err
    assert not (tmp_path / "out").exists()


def test_an_unknown_layout(worded, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(worded("tiny")), "--layout", "gguf"])
    assert caught.value.code == 2
    assert "invalid choice: 'gguf' (choose from" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["apple-app", "mlx-vlm"])
def test_a_model_without_a_tokenizer(checkpoint, tmp_path, capsys, layout):
    assert main([str(checkpoint("tiny")), "-o", str(tmp_path / "out"), "--layout", layout]) == 2
    assert "has no tokenizer, which" in capsys.readouterr().err


def test_models_that_they_cannot_run(checkpoint, worded, tmp_path, capsys):
    full = with_tokenizer(checkpoint("tiny"), tmp_path / "full", 1024)
    argv = ["-o", str(tmp_path / "out"), "--layout"]
    assert main([str(full), *argv, "apple-app"]) == 2
    assert "leaves no id for <image>: it would be 1024, the embedding has 1024 rows" in capsys.readouterr().err
    apple = to_apple_mlx(worded("tiny"), tmp_path / "apple")
    assert main([str(apple), *argv, "mlx-vlm"]) == 2
    assert "has no vision weights, and mlx-vlm needs its weights" in capsys.readouterr().err
    shutil.rmtree(apple / PACKAGE)
    assert main([str(apple), *argv, "apple-app"]) == 2
    assert f"has neither vision weights nor {PACKAGE}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
