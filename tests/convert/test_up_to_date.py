"""What makes a bundle again that is there already, beyond another checkpoint or another option."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastvlm_convert.pipeline import Result, convert
from fastvlm_mlx.bundle import Bundle
from fastvlm_mlx.tokenizer import Tokenizer
from support.layouts import to_apple_mlx
from support.llama import PIECES, trained, write_llama, write_tokenizer
from support.qwen_files import byte_letters
from support.tokenizers import write_tokenizer as write_bytes_tokenizer


def write_vocabulary(folder: Path) -> None:
    """The smallest vocab.json, merges.txt and added_tokens.json: all bytes, and `ab` and `ba`."""
    vocabulary = [*byte_letters(), "ab", "ba"]
    (folder / "vocab.json").write_text(json.dumps({token: rank for rank, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nb a\n")
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": len(vocabulary)}))


# File -> text of it, and what to put there: every change also changes the tokens.
EDITS = {
    "tokenizer.json": ('"<|im_end|>"', '"<|im_over|>"'),
    "vocab.json": ('"a": 97, "b": 98', '"b": 97, "a": 98'),
    "merges.txt": ("b a\n", ""),
    "added_tokens.json": ("<|im_start|>", "<|im_end|>"),
}


@pytest.mark.parametrize("name", EDITS)
def test_another_tokenizer_makes_the_bundle_again(checkpoint, tmp_path, name):
    source, target = shutil.copytree(checkpoint("tiny"), tmp_path / "source"), tmp_path / "bundle"
    write_vocabulary(source)
    if name == "tokenizer.json":  # goes before the others
        write_bytes_tokenizer(source / name)
    convert(source, target)
    assert convert(source, target).up_to_date
    before = (target / "tokenizer.json").read_bytes()
    text = (source / name).read_text(encoding="utf-8")
    (source / name).write_text(text.replace(*EDITS[name]), encoding="utf-8")
    assert not convert(source, target).up_to_date
    assert (target / "tokenizer.json").read_bytes() != before
    assert convert(source, target).up_to_date


def test_another_core_ml_package_makes_the_bundle_again(checkpoint, tmp_path):
    source, target = to_apple_mlx(checkpoint("tiny"), tmp_path / "source"), tmp_path / "bundle"
    convert(source, target)
    assert convert(source, target).up_to_date
    place = Path("Data", "com.apple.CoreML", "model.mlmodel")
    file = source / "fastvithd.mlpackage" / place
    file.write_bytes(file.read_bytes()[::-1])  # the size stays
    assert not convert(source, target).up_to_date
    assert (target / "vision.mlpackage" / place).read_bytes() == file.read_bytes()
    file.with_name("weight.bin").write_bytes(b"one file more")
    assert not convert(source, target).up_to_date


def test_another_origin_makes_the_bundle_again(checkpoint, tmp_path):
    """Nothing but the names differs, and they are what the manifest says."""

    def make(source_id: str | None, revision: str | None) -> Result:
        return convert(checkpoint("tiny"), tmp_path / "bundle", source_id=source_id, revision=revision)

    for origin in ((None, None), ("org/one", None), ("org/one", "aaa"), ("org/one", "bbb"), ("org/two", "bbb")):
        assert not make(*origin).up_to_date
        recorded = Bundle.open(tmp_path / "bundle").manifest.source
        assert (recorded.id, recorded.revision) == (origin[0] or "tiny", origin[1])
        assert make(*origin).up_to_date
    assert not make("org/two", None).up_to_date


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_config.json"])
def test_another_sentencepiece_model_makes_the_bundle_again(tmp_path, name):
    source, target = write_llama(tmp_path / "source", tokenizer=True), tmp_path / "bundle"
    convert(source, target)
    assert convert(source, target).up_to_date
    if name == "tokenizer.model":
        (source / name).write_bytes(trained(vocab_size=650))
    else:
        write_tokenizer(source, legacy=True)
    assert not convert(source, target).up_to_date
    assert Tokenizer(target / "tokenizer.json").size == (650 if name == "tokenizer.model" else PIECES)
    assert Bundle.open(target).config.prefix_after_special == (name == "tokenizer_config.json")


def test_each_file_of_a_source_is_read_once(checkpoint, tmp_path):
    """To the byte: what is told of the progress is what the files have."""
    source = shutil.copytree(checkpoint("tiny"), tmp_path / "source")
    (source / "tokenizer_config.json").write_text("{}")
    told: list[tuple[int, int]] = []
    convert(
        source, tmp_path / "bundle", progress=lambda stage, n, total: stage == "checking" and told.append((n, total))
    )
    names = Bundle.open(tmp_path / "bundle").manifest.source.files
    size = sum((source / name).stat().st_size for name in names)
    assert "tokenizer_config.json" in names
    assert {total for _, total in told} == {size}
    assert sum(n for n, _ in told) == size
