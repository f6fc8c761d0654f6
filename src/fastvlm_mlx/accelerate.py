"""What MLX needs on a Linux CPU to be as fast as it can be; a no-op elsewhere.

Must run before MLX is first imported: it decides which BLAS MLX's matmul finds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

OPENBLAS = "libopenblas.so.0"  # Debian, Ubuntu: libopenblas0-pthread


def prepare_cpu() -> None:
    """On Linux, let MLX find OpenBLAS where it is installed.

    MLX's Linux wheels come with a reference BLAS: 4 GFLOP/s on a float32 matmul of side 1024, where OpenBLAS,
    loaded into the process before MLX, gives 80 (2 cores of a 2.8 GHz Xeon). `FASTVLM_OPENBLAS=0` leaves it out,
    another value names the library.
    """
    library = os.environ.get("FASTVLM_OPENBLAS", OPENBLAS)
    if sys.platform == "linux" and library != "0" and "mlx.core" not in sys.modules:
        with contextlib.suppress(OSError):  # not installed: slower, equally right
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)


def finds_openblas() -> bool:
    """Whether MLX finds OpenBLAS in this process, on Linux; elsewhere it has no need of it."""
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "openblas_get_config")
