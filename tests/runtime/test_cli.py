"""`fastvlm`: what a user types and sees."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fastvlm_mlx import load
from fastvlm_mlx.cli import main
from support.seeded import SPEAKING


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 120, 3), np.uint8)).save(path)
    return path


def fails(capsys, argv, *parts: str, code: int = 2) -> None:
    """The command exits with `code` and one line on stderr that has all of these parts."""
    try:
        found = main(argv)
    except SystemExit as exc:  # argparse
        found = exc.code
    out, err = capsys.readouterr()
    assert found == code
    assert out == ""
    lines = [line for line in err.splitlines() if not line.startswith("fastvlm-nano: ")]
    assert lines[-1].startswith("fastvlm")
    assert "error: " in lines[-1]
    assert len(lines) == 1 or lines[0].startswith("usage:")
    for part in parts:
        assert part in lines[-1]


def test_generate_streams_the_answer(photo, capsys):
    assert main(["generate", "--image", str(photo), "--prompt", "What is this?", "--max-tokens", "8"]) == 0
    right = load().generate(photo, "What is this?", max_tokens=8)
    assert capsys.readouterr().out == right.text + "\n"


def test_default_prompt_and_default_model(photo, capsys):
    assert main(["generate", "--image", str(photo), "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == load().generate(photo, "Describe the image.", max_tokens=4).text + "\n"


def test_json(photo, capsys):
    argv = [
        "generate",
        "--image",
        str(photo),
        "--image",
        str(photo),
        "--prompt",
        "Is <image> <image>?",
        "--json",
    ]
    assert main([*argv, "--max-tokens", "4", "--resolution", "128", "--vision", "mlx"]) == 0
    found = json.loads(capsys.readouterr().out)
    right = load(resolution=128, vision="mlx").generate([photo, photo], "Is <image> <image>?", max_tokens=4)
    assert found["token_ids"] == list(right.token_ids)
    assert found["text"] == right.text
    assert found["image_tokens"] == 8
    assert found["timings"]["ttft"] > 0


def test_stdin(photo, capsys, monkeypatch):
    argv = ["generate", "--prompt", "What?", "--max-tokens", "4", "--image"]
    assert main([*argv, str(photo)]) == 0
    from_file = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(photo.read_bytes())))
    assert main([*argv, "-"]) == 0
    assert capsys.readouterr().out == from_file


def test_stats(photo, capsys, bundle):
    argv = ["generate", "--model", str(bundle(SPEAKING)), "--image", str(photo)]
    assert main([*argv, "--stats", "--max-tokens", "4"]) == 0
    err = capsys.readouterr().err
    for part in (
        "(16 image, 0 known)",
        "answer: 4 tokens",
        "vision ",
        "prefill ",
        "ttft ",
        "MB peak",
        "device: vision: MLX",
    ):
        assert part in err


def test_options_reach_the_model(photo, capsys):
    argv = ["generate", "--image", str(photo), "--prompt", "What?", "--max-tokens", "12"]
    sampled = ["--temperature", "1", "--seed", "4", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01"]
    assert main([*argv, *sampled, "--repetition-penalty", "1.5", "--system", "Hm.", "--aspect", "crop"]) == 0
    right = load().generate(
        photo, "What?", max_tokens=12, temperature=1.0, seed=4, top_k=50, top_p=0.9, min_p=0.01,
        repetition_penalty=1.5, system="Hm.", aspect="crop",
    )  # fmt: skip
    assert capsys.readouterr().out == right.text + "\n"


def test_chat(photo, capsys, monkeypatch):
    questions = "What is this?\n\nAre you <image> sure?\nAre you sure?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
    assert main(["chat", "--image", str(photo), "--max-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    chat = load().chat(photo)
    right = [chat.ask(question, max_tokens=6).text for question in ("What is this?", "Are you sure?")]
    assert out == "\n".join(right) + "\n"
    assert "has 1 <image> for 0 images" in err  # said, and the conversation went on


def test_models(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    for part in (
        "fastvlm-nano",
        "sees only shapes, words and charts",
        "fastvlm-0.5b",
        "apple/FastVLM-7B",
        "apple-amlr",
        "not downloaded",
    ):
        assert part in out


def test_no_image_file(capsys, tmp_path):
    fails(capsys, ["generate", "--image", str(tmp_path / "no.png")], "no.png doesn't exist")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty or no image"), (b"GIF89a", "image"), (b"hello world", "empty or no image")],
)
def test_files_that_are_no_image(capsys, tmp_path, content, message):
    (tmp_path / "bad.png").write_bytes(content)
    fails(capsys, ["generate", "--image", str(tmp_path / "bad.png")], message)


def test_bad_arguments(capsys, photo):
    image = ["generate", "--image", str(photo)]
    fails(capsys, [*image, "--resolution", "1000"], "multiple of 64 pixels, got 1000", "960", "1024")
    fails(capsys, [*image, "--prompt", "<image><image>"], "2 <image> for 1 image")
    fails(capsys, [*image, *image[1:], "--prompt", "a <image>"], "1 <image> for 2 images")
    fails(capsys, [*image, "--prompt", "word " * 9000], "positions", "context is 2048")
    fails(capsys, [*image, "--max-tokens", "0"], "max_tokens must be at least 1")
    fails(capsys, [*image, "--seed", "-1"], "seed must be in")
    fails(capsys, [*image, "--prompt", "\udcff"], "isn't valid UTF-8")
    fails(capsys, [*image, "--resolution", "8001"], "multiple of 64 pixels, got 8001")
    fails(capsys, ["generate", "--prompt", "text only", "--resolution", "1000"], "got 1000")
    fails(capsys, ["chat", "--max-tokens", "0"], "max_tokens must be at least 1")
    fails(capsys, [*image, "--quantize", "7"], "quantize must be one of")
    fails(capsys, ["generate"], "give --image FILE, --prompt TEXT")
    fails(capsys, ["generate", "--image", "-", "--image", "-"], "once only")
    fails(capsys, [], "required")
    fails(capsys, [*image, "--model", "./nowhere"], "nowhere")


def test_a_newer_bundle_and_a_damaged_one(capsys, photo, bundle, tmp_path):
    copy = shutil.copytree(bundle("tiny"), tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | {"format_version": 2}
    (copy / "config.json").write_text(json.dumps(config))
    argv = ["generate", "--image", str(photo), "--model", str(copy)]
    fails(capsys, argv, "bundle format 2", "pip install -U fastvlm-mlx")
    (copy / "config.json").write_bytes((bundle("tiny") / "config.json").read_bytes())
    data = bytearray((copy / "vision.safetensors").read_bytes())
    data[5000] ^= 255
    (copy / "vision.safetensors").write_bytes(data)
    fails(capsys, argv, "vision.safetensors is damaged")


def test_an_unconverted_checkpoint(capsys, photo, checkpoint):
    argv = ["generate", "--image", str(photo), "--model", str(checkpoint("tiny"))]
    fails(capsys, argv, f"fastvlm-convert {checkpoint('tiny')}")


def test_debug_shows_the_traceback(photo):
    from fastvlm_mlx.errors import ResolutionError

    with pytest.raises(ResolutionError):
        main(["generate", "--image", str(photo), "--resolution", "1000", "--debug"])


def test_unexpected_failures_exit_with_1(capsys, photo, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of\nsomething")

    monkeypatch.setattr("fastvlm_mlx.loading.load", broken)
    fails(capsys, ["generate", "--image", str(photo)], "out of something", "--debug shows where", code=1)


def test_interrupt(capsys, photo, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastvlm_mlx.loading.load", interrupted)
    assert main(["generate", "--image", str(photo)]) == 130
    assert capsys.readouterr().err == "fastvlm: interrupted\n"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MLX has a fast BLAS of its own")
@pytest.mark.parametrize(
    ("module", "argv"),
    [
        ("fastvlm_mlx.cli", ["generate", "--prompt", "Hi", "--max-tokens", "1"]),
        ("fastvlm_mlx.cli", ["chat", "--max-tokens", "1"]),
        ("fastvlm_bench.cli", ["--resolution", "64", "--runs", "1", "--warmup", "0", "--max-tokens", "1"]),
    ],
)
def test_openblas_is_loaded_before_mlx(module, argv):
    """Loaded after MLX it isn't found, and everything takes many times as long."""
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "import ctypes\n"
        "original, found = ctypes.CDLL, []\n"
        "def spy(name, *rest, **more):\n"
        "    if name == 'libsome.so': found.append('mlx.core' in sys.modules)\n"
        "    return original(name, *rest, **more)\n"
        "ctypes.CDLL = spy\n"
        f"from {module} import main\n"
        f"assert main({argv!r}) == 0\n"
        "print(found[:1], 'mlx.core' in sys.modules)"
    )
    variables = os.environ | {"FASTVLM_OPENBLAS": "libsome.so"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=variables, input="", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[False] True"
