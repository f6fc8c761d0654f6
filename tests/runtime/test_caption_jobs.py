"""A file of answers belongs to one job: what is compared, what is told, what is left alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import closing

import pytest

import fastvlm_zoo
from fastvlm_mlx.caption import AnswerFile, Job, answer_images, find_images, merge_parts, part_of
from fastvlm_mlx.cli import main
from fastvlm_mlx.errors import InputError
from fastvlm_mlx.files import sha256
from fastvlm_mlx.types import GenerationOptions
from support.captions import OPTIONS, entries, write_images


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", 6)


def test_a_half_written_line_is_done_again_and_nothing_else(folder, tmp_path, default_model):
    out, job = (
        tmp_path / "answers.jsonl",
        Job("What?", "default", "", resolution=64, options=GenerationOptions(max_tokens=3)),
    )
    answers = AnswerFile(out, job)
    for name, answer in answer_images(default_model, folder, find_images(folder)[:3], job, print):
        answers.add(name, answer)
    answers.close()
    whole = out.read_bytes()
    out.write_bytes(whole[:-7])
    again = AnswerFile(out, job)
    assert len(again.done) == 2
    assert out.read_bytes() == whole[: whole.rstrip(b"\n").rfind(b"\n") + 1]
    with pytest.raises(InputError, match="another process writes"):
        AnswerFile(out, job)
    again.close()


def test_files_about_something_else_are_left_alone(folder, tmp_path):
    out = tmp_path / "answers.jsonl"
    assert main(["caption", str(folder), "-o", str(out), *OPTIONS]) == 0
    before = out.read_bytes() + b'{"half'
    out.write_bytes(before)
    assert main(["caption", str(folder), "-o", str(out), "--prompt", "Other?", *OPTIONS]) == 2
    assert out.read_bytes() == before
    for text in ("a diary\n", '["list"]\n', '{"no": "image"}\n', '{"image": "000.png", "caption": "a tool of mine"}\n'):
        out.write_text(text)
        assert main(["caption", str(folder), "-o", str(out), *OPTIONS]) == 2
        assert out.read_text() == text


@pytest.mark.parametrize(
    ("before", "now", "told"),
    [
        (["--system", "X"], [], 'system was "X" and is not given now'),
        ([], ["--system", ""], 'system was not given and is "" now'),
        (["--seed", "1"], [], "seed was 1 and is not given now"),
        ([], ["--top-p", "0.5"], "top_p was 1.0 and is 0.5 now"),
        (["--top-k", "3"], [], "top_k was 3 and is 0 now"),
        ([], ["--min-p", "0.1"], "min_p was 0.0 and is 0.1 now"),
        (["--repetition-penalty", "1.2"], [], "repetition_penalty was 1.2 and is not given now"),
        (["--stop", "a"], ["--stop", "a", "--stop", "b"], 'stop was ["a"] and is ["a", "b"] now'),
        (["--quantize", "8"], [], "quantize was 8 and is not given now"),
        ([], ["--dtype", "float16"], 'dtype was not given and is "float16" now'),
        ([], ["--vision-dtype", "bfloat16"], 'vision_dtype was not given and is "bfloat16" now'),
        ([], ["--vision", "mlx"], 'vision was "auto" and is "mlx" now'),
        (["--aspect", "crop"], [], 'aspect was "crop" and is not given now'),
    ],
)
def test_answers_of_other_options_are_never_mixed(folder, tmp_path, capsys, before, now, told):
    out, basic = tmp_path / "answers.jsonl", ["caption", str(folder), "--resolution", "64", "--max-tokens", "1"]
    assert main([*basic, "-o", str(out), *before]) == 0
    first = out.read_bytes()
    assert main([*basic, "-o", str(out), *before, "--batch-size", "1", "--local-files-only"]) == 0
    assert main([*basic, "-o", str(out), *now]) == 2
    assert f"{out} holds answers to another job: {told}; give" in capsys.readouterr().err
    assert out.read_bytes() == first


def test_every_option_is_told_unless_it_decides_nothing():
    """An option that is added later is compared too."""
    undecided = {"progress", "draft", "num_draft_tokens"} | {"kv_bits", "max_kv_size"}  # batches refuse the latter
    undecided |= {"kv_group_size", "prefill_step_size"}  # sizes of steps, and of what batches refuse
    options = GenerationOptions(repetition_penalty=1.1, seed=0)
    names = {f.name for f in dataclasses.fields(options)}
    assert names - Job("What?", "default", "", options=options).record.keys() == undecided


def test_a_model_is_known_by_its_files_not_by_its_path(folder, tmp_path, monkeypatch, capsys):
    here, there, out = tmp_path / "here", tmp_path / "there", tmp_path / "answers.jsonl"
    shutil.copytree(fastvlm_zoo.default().path, here)
    shutil.copytree(here, there)
    run = ["caption", str(folder), "-o", str(out), *OPTIONS]
    monkeypatch.chdir(tmp_path)
    assert main([*run, "--model", "./here"]) == 0
    assert main([*run, "--model", str(there)]) == 0
    assert main(run) == 0
    assert capsys.readouterr().out.count("0 images answered, 6 were before") == 2
    config = json.loads((here / "config.json").read_text()) | {"name": "another"}
    (here / "config.json").write_text(json.dumps(config))
    manifest = json.loads((here / "manifest.json").read_text())
    manifest["files"]["config.json"] = {
        "sha256": sha256(here / "config.json"),
        "bytes": (here / "config.json").stat().st_size,
    }
    (here / "manifest.json").write_text(json.dumps(manifest))
    assert main([*run, "--model", "./here"]) == 2
    assert "model_files was" in capsys.readouterr().err


def test_shares_of_several_processes_come_together(tmp_path):
    job, out = Job("What?", "default", ""), tmp_path / "answers.jsonl"
    for path, names in ((out, "ab"), (part_of(out, 0), "bc"), (part_of(out, 1), "d")):
        answers = AnswerFile(path, job)
        for name in names:
            answers.add(name, {"text": name.upper()})
        answers.close()
    merge_parts(out, job)
    assert entries(out) == {name: name.upper() for name in "abcd"}
    assert list(tmp_path.iterdir()) == [out]


def test_only_shares_are_taken_for_shares(tmp_path):
    job, out = Job("What?", "default", ""), tmp_path / "u.jsonl"
    others = [tmp_path / f"u.{name}.jsonl" for name in ("rank-backup", "ranking", "rank", "rank1.old", "rank1x")]
    for path in others:
        path.write_text("a diary\n")
    backup = tmp_path / "u.rank-mine.jsonl"
    for path in (backup, part_of(out, 10)):
        with closing(AnswerFile(path, job)) as answers:
            answers.add(path.name, {"text": "A"})
    merge_parts(out, job)
    assert list(entries(out)) == ["u.rank10.jsonl"]
    assert sorted(tmp_path.iterdir()) == sorted([out, backup, *others])
