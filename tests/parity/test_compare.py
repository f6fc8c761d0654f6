"""`fastvlm-bench compare` with the real rivals, on the tiny seeded weights. No test looks at how long anything took."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from fastvlm_bench.cli import main
from fastvlm_bench.compare import prepare
from fastvlm_bench.compare.plan import QUESTIONS, Plan, Requests
from fastvlm_bench.compare.processors import write_resolution
from fastvlm_bench.compare.rivals import OURS, RIVALS
from fastvlm_bench.workers.mlx_vlm_side import MlxVlmSide
from fastvlm_bench.workers.serve import Setup

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]  # their warnings are none of ours

HERE = [f"--python={name}={sys.executable}" for name in RIVALS]  # all of them are in this environment


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run the command; its exit code, JSON and stderr."""

    def run(*argv: str) -> tuple[int, dict[str, Any], str]:
        target = tmp_path / "out.json"
        code = main(["compare", *HERE, "--threads", "1", "--runs", "1", "--json", str(target), *argv])
        return code, json.loads(target.read_text()), capsys.readouterr().err

    return run


def test_all_rivals_answer_as_we_do(compare: Callable[..., Any]) -> None:
    code, data, _ = compare("--size", "tiny", "--resolution", "128,256")
    assert (code, data["failures"]) == (0, {})
    runs = {(run["side"], run["kind"], run["resolution"]): run for run in data["runs"]}
    for side in (128, 256):
        ours, ours_text = runs[OURS, "picture", side], runs[OURS, "text", side]
        for name in ("mlx-vlm", "transformers"):
            theirs = runs[name, "picture", side]
            assert theirs["ids"] == ours["ids"]
            assert theirs["second_ids"] == ours["second_ids"]
        assert runs["mlx-lm", "text", side]["ids"] == ours_text["ids"]
        assert runs["transformers", "picture", side]["positions"] == ours["positions"]
        assert len(set(ours["ids"])) > 4  # ids that say something
        assert ours["ids"] != ours_text["ids"]
    assert {run["side"] for run in data["runs"]} == {OURS, *RIVALS}
    blas = {data["sides"][name]["openblas"] for name in (OURS, "mlx-vlm", "mlx-lm")}
    assert len(blas) == 1  # all of MLX's sides multiply with the same library, or all without one
    assert "1 threads" in data["sides"]["transformers"]["device"]


def test_other_weights_are_found_out(compare: Callable[..., Any], tmp_path: Path) -> None:
    """A bundle of a checkpoint beside another one whose FastViTHD differs by one layer."""
    checkpoint = prepare.seeded_checkpoint("tiny", lambda _: None)
    bundle = prepare.our_bundle(checkpoint, lambda _: None)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    tensors = mx.load(str(other / "model.safetensors"))
    name = "model.vision_tower.vision_tower.model.conv_exp.reparam_conv.weight"
    tensors[name] = tensors[name] * 2
    mx.save_safetensors(str(other / "model.safetensors"), tensors)
    code, data, err = compare(
        *("--model", str(bundle), "--checkpoint", str(other), "--resolution", "128", "--against", "mlx-vlm,mlx-lm")
    )
    assert code == 1
    assert list(data["failures"]) == ["mlx-vlm"]
    assert {run["side"] for run in data["runs"]} == {OURS, "mlx-lm"}  # its decoder is the same
    assert "mlx-vlm answers the first question at 128 px otherwise" in err.splitlines()[-1]


def test_mlx_vlms_kept_prompt_answers_otherwise(
    timm_ready: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Why its second question is asked anew: its PromptCacheState counts an image as one id, its cache as many rows."""
    from mlx_vlm import PromptCacheState, apply_chat_template, stream_generate
    from mlx_vlm.models.fastvlm.config import VisionConfig

    for name in ("layers", "embed_dims"):  # the side sets them for good
        monkeypatch.setattr(VisionConfig, name, getattr(VisionConfig, name))
    checkpoint = prepare.seeded_checkpoint("tiny", lambda _: None)
    bundle = prepare.our_bundle(checkpoint, lambda _: None)
    folder = prepare.rival_models(checkpoint, bundle, ["mlx-vlm"], "float32", lambda _: None)["mlx-vlm"]
    write_resolution(folder, 256)
    side = MlxVlmSide(Setup(str(folder), "float32", 1))
    picture = str(Requests(Plan((256,)), tmp_path).picture(0, 256))

    def ask(question: str, **kept: Any) -> list[int]:
        prompt = apply_chat_template(side.processor, side.model.config, question, num_images=1)
        pieces = stream_generate(side.model, side.processor, prompt, [picture], max_tokens=8, temperature=0.0, **kept)
        return [int(piece.token) for piece in pieces if piece.finish_reason is None]

    state = PromptCacheState()
    assert ask(QUESTIONS[0], prompt_cache_state=state) == ask(QUESTIONS[0])
    assert ask(QUESTIONS[1], prompt_cache_state=state) != ask(QUESTIONS[1])
