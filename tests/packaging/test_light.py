"""Importing the package and asking for help load nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATHS = [str(ROOT / part) for part in ("src", "converters", "benchmarks", "models")]
HEAVY = {
    "mlx",
    "mlx_lm",
    "numpy",
    "PIL",
    "av",
    "matplotlib",
    "transformers",
    "torch",
    "coremltools",
    "huggingface_hub",
    "tokenizers",
}


def loaded(code: str) -> set[str]:
    """Heavy packages in sys.modules after running some code in a fresh interpreter."""
    script = (
        f"import sys; sys.path[:0] = {PATHS!r}\n"
        f"try:\n    {code}\n"
        "except SystemExit as exc:\n    assert exc.code == 0\n"
        "print('LOADED', *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split()) & HEAVY


@pytest.mark.parametrize(
    "code",
    [
        "import fastvlm_mlx; fastvlm_mlx.__version__",
        "import fastvlm_convert",
        "import fastvlm_bench",
        "import fastvlm_zoo; fastvlm_zoo.entries()",
        "from fastvlm_mlx import load, FastVLMError, GenerationResult",
        "from fastvlm_mlx.cli import main; main(['--help'])",
        "from fastvlm_mlx.cli import main; main(['generate', '--help'])",
        "from fastvlm_mlx.cli import main; main(['chat', '--help'])",
        "from fastvlm_mlx.cli import main; main(['models', '--help'])",
        "from fastvlm_convert.cli import main; main(['--help'])",
        "from fastvlm_bench.cli import main; main(['--help'])",
        "from fastvlm_bench.cli import main; main(['plan', '--help'])",
        "from fastvlm_bench.cli import main; main(['plot', '--help'])",
    ],
)
def test_light(code):
    assert loaded(code) == set()


def test_the_measure_sees_heavy_modules():
    assert "numpy" in loaded("from fastvlm_mlx.image import preprocess")


def test_the_run_time_leaves_torch_and_coremltools_alone():
    """Answering about an image: MLX, mlx-lm and what those bring, but no coremltools and no converter."""
    code = (
        "import fastvlm_mlx.loading as l, numpy; "
        "l.load(vision='mlx').generate(numpy.zeros((64, 64, 3), numpy.uint8), 'Hi', max_tokens=1); "
        "assert not {'coremltools', 'fastvlm_convert', 'fastvlm_bench', 'timm'} & set(sys.modules)"
    )
    assert "mlx" in loaded(code)


def test_public_names():
    import fastvlm_mlx

    assert all(hasattr(fastvlm_mlx, name) for name in fastvlm_mlx.__all__)
    assert set(fastvlm_mlx._HOMES) | {"__version__"} == set(fastvlm_mlx.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fastvlm_mlx.nothing
