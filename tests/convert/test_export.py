"""`--layout mlx-vlm` and `--layout apple-app`: what is written, and that it is the same model read back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from tokenizers import Tokenizer

from fastvlm_convert.export import export
from fastvlm_convert.options import Options
from fastvlm_convert.pipeline import convert
from fastvlm_mlx import load
from fastvlm_mlx.bundle import read_tensors
from fastvlm_mlx.errors import VerificationError
from fastvlm_mlx.manifest import Manifest
from support.adapters import LAYER, merged_by_hand, pair, write_adapter
from support.layouts import to_apple_mlx, to_mlx_vlm, to_transformers
from support.seeded import PROMPTS, golden_prompt
from support.tokenizers import with_tokenizer


@pytest.fixture(scope="module")
def source(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Preset -> its checkpoint with a tokenizer of 1024 tokens; don't change it."""
    made: dict[str, Path] = {}

    def get(preset: str) -> Path:
        if preset not in made:
            made[preset] = with_tokenizer(checkpoint(preset), tmp_path_factory.mktemp("sources") / preset, 1024)
        return made[preset]

    return get


def same_tensors(found: Path, right: Path, but: tuple[str, ...] = ()) -> None:
    """The same names, types and values in two files."""
    ours, theirs = read_tensors(found), read_tensors(right)
    assert ours.keys() - set(but) == theirs.keys() - set(but)
    assert [n for n in theirs if n not in but and ours[n].dtype != theirs[n].dtype] == []
    assert [n for n in theirs if n not in but and not mx.array_equal(ours[n], theirs[n])] == []


@pytest.mark.parametrize("preset", ["tiny", "tiny-untied"])
def test_mlx_vlm_gets_its_own_files(source, tmp_path, preset):
    """Bit for bit those of a writer that knows nothing of the converter's rules."""
    written = export(source(preset), "mlx-vlm", tmp_path / "written").path
    right = to_mlx_vlm(source(preset), tmp_path / "right")
    same_tensors(written / "model.safetensors", right / "model.safetensors")
    found, wanted = (json.loads((folder / "config.json").read_text()) for folder in (written, right))
    assert found["vision_config"] == wanted["vision_config"]
    assert found["image_token_index"] == -200  # what its processor writes
    lost = {"auto_map", "torch_dtype"}
    assert {key: found.get(key) for key in wanted.keys() - lost} == {key: wanted[key] for key in wanted.keys() - lost}


@pytest.mark.parametrize("preset", ["tiny", "tiny-untied"])
def test_mlx_vlm_and_back(source, tmp_path, preset):
    written = export(source(preset), "mlx-vlm", tmp_path / "written").path
    back = convert(written, tmp_path / "back").path
    plain = convert(source(preset), tmp_path / "plain").path
    for name in ("decoder.safetensors", "vision.safetensors", "config.json", "tokenizer.json"):
        if name.endswith(".json"):
            texts = [(folder / name).read_text() for folder in (back, plain)]
            assert texts[0].replace("written", "tiny") == texts[1].replace(preset, "tiny")
        else:
            same_tensors(back / name, plain / name)
    model = load(back)
    for kind in PROMPTS:
        prompt = golden_prompt(preset, kind)
        answer = model.generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True)
        assert list(answer.token_ids) == prompt.greedy_ids


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 32)])
def test_quantised_for_mlx_vlm_and_back(source, tmp_path, bits, group):
    """Decoder and projector, as its own tool does; FastViTHD not."""
    options = Options(q_bits=bits, q_group_size=group)
    written = export(source("tiny"), "mlx-vlm", tmp_path / "written", options).path
    config = json.loads((written / "config.json").read_text())
    assert config["quantization"] == config["quantization_config"] == {"group_size": group, "bits": bits}
    stored = read_tensors(written / "model.safetensors")
    packed = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
    assert "mm_projector.2" in packed
    assert "language_model.model.embed_tokens" in packed
    assert not any(name.startswith("vision_tower") for name in packed)
    back = convert(written, tmp_path / "back").path
    right = convert(source("tiny"), tmp_path / "right", Options(None, None, bits, group, quantize_projector=True)).path
    same_tensors(back / "decoder.safetensors", right / "decoder.safetensors")
    prompt = golden_prompt("tiny", "one image")
    answers = [
        load(path).generate(prompt.images, prompt.ids, max_tokens=24, ignore_eos=True).token_ids
        for path in (back, right)
    ]
    assert answers[0] == answers[1]


