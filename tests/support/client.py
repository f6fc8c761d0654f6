"""A user's machine in the tests of the hub.

huggingface_hub reads $HF_ENDPOINT when it is imported, so what talks to a `FakeHub` runs in its own process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.fake_hub import FakeHub
from support.seeded import GOLDEN, golden_prompt

ROOT = Path(__file__).resolve().parents[2]
RESOLVE = """
import json, sys
from fastvlm_mlx.errors import FastVLMError, HubError
from fastvlm_mlx.hub import resolve

answers = []
for model, options in json.loads(sys.argv[1]):
    try:
        answers.append(str(resolve(model, **options)))
    except FastVLMError as exc:
        answers.append(f"{'HubError' if isinstance(exc, HubError) else type(exc).__name__}: {exc}")
print(json.dumps(answers))
"""
GENERATE = """
import json, sys
import mlx.core as mx, numpy as np
from fastvlm_mlx import load

mx.set_default_device(mx.cpu)  # the golden ids are those of float32
name, golden, ids, options = map(json.loads, sys.argv[1:])
image = np.load(golden)["pixels_256x256"]
print(json.dumps(load(name, **options).generate(image, ids, max_tokens=24, ignore_eos=True).token_ids))
"""


@dataclass
class Client:
    """A user's machine: caches of its own, and the hub that it talks to."""

    hub: FakeHub
    home: Path
    token: str | None = None

    def environment(self) -> dict[str, str]:
        """The present environment, with nothing of the user's own hub settings in it."""
        kept = {n: v for n, v in os.environ.items() if not n.upper().startswith(("HF_", "FASTVLM_"))}
        kept = {n: v for n, v in kept.items() if not n.lower().endswith("_proxy")}
        packages = [str(ROOT / folder) for folder in ("src", "converters", "benchmarks", "models")]
        return kept | {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "FASTVLM_CACHE": str(self.home / "cache"),
            "PYTHONPATH": os.pathsep.join(packages),
            **({"HF_TOKEN": self.token} if self.token else {}),
        }

    def resolve(self, model: str, **options: object) -> tuple[str, str]:
        """What `resolve` returns, or its error's class and message; and stderr."""
        answers, log = self.ask(RESOLVE, [(model, options)])
        return answers[0], log

    def generate(self, model: str, **options: object) -> tuple[list[int], str]:
        """The ids that `load(model, **options)` answers the golden prompt with; and stderr."""
        ids = golden_prompt("tiny", "one image").ids
        answer, log = self.ask(GENERATE, model, str(GOLDEN / "tiny.npz"), ids, options)
        return answer, log

    def ask(self, code: str, *arguments: object) -> tuple[Any, str]:
        """Run Python code that prints one line of JSON; its `sys.argv[1:]` are JSON too.

        Returns:
            What it printed, and stderr.
        """
        done = self.run("-c", code, *map(json.dumps, arguments))
        return json.loads(done.stdout), done.stderr

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a Python command, such as ("-c", "...") or ("-m", "fastvlm_convert", "...")."""
        done = subprocess.run(
            [sys.executable, "-P", *command],
            env=self.environment(), cwd=self.home, capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        if check and done.returncode:
            raise AssertionError(f"{command} exits with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done
