"""What a command imports before it has looked at its arguments."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence


def exit_and_heavy(argv: Sequence[str], heavy: Sequence[str]) -> str:
    """Run `fastvlm-bench` in a new process: its exit code, and which of `heavy` it imported, as "2 []"."""
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from fastvlm_bench.cli import main\n"
        f"try:\n    code = main({list(argv)!r})\n"
        "except SystemExit as exc:\n    code = exc.code\n"
        f"print(code, [name for name in {tuple(heavy)!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]