def test_from_other_layouts(source, tmp_path):
    """transformers' has no head of CLIP's: zeros, which nobody reads."""
    right = export(source("tiny"), "mlx-vlm", tmp_path / "right").path / "model.safetensors"
    clip = "vision_tower.vision_model.head.proj"
    other = export(to_transformers(source("tiny"), tmp_path / "transformers"), "mlx-vlm", tmp_path / "a").path
    same_tensors(other / "model.safetensors", right, but=(clip,))
    zeros = read_tensors(other / "model.safetensors")[clip]
    assert zeros.shape == (512, 768)
    assert not zeros.any()
    assert json.loads((other / "config.json").read_text())["vision_config"]["projection_dim"] == 768
    own = export(to_mlx_vlm(source("tiny"), tmp_path / "own"), "mlx-vlm", tmp_path / "b").path
    same_tensors(own / "model.safetensors", right)


def test_types(source, tmp_path):
    """FastViTHD keeps its own: in float16 mlx-vlm would run it in float16."""
    written = export(source("tiny"), "mlx-vlm", tmp_path / "a", Options(dtype="float16")).path
    stored = read_tensors(written / "model.safetensors")
    assert {v.dtype for n, v in stored.items() if not n.startswith("vision_tower")} == {mx.float16}
    assert {v.dtype for n, v in stored.items() if n.startswith("vision_tower")} == {mx.bfloat16}
    halved = shutil.copytree(source("tiny"), tmp_path / "half")
    weights = {n: v.astype(mx.float16) if v.dtype == mx.bfloat16 else v
               for n, v in mx.load(str(source("tiny") / "model.safetensors")).items()}  # fmt: skip
    mx.save_safetensors(str(halved / "model.safetensors"), weights)
    stored = read_tensors(export(halved, "mlx-vlm", tmp_path / "b").path / "model.safetensors")
    assert stored["vision_tower.vision_model.conv_exp.reparam_conv.weight"].dtype == mx.float32
    assert stored["mm_projector.0.weight"].dtype == mx.float16
    wide = export(source("tiny"), "mlx-vlm", tmp_path / "c", Options(vision_dtype="float32")).path
    assert read_tensors(wide / "model.safetensors")["vision_tower.vision_model.head.proj"].dtype == mx.float32


