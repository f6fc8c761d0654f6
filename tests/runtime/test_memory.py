"""A process that answers for hours needs no more memory than in its first minutes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

GROWTH = 0.02

SCRIPT = """
import json, random, sys
import numpy as np
from fastvlm_mlx import load

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

model = load(sys.argv[1], resolution=64, prefix_cache_bytes=1 << 20, feature_cache_bytes=1 << 17)
dice, sizes = random.Random(0), []
pictures = [np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8) for seed in range(30)]
for number in range(600):
    ids = [dice.randrange(50) for _ in range(dice.randrange(1, 30))]
    model.generate(dice.choice(pictures), [1, -200, *ids], max_tokens=dice.randrange(1, 12), ignore_eos=True)
    if number >= 99:
        sizes.append(resident())
print(json.dumps([max(sizes[:100]), max(sizes[-100:]), model.engine.prefixes.nbytes, model.engine.vision.cache.nbytes]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_five_hundred_questions_take_no_more_memory(bundle):
    """Questions 100 to 199 against 500 to 599, with caches that are full by then."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(bundle("tiny"))], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    early, late, prefixes, features = json.loads(done.stdout)
    assert late <= early * (1 + GROWTH)
    assert 0.5 * (1 << 20) < prefixes <= 1 << 20
    assert 0 < features <= 1 << 17
