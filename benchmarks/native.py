"""Loops in C++ that the exact kernels are compared with: `native.cpp`, compiled for this processor when first needed.

The object is kept in `out/`, under a name that says what it was made of. $CXX names another compiler.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SOURCE = Path(__file__).with_name("native.cpp")
# Additions in any order, fused multiplications. Not -ffast-math: with it GCC 12 makes a library that turns subnormal
# numbers off for the process that loads it, those of the exact kernels included.
_FAST = ("-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=fast")
_FLAGS = ("-std=c++20", "-O3", "-march=native", *_FAST, "-fPIC", "-shared")
_RESULTS = {
    "read_bits": ctypes.c_int64,
    "read_bits_streams": ctypes.c_int64,
    "read_two_bits": ctypes.c_int64,
    "read_floats": ctypes.c_float,
    "read_two_floats": ctypes.c_float,
}


@cache
def function(name: str) -> Callable[..., Any]:
    """A function of the source by its name.

    It takes arrays in one piece, of the types that the source says, and numbers; nothing is checked.
    """
    symbol = _library()[name]
    symbol.restype = _RESULTS.get(name)

    def call(*arguments: NDArray[Any] | int) -> Any:
        return symbol(*(_address(a) if isinstance(a, np.ndarray) else ctypes.c_int64(a) for a in arguments))

    return call


def _address(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.__array_interface__["data"][0])


@cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX", "c++")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    made_of = hashlib.sha256(b"\0".join((_SOURCE.read_bytes(), version, " ".join(_FLAGS).encode(), _processor())))
    built = _SOURCE.parents[1] / f"out/benchmarks-{made_of.hexdigest()[:16]}.so"
    if not built.exists():
        built.parent.mkdir(exist_ok=True)
        unfinished = built.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, *_FLAGS, "-o", unfinished, _SOURCE], check=True)
        unfinished.replace(built)
    return ctypes.CDLL(str(built))


def _processor() -> bytes:
    """What -march=native stands for."""
    flags = [
        line for line in Path("/proc/cpuinfo").read_bytes().splitlines() if line.startswith((b"flags", b"Features"))
    ]
    return flags[0] if flags else b""