def test_the_files_beside_the_tensors(source, tmp_path):
    """Those that the source has are copied, those that mlx-vlm needs are written."""
    given = shutil.copytree(source("tiny"), tmp_path / "given")
    (given / "LICENSE").write_text("Apple Machine Learning Research Model License Agreement")
    (given / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (given / "vocab.json").write_text("{}")
    target = tmp_path / "written"
    result = export(given, "mlx-vlm", target, Options(q_bits=8), source_id="apple/FastVLM-0.5B")
    assert sorted(file.name for file in target.iterdir()) == [
        "LICENSE", "NOTICE", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
        "preprocessor_config.json", "processor_config.json", "special_tokens_map.json", "tokenizer.json",
        "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    pictures = json.loads((target / "preprocessor_config.json").read_text())
    assert (pictures["size"], pictures["crop_size"]) == ({"shortest_edge": 256}, {"height": 256, "width": 256})
    assert (pictures["image_mean"], pictures["image_std"]) == ([0.0] * 3, [1.0] * 3)
    assert pictures["processor_class"] == "FastVLMProcessor"
    tokens = json.loads((target / "tokenizer_config.json").read_text())
    assert {int(i): t["content"] for i, t in tokens["added_tokens_decoder"].items()} == {
        0: "<|im_start|>", 1: "<|endoftext|>", 2: "<|im_end|>",
    }  # fmt: skip
    assert (target / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
    notice = (target / "NOTICE").read_text()
    assert "Model Derivative of apple/FastVLM-0.5B" in notice
    assert "renamed from the llava layout into that of mlx-vlm" in notice
    assert "decoder and projector quantised to 8 bits, groups of 64" in notice
    manifest = Manifest.from_file(target / "manifest.json")
    assert manifest.licence == "apple-amlr"
    assert manifest.options["layout"] == "mlx-vlm"
    assert set(manifest.files) == {file.name for file in target.iterdir()} - {"manifest.json"}
    assert any("builds FastViTHD of [96, 192, 384, 768, 1536] only" in warning for warning in result.warnings)


def test_a_second_run_finds_it_done(source, tmp_path):
    target = tmp_path / "written"
    assert not export(source("tiny"), "mlx-vlm", target).up_to_date
    before = (target / "model.safetensors").stat().st_mtime_ns
    assert export(source("tiny"), "mlx-vlm", target).up_to_date
    assert (target / "model.safetensors").stat().st_mtime_ns == before
    assert not export(source("tiny"), "mlx-vlm", target, licence="mit").up_to_date  # other terms
    assert export(source("tiny"), "mlx-vlm", target, licence="mit").up_to_date
    assert not export(source("tiny"), "mlx-vlm", target, Options(dtype="float32")).up_to_date
    assert not export(source("tiny-untied"), "mlx-vlm", target, Options(dtype="float32")).up_to_date
    data = bytearray((target / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (target / "model.safetensors").write_bytes(data)
    assert not export(source("tiny-untied"), "mlx-vlm", target, Options(dtype="float32")).up_to_date
    assert not convert(source("tiny"), target).up_to_date  # a bundle in its place
    assert not export(source("tiny"), "mlx-vlm", target).up_to_date


def test_an_adapter_is_merged_here_too(source, tmp_path):
    base = source("tiny")
    from support.adapters import factors, shape_of

    a, b = factors(LAYER, shape_of(base, f"{LAYER}.weight"), 4)
    adapter = write_adapter(tmp_path / "adapter", pair(LAYER, a, b), base)
    written = export(adapter, "mlx-vlm", tmp_path / "written").path
    merged = merged_by_hand(base, tmp_path / "merged", {f"{LAYER}.weight": 2 * b @ a})
    right = export(merged, "mlx-vlm", tmp_path / "right").path
    same_tensors(written / "model.safetensors", right / "model.safetensors")
    assert Manifest.from_file(written / "manifest.json").changes[0].startswith("LoRA adapter adapter merged into 1")


def test_what_gets_lost_is_said(checkpoint, tmp_path):
    """AnyRes' line break has no place there; its strict loader would refuse it."""
    given = with_tokenizer(checkpoint("tiny-newline"), tmp_path / "given")
    from fastvlm_convert.vision_package import Gates

    result = export(given, "mlx-vlm", tmp_path / "written", gates=Gates(every_size=True))
    assert any("mlx-vlm knows no AnyRes" in warning for warning in result.warnings)
    assert not any("newline" in name for name in read_tensors(result.path / "model.safetensors"))
    config = json.loads((result.path / "config.json").read_text())
    assert (config["image_aspect_ratio"], config["image_grid_pinpoints"]) == ("pad", None)


def test_the_round_trip_is_checked(source, tmp_path, monkeypatch):
    """--verify: each kind of fault is found, and nothing is written."""
    from fastvlm_convert import export as module
    from fastvlm_convert import export_plan, export_vision
    from fastvlm_convert.vision_package import Gates

    every = Gates(every_size=True)
    target = tmp_path / "written"
    assert not export(source("tiny"), "mlx-vlm", target, gates=every).up_to_date
    assert export(source("tiny"), "mlx-vlm", target, gates=every).up_to_date
    config, order, name_of = module.make_config, export_vision.own_order, export_plan.own_name
    swapped = {"k_proj": "v_proj", "v_proj": "k_proj"}
    wrong = {
        "wrong axes": (export_vision, "own_order", lambda *a: lambda v: order(*a)(v)[..., ::-1]),
        "wrong names": (
            export_plan,
            "own_name",
            lambda n, to: re.sub("k_proj|v_proj", lambda m: swapped[m[0]], name_of(n, to)),
        ),
        "a wrong config": (module, "make_config", lambda plan: config(plan) | {"rope_theta": 10000.0}),
        "a wrong size": (module, "make_config", lambda plan: config(plan) | {"vocab_size": 1000}),
        "no projector": (
            module,
            "make_config",
            lambda plan: {k: v for k, v in config(plan).items() if k != "mm_hidden_size"},
        ),
    }
    messages = {
        "wrong axes": "doesn't hold what",
        "wrong names": r"layers.0.self_attn.k_proj.\w+ was written as \S+v_proj.\w+, read as \S+v_proj.\w+; this is a",
        "a wrong config": r"^config.json as written says decoder.rope_theta 10000.0, the model has 1000000.0; this "
        "is a fault of the converter: please report it with this line$",
        "a wrong size": r"^config.json as written says decoder.vocab_size 1000, the model has 1024; this is a fault",
        "no projector": r"^what was written for mlx-vlm can't be read back: config.json lacks 'mm_hidden_size'.*report",
    }
    for case, (place, name, fault) in wrong.items():
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fault)
            with pytest.raises(VerificationError, match=messages[case]):
                export(source("tiny"), "mlx-vlm", tmp_path / "other", gates=every)
        assert [entry.name for entry in tmp_path.iterdir()] == ["written"]


def test_apples_file_from_the_text_half(source, tmp_path):
    """Without vision weights: the source's own package comes along, names and packing stay."""
    given = to_apple_mlx(with_tokenizer(source("tiny"), tmp_path / "plain"), tmp_path / "given", bits=8)
    written = export(given, "apple-app", tmp_path / "written").path
    same_tensors(written / "model.safetensors", given / "model.safetensors")
    for file in (given / "fastvithd.mlpackage").rglob("*.mlmodel"):
        assert (written / file.relative_to(given)).read_bytes() == file.read_bytes()
    # The stand-in package can't be read: the side is that of the tower's name, not the published 1024.
    assert json.loads((written / "config.json").read_text())["mm_vision_tower"] == "mobileclip_l_256"
    pictures = json.loads((written / "preprocessor_config.json").read_text())
    assert (pictures["size"], pictures["crop_size"]) == ({"shortest_edge": 256}, {"height": 256, "width": 256})
    tokenizer = Tokenizer.from_file(str(written / "tokenizer.json"))
    assert tokenizer.token_to_id("<image>") == json.loads((written / "config.json").read_text())["image_token_index"]


def test_image_in_every_file_of_the_tokenizer(tmp_path):
    """What the source says of its tokens stays; files that it lacks aren't made up."""
    from fastvlm_convert.export_tokenizer import add_image, write_tokenizer
    from support.tokenizers import write_tokenizer as write_source

    given, made = tmp_path / "given", tmp_path / "made"
    given.mkdir()
    made.mkdir()
    write_source(given / "tokenizer.json", 1000)
    (given / "added_tokens.json").write_text('{"<|im_start|>": 0}')
    (given / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Own", "added_tokens_decoder": {"0": {"content": "theirs"}}}'
    )
    tokenizer = Tokenizer.from_file(str(given / "tokenizer.json"))
    assert add_image(tokenizer, 1001, given) == add_image(tokenizer, 1001, given) == 1000
    write_tokenizer(given, made, tokenizer)
    assert json.loads((made / "added_tokens.json").read_text()) == {"<|im_start|>": 0, "<image>": 1000}
    config = json.loads((made / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "Own"
    assert config["added_tokens_decoder"]["0"] == {"content": "theirs"}
    assert config["added_tokens_decoder"]["1000"] == {
        "content": "<image>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
        "special": True,
    }  # fmt: skip
    assert Tokenizer.from_file(str(made / "tokenizer.json")).token_to_id("<image>") == 1000
    assert not (made / "vocab.json").exists()
