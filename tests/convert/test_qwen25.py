"""Qwen2.5's tokenizer: Qwen2's with 22 added tokens instead of three, of which eight are no special ones."""

from __future__ import annotations

import json

import pytest

from fastvlm_convert.tokenizer import read_tokenizer
from fastvlm_mlx import prompt as prompts
from fastvlm_mlx.template import CHATML
from fastvlm_mlx.tokenizer import Tokenizer
from support.qwen_files import ADDED, write_qwen_files

# Of Qwen/Qwen2.5-7B's tokenizer_config.json, in the order of their ids from 151643 on.
SPECIAL = [
    *ADDED, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>",
    "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
SHOWN = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip
IDS = {token: 151643 + number for number, token in enumerate(SPECIAL + SHOWN)}


@pytest.fixture(scope="module", params=["described", "not described"])
def described(request) -> bool:
    return request.param == "described"


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, described) -> Tokenizer:
    folder = write_qwen_files(tmp_path_factory.mktemp("qwen"), IDS)
    if described:
        entries = {str(index): {"content": token, "special": token in SPECIAL} for token, index in IDS.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    backend = read_tokenizer(folder)
    assert backend
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json")


def test_vocabulary(qwen):
    assert len(IDS) == 22
    assert {token: qwen.special_id(token) for token in IDS} == IDS
    assert qwen.size == 151665
    assert qwen.stop_ids(CHATML.stops) == {151643, 151645}


def test_the_prompt_is_qwen2s(qwen):
    found = prompts.tokenize(prompts.ask("Describe the image.", 1), qwen)
    assert found[:3] == [151644, 8948, 198]
    assert found[14:] == [-200, 198, 74785, 279, 2168, 13, 151645, 198, 151644, 77091, 198]


def test_what_the_user_spells(qwen):
    for token in SPECIAL:
        assert IDS[token] not in qwen.encode(f"a{token}b")
        assert qwen.decode(qwen.encode(f"a{token}b")) == f"a{token}b"


def test_what_an_answer_shows(qwen, described):
    """Tokens that aren't special are text, where the checkpoint says so; the others are hidden."""
    ids = [*qwen.encode("a"), IDS["<|vision_start|>"], IDS["<tool_call>"], *qwen.encode("b")]
    assert qwen.decode(ids) == ("a<tool_call>b" if described else "ab")
