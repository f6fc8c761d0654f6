"""LLaMA's tokenizer.model as tokenizer.json, with SentencePiece itself as the oracle."""

from __future__ import annotations

import json
import random
import re
import sys

import pytest

from fastvlm_convert.tokenizer import prefixes_after_special, read_tokenizer
from fastvlm_mlx.errors import CheckpointError, MissingDependencyError
from fastvlm_mlx.tokenizer import Tokenizer
from support.llama import trained, write_tokenizer
from support.texts import TRICKY, mixed

TEXTS = [*TRICKY, *mixed(600)]
REPLACED = "\ufffd"


@pytest.fixture(scope="module")
def theirs():
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=trained())


def converted(folder) -> Tokenizer:
    tokenizer = read_tokenizer(folder)
    assert tokenizer
    tokenizer.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json", prefixes_after_special(folder, tokenizer))


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("vicuna")
    write_tokenizer(folder)
    return converted(folder)


def test_the_texts_say_something(theirs):
    """Pieces of several letters, runs of spaces, bytes."""
    used = {theirs.id_to_piece(index) for text in TEXTS for index in theirs.encode(text)}
    assert len(used) > 200
    assert any(len(piece) > 5 for piece in used)
    assert "▁▁▁▁" in used
    assert sum(theirs.is_byte(theirs.piece_to_id(piece)) for piece in used) > 20


def test_ids(ours, theirs):
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), repr(text)


def test_pieces_that_nearly_spell_a_special_token(tmp_path):
    """A model that mixes letters and signs in its pieces, as LLaMA's doesn't, has all but the last letter of "<s>"."""
    from sentencepiece import SentencePieceProcessor

    (tmp_path / "tokenizer.model").write_bytes(mixing := trained(split_by_unicode_script=False))
    theirs = SentencePieceProcessor(model_proto=mixing)
    known = {theirs.id_to_piece(index) for index in range(theirs.get_piece_size())}
    assert known >= {"<s", "</s", ">"}
    ours = converted(tmp_path)
    for text in ["<s>", "<s></s>", "a <s> </s> <unk>", "<s</s>", *TEXTS]:
        assert ours.encode(text) == theirs.encode(text), repr(text)
        assert ours.encode(text, "text") == theirs.encode("\n" + text)[2:], repr(text)


def test_vocabulary(ours, theirs):
    assert ours.size == theirs.get_piece_size()
    assert [ours.special_id(token) for token in ("<unk>", "<s>", "</s>")] == [0, 1, 2]


def test_text_of_ids(ours, theirs):
    for text in TEXTS:
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text)), repr(text)
        assert ours.decode(ours.encode(text)) == text.replace("▁", " ")


def test_streamed_text_of_ids(ours):
    for text in TEXTS:
        ids, stream = ours.encode(text), ours.stream()
        pieces = [stream.add(token) for token in ids]
        assert "".join([*pieces, stream.finish()]) == text.replace("▁", " "), repr(text)
        assert REPLACED not in "".join(pieces)


def test_any_ids_stream_as_they_decode(ours, theirs):
    """What no text has: bytes that are no characters, special tokens, ids beyond the vocabulary.

    SentencePiece makes a U+FFFD of each wrong byte, Python one of those that could have become a character.
    """
    draw = random.Random(1)
    ordinary = [i for i in range(theirs.get_piece_size()) if not theirs.is_control(i) and not theirs.is_unknown(i)]
    for _ in range(300):
        ids = draw.choices(ordinary, k=12) if draw.random() < 0.5 else draw.choices(range(3, 259), k=12)
        stream = ours.stream()
        shown = "".join([stream.add(token) for token in ids])
        whole = shown + stream.finish()
        assert whole == ours.decode(ids)
        assert re.sub(f"{REPLACED}+", REPLACED, whole) == re.sub(f"{REPLACED}+", REPLACED, theirs.decode(ids))
    hello = theirs.encode("Hello there")
    assert ours.decode([1, *hello[:2], 2, 0, *hello[2:], 5000]) == "Hello there"


def test_a_wrong_byte_takes_no_shown_character_back(ours, theirs):
    """`tokenizers` would: its decoder gives up the whole run of bytes."""
    first = [theirs.piece_to_id(f"<0x{byte:02X}>") for byte in "好".encode()]
    stream = ours.stream()
    assert "".join(stream.add(token) for token in [*first, first[0]]) == "好"
    assert stream.add(theirs.encode("USER")[-1]).startswith(REPLACED)


@pytest.mark.parametrize("legacy", [True, False, None])
def test_behind_a_special_token(tmp_path, theirs, legacy):
    """Llama 2's and Vicuna 1.5's begin no text with a space there; transformers' default was to do so."""
    write_tokenizer(tmp_path, legacy)
    ours = converted(tmp_path)
    for text in ("USER: hi", " USER", "\n", "你好", ""):
        bare = theirs.encode("\n" + text)[len(theirs.encode("\n")) :]  # a line break joins nothing
        assert ours.encode(text, "start") == theirs.encode(text)
        assert ours.encode(text, "text") == bare
        assert ours.encode(text, "special") == (bare if legacy is False else theirs.encode(text))
    assert ours.encode("a") != ours.encode("a", "text")


@pytest.mark.parametrize("legacy", [True, False])
def test_a_shipped_tokenizer_json_goes_first(tmp_path, theirs, legacy):
    """In the two forms that transformers' converter has: the space by the normaliser, or by the pre-tokenizer."""
    from tokenizers import pre_tokenizers

    write_tokenizer(tmp_path, legacy=True)
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer
    if not legacy:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").write_bytes(b"not looked at")
    ours = converted(tmp_path)
    for text in ("USER: hi", "\n", "你好"):
        bare = theirs.encode("\n" + text)[len(theirs.encode("\n")) :]
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, "text") == bare
        assert ours.encode(text, "special") == (theirs.encode(text) if legacy else bare)
        assert ours.decode(ours.encode(text)) == text


def test_added_tokens(tmp_path, theirs):
    write_tokenizer(tmp_path)
    size = theirs.get_piece_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size}))
    ours = converted(tmp_path)
    assert ours.special_id("<pad>") == size
    assert ours.encode("a <pad>") == theirs.encode("a <pad>")
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": size + 1}))
    with pytest.raises(CheckpointError, match=f"puts <pad> at {size + 1}, the vocabulary leads to {size}"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": "USER:"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_kinds_are_refused(tmp_path, options):
    (tmp_path / "tokenizer.model").write_bytes(trained(**options))
    with pytest.raises(CheckpointError, match=r"isn't LLaMA's kind of SentencePiece model: .* give a tokenizer.json"):
        read_tokenizer(tmp_path)


def test_a_damaged_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(trained()[:2000])
    with pytest.raises(CheckpointError, match="damaged or no SentencePiece model"):
        read_tokenizer(tmp_path)


def test_without_sentencepiece(tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingDependencyError, match=r"tokenizer.model needs sentencepiece .*pip install"):
        read_tokenizer(tmp_path)
