"""One model in every form, made once."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import pytest
from tokenizers import Tokenizer

from fastvlm_bench.compare import prepare
from fastvlm_bench.compare.rivals import RIVALS
from fastvlm_bench.compare.seeded import make_tokenizer
from fastvlm_mlx import load
from fastvlm_mlx.errors import CheckpointError, InputError
from support.llama import write_llama


@pytest.fixture
def said():
    return []


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTVLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def checkpoint(cache):
    return prepare.seeded_checkpoint("tiny", lambda _: None)


@pytest.fixture(scope="module")
def bundle(checkpoint):
    return prepare.our_bundle(checkpoint, lambda _: None)


@pytest.fixture(scope="module")
def models(checkpoint, bundle):
    return prepare.rival_models(checkpoint, bundle, RIVALS, "float32", lambda _: None)


def weights(folder):
    return mx.load(str(folder / "model.safetensors"))


def test_the_bundle_answers_questions(bundle):
    assert load(bundle).generate(None, "What?", max_tokens=2).generation_tokens >= 1


def test_what_is_there_is_not_made_again(checkpoint, bundle, models, said):
    assert prepare.seeded_checkpoint("tiny", said.append) == checkpoint
    assert prepare.our_bundle(checkpoint, said.append) == bundle
    assert prepare.rival_models(checkpoint, bundle, RIVALS, "float32", said.append) == models
    assert said == []


def test_another_dtype_or_checkpoint_is(checkpoint, bundle, models, said, tmp_path):
    other = prepare.rival_models(checkpoint, bundle, ["mlx-vlm"], "bfloat16", said.append)
    assert other["mlx-vlm"] != models["mlx-vlm"]
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    prepare.rival_models(copy, bundle, ["mlx-vlm"], "float32", said.append)
    assert said == ["writing it for mlx-vlm"] * 2
    found = {array.dtype for array in weights(other["mlx-vlm"]).values()}
    assert found == {mx.bfloat16}


def test_each_gets_the_weights_it_loads(checkpoint, models):
    source = weights(checkpoint)
    embedding = source["model.embed_tokens.weight"].astype(mx.float32)
    vlm, lm, hf = (weights(models[name]) for name in ("mlx-vlm", "mlx-lm", "transformers"))
    assert {array.dtype for array in (*vlm.values(), *lm.values())} == {mx.float32}
    assert mx.array_equal(vlm["language_model.model.embed_tokens.weight"], embedding)
    assert mx.array_equal(lm["model.embed_tokens.weight"], embedding)
    assert lm.keys() == {name for name in source if name.startswith(("model.layers.", "model.embed", "model.norm"))}
    padded = hf["model.language_model.embed_tokens.weight"]
    assert padded.dtype == mx.bfloat16  # transformers casts as it loads
    assert padded.shape[0] == 1088  # a row for <image>, rounded up


def test_each_gets_our_tokenizer_and_a_template(bundle, models):
    ours = Tokenizer.from_file(str(bundle / "tokenizer.json"))
    for name, folder in models.items():
        theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert theirs.encode("What is this?").ids == ours.encode("What is this?").ids
        assert theirs.token_to_id("<image>") == (1024 if name == "transformers" else None)
        assert "<|im_start|>" in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    config = json.loads((models["transformers"] / "config.json").read_text())
    assert config["image_token_index"] == 1024


def test_the_head_is_tied_where_the_tensors_say_so(bundle, said, tmp_path):
    """The published config says tied beside a head of its own; what the rivals get says what is true."""
    from support.seeded import write_checkpoint

    untied = write_checkpoint("tiny-untied", tmp_path / "untied")
    config = json.loads((untied / "config.json").read_text()) | {"tie_word_embeddings": True}
    (untied / "config.json").write_text(json.dumps(config))
    models = prepare.rival_models(untied, bundle, ["mlx-vlm", "mlx-lm"], "float32", said.append)
    for folder, name in ((models["mlx-vlm"], "language_model.lm_head.weight"), (models["mlx-lm"], "lm_head.weight")):
        assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
        assert name in weights(folder)


def test_rows_beyond_the_tokenizer_never_win(checkpoint, bundle, said, tmp_path):
    short = shutil.copytree(bundle, tmp_path / "short")
    make_tokenizer(1000).save(str(short / "tokenizer.json"))
    models = prepare.rival_models(checkpoint, short, RIVALS, "float32", said.append)
    for name, tensor in (
        ("mlx-vlm", "language_model.model.embed_tokens.weight"),
        ("mlx-lm", "model.embed_tokens.weight"),
        ("transformers", "model.language_model.embed_tokens.weight"),
    ):
        rows = weights(models[name])[tensor].astype(mx.float32)
        assert rows.shape[0] == 1024
        assert mx.all(rows[1000:] == 0)
        assert mx.array_equal(rows[:1000], weights(checkpoint)["model.embed_tokens.weight"][:1000].astype(mx.float32))
    assert json.loads((models["transformers"] / "config.json").read_text())["image_token_index"] == 1000


def test_a_bundle_without_a_tokenizer(checkpoint, bundle, said, tmp_path):
    bare = shutil.copytree(bundle, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"bare has no tokenizer.json"):
        prepare.rival_models(checkpoint, bare, ["mlx-vlm"], "float32", said.append)


def test_another_kind_of_checkpoint(bundle, said, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config.json and safetensors"):
        prepare.rival_models(tmp_path, bundle, ["mlx-vlm"], "float32", said.append)
    with pytest.raises(CheckpointError, match="can't be converted"):
        prepare.our_bundle(tmp_path, said.append)


def test_another_decoder_than_qwen2(bundle, said, tmp_path):
    source = write_llama(tmp_path / "vicuna")
    with pytest.raises(CheckpointError, match="of type 'llava_llama'; rivals are given llava_qwen2 only"):
        prepare.rival_models(source, bundle, ["mlx-vlm"], "float32", said.append)
