"""The compiled half of this package: C++ and CUDA behind a plain C interface (``kernels/csrc``), loaded with ctypes.

The libraries lie beside this file where the package was installed with a compiler at hand, or in the folder that the
environment variable ``XKD_NATIVE`` names. Nothing needs them: without one the same operators run by PyTorch's, and say so.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

ABI = 2
LIBRARIES = {"cpu": "libxkd_kernels_cpu.so", "cuda": "libxkd_kernels_cuda.so"}


class AdamW(ctypes.Structure):
    """``xkd_adamw`` of ``adamw_ema.h``."""

    _fields_ = [(name, ctypes.c_float) for name in ("beta1", "beta2", "eps", "step_size", "second_root")]


def place() -> Path:
    """The folder in which the libraries are looked for."""
    return Path(os.environ.get("XKD_NATIVE") or Path(__file__).parent)


@cache
def _load(path: Path) -> ctypes.CDLL | str:
    """A library, or why there is none."""
    if not path.is_file():
        how = "install this package again with cmake and a C++ compiler (for a GPU: nvcc) on the PATH"
        return f"{path} has not been built; {how}"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path} cannot be loaded ({error}); build it on this machine"
    if library.xkd_abi() != ABI:
        return f"{path} was built from other sources (interface {library.xkd_abi()}, wanted {ABI}); build it again"
    for function in ("xkd_pieces",):
        if hasattr(library, function):
            getattr(library, function).restype = ctypes.c_int64
    return library


def missing(device_type: str) -> str | None:
    """Why there is no compiled library for this type of device; None if there is one."""
    if device_type not in LIBRARIES:
        return f"its code is written for CPUs and CUDA devices, not for {device_type}"
    found = _load(place() / LIBRARIES[device_type])
    return found if isinstance(found, str) else None


def library(device_type: str) -> ctypes.CDLL:
    """The compiled library for a type of device.

    Raises:
        RuntimeError: there is none.
    """
    found = _load(place() / LIBRARIES[device_type])
    if isinstance(found, str):
        raise RuntimeError(found)
    return found
