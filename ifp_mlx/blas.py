"""A fast BLAS for mlx's CPU build on Linux.

The Linux wheel of mlx links reference BLAS. OpenBLAS exports the same symbols, so loading it
into the global scope first makes mlx call it instead: float32 matrix products run about 60
times faster. On macOS mlx uses Accelerate and Metal, and there is nothing to do.
"""

import contextlib
import ctypes
import ctypes.util
import os
import sys

OPT_OUT = "IFP_NO_OPENBLAS"


def prefer_openblas() -> str | None:
    """Load OpenBLAS ahead of ``mlx.core`` if this is Linux and the library is installed.

    Call it before ``mlx.core`` is imported for the first time; later it has no effect.
    Setting the environment variable ``IFP_NO_OPENBLAS`` turns it off.

    Returns:
        The library's name, or None when it was not loaded.
    """
    if sys.platform != "linux" or os.environ.get(OPT_OUT) or "mlx.core" in sys.modules:
        return None
    name = ctypes.util.find_library("openblas")
    if name is None:
        return None
    with contextlib.suppress(OSError):
        ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        return name
    return None
