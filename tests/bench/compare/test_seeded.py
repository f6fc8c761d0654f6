"""The seeded checkpoint of a comparison is the golden script's, with a tokenizer."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import pytest
from tokenizers import Tokenizer

from fastvlm_bench.compare.plan import QUESTIONS
from fastvlm_bench.compare.seeded import SPECIAL, decoder_shapes, make_tokenizer, vision_shapes, write_seeded
from fastvlm_bench.sizes import SIZES
from support import seeded


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeded")
    write_seeded(SIZES["tiny"], folder)
    return folder


def test_the_tensors_are_the_golden_scripts(folder, checkpoint):
    expected, found = (mx.load(str(path / "model.safetensors")) for path in (checkpoint("tiny"), folder))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert mx.array_equal(found[name], value), name


def test_the_config_is_the_golden_scripts(folder, checkpoint):
    expected, found = (json.loads((path / "config.json").read_text()) for path in (checkpoint("tiny"), folder))
    assert found.items() <= expected.items()


def test_the_large_shapes_are_the_golden_scripts_without_its_head():
    script = seeded.seeded_script()
    preset = script.PRESETS["0.5b"]
    expected = script.vision_shapes(preset) | script.decoder_shapes(preset)
    head = expected.pop("lm_head.weight")
    assert head == expected["model.embed_tokens.weight"]  # as large as the embedding, which is the head here
    assert vision_shapes(SIZES["0.5b"]) | decoder_shapes(SIZES["0.5b"]) == expected


def test_the_tokenizer_has_a_token_for_each_row(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size(with_added_tokens=True) == SIZES["tiny"].vocabulary
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 1, 2]
    text = "图 é zzz"
    ids = tokenizer.encode(text).ids
    assert len(ids) == len(text.encode())  # a token for each byte
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode("<1000>").ids != [1000]  # such a token has a text and is never read from one
    assert tokenizer.decode([1000]) == "<1000>"


def test_a_question_has_a_usual_number_of_tokens(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for question in QUESTIONS:
        assert len(tokenizer.encode(question).ids) == len(re.findall(r"\w+|\?", question))


def test_the_tokenizer_of_the_large_shapes():
    assert make_tokenizer(SIZES["0.5b"].vocabulary).get_vocab_size() == 151936
