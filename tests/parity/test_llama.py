"""Our LLaMA decoders and tokenizers against transformers' LlamaForCausalLM and LlamaTokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from fastvlm_convert.pipeline import convert
from fastvlm_convert.tokenizer import prefixes_after_special, read_tokenizer
from fastvlm_mlx import FastVLM, load
from fastvlm_mlx.prefill import embed, prefill
from fastvlm_mlx.tokenizer import Tokenizer
from parity.ours import GREEDY, LOGIT_TOLERANCE, SIDE
from support.llama import Shape, write_llama, write_tokenizer
from support.seeded import golden, relative_l2
from support.texts import TRICKY, mixed

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # their warnings are none of ours

SHAPES = {
    "vicuna": Shape(),
    "shared heads, tied": Shape(kv_heads=2, tied=True),
    "biases": Shape(attention_bias=True, mlp_bias=True),
    "stretched": Shape(rope_scaling={"type": "linear", "factor": 4.0}),
}
IDS = [1, 17, 300, -200, 999, 5, 64]


@pytest.fixture(scope="module", params=SHAPES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama") / "source", SHAPES[request.param])


@pytest.fixture(scope="module")
def ours(source: Path) -> FastVLM:
    return load(convert(source, source.parent / "bundle").path, dtype="float32", vision_dtype="float32")


@pytest.fixture(scope="module")
def theirs(timm_ready: None, source: Path) -> Any:
    """The decoder alone, of the checkpoint's own tensors and config."""
    import json

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((source / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("mm_") and key != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    tensors = mx.load(str(source / "model.safetensors"))
    state = {n: torch.from_numpy(np.array(t.astype(mx.float32))) for n, t in tensors.items() if t.dtype != mx.int64}
    known = model.state_dict().keys()
    missing, _ = model.load_state_dict({n: t for n, t in state.items() if n in known}, strict=False)
    assert set(missing) <= {"lm_head.weight"}  # a tied one
    return model


def test_logits_and_greedy_ids(ours: FastVLM, theirs: Any) -> None:
    """On the same embeddings; ids of GREEDY steps, each side from its own cache."""
    import torch

    image = golden("tiny")[f"pixels_{SIDE}x{SIDE}"]
    seen = ours.encode_image(image, resolution=SIDE).embeddings
    spans = ours.expand(IDS, [len(seen)])
    rows = embed(ours.decoder, spans, [seen])
    with torch.inference_mode():
        inputs = torch.from_numpy(np.array(rows))
        expected = theirs(inputs_embeds=inputs).logits[0, -1].numpy()
        answer = theirs.generate(
            inputs_embeds=inputs,
            attention_mask=torch.ones(inputs.shape[:2], dtype=torch.long),
            do_sample=False,
            max_new_tokens=GREEDY,
            eos_token_id=None,
            pad_token_id=0,
        )
    found = prefill(ours.decoder, rows, ours.decoder.new_cache())[0]
    assert relative_l2(found, expected) <= LOGIT_TOLERANCE
    mine = ours.generate(image, IDS, resolution=SIDE, max_tokens=GREEDY, ignore_eos=True)
    assert list(mine.token_ids) == answer[0].tolist()


@pytest.fixture(scope="module", params=[True, False], ids=["legacy", "not legacy"])
def tokenizers(request: pytest.FixtureRequest, timm_ready: None, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ours and theirs of the same tokenizer.model."""
    from transformers import LlamaTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, legacy=request.param)
    theirs = LlamaTokenizer.from_pretrained(folder)
    backend = read_tokenizer(folder)
    assert backend
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json", prefixes_after_special(folder, backend)), theirs


def test_ids_of_plain_text(tokenizers: Any) -> None:
    """But for texts that begin with a space: transformers 5 adds none to those, SentencePiece does."""
    ours, theirs = tokenizers
    for text in [*TRICKY, *mixed(300)]:
        if not text.startswith((" ", "▁")):
            expected = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert ours.encode(text) == expected, repr(text)


def test_text_of_ids(tokenizers: Any) -> None:
    ours, theirs = tokenizers
    for text in [*TRICKY, *mixed(300)]:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), repr(text)
