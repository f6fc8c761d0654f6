"""What MLX needs on a CPU to be as fast as it can be; a no-op on macOS.

Must run before MLX is first imported, since it decides which BLAS MLX's matmul finds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import sys

OPENBLAS = "libopenblas.so.0"  # Debian, Ubuntu: libopenblas0-pthread


def prepare_cpu() -> None:
    """On Linux: let MLX find OpenBLAS, and don't let it call a compiler that isn't there.

    MLX's Linux wheels come with a reference BLAS, 3-5 GFLOP/s in float32; with OpenBLAS loaded into the
    process before it, the same matmul reaches about 80 (measured, 2 cores). `FASTVLM_OPENBLAS=0` leaves it
    out, another value names the library. MLX's `mx.compile` builds C++ at run time and needs g++.
    """
    if sys.platform != "linux":
        return
    library = os.environ.get("FASTVLM_OPENBLAS", OPENBLAS)
    if library != "0" and "mlx.core" not in sys.modules:
        with contextlib.suppress(OSError):  # not installed: slower, equally right
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    if shutil.which("g++") is None:
        os.environ.setdefault("MLX_DISABLE_COMPILE", "1")
