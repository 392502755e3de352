"""Which kernels this process uses, decided once."""

from __future__ import annotations

import logging
import os
from functools import cache

from bnlayer.environment import variable

_log = logging.getLogger("bnlayer.kernels")

REFERENCE = "reference"
VARIANTS = ("avx512", "avx2", "neon", "baseline")


@cache
def chosen() -> str:
    """The name of the kernel set: `BNLAYER_KERNELS=reference`, or a variant of the compiled one; read at the first call.

    Where the variable is not set, the widest variant that this processor runs; or the reference, with a warning, where
    the extension module can't be loaded.

    Raises:
        ValueError: the variable holds something else, or a variant that this processor does not run.
        ImportError: it asks for a variant, and the extension module can't be loaded.
    """
    wanted = variable(os.environ, "BNLAYER_KERNELS")
    if wanted not in (None, REFERENCE, *VARIANTS):
        expected = ", ".join(repr(name) for name in (REFERENCE, *VARIANTS))
        raise ValueError(f"BNLAYER_KERNELS: expected one of {expected}, received {wanted!r}.")
    name = wanted if wanted == REFERENCE else _variant(wanted)
    _log.debug("kernels: %s", name)
    return name


def _variant(wanted: str | None) -> str:
    """The variant that is wanted, or the widest."""
    try:
        from bnlayer.kernels import compiled
    except ImportError as error:
        if wanted is not None:
            raise ImportError(
                f"BNLAYER_KERNELS={wanted} needs the extension module bnlayer.kernels._native ({error}): install a "
                "wheel for this machine, or build it: pip install --no-binary bnlayer bnlayer."
            ) from error
        _log.warning(
            "the compiled kernels can't be loaded (%s): NumPy's serve, thirty times slower, with the same bits. Install "
            "a wheel for this machine, or build them: pip install --no-binary bnlayer bnlayer. "
            "BNLAYER_KERNELS=reference says that they are wanted, without this warning",
            error,
        )
        return REFERENCE
    runnable = compiled.variants()
    if wanted is None:
        return runnable[0]
    if wanted not in runnable:
        why = "does not have it" if wanted in compiled.all_variants() else "is of another kind"
        raise ValueError(
            f"BNLAYER_KERNELS={wanted}: this processor {why}; it runs {', '.join(runnable)}. Leave the variable unset "
            "for the widest of them."
        )
    return wanted


@cache
def threads() -> int:
    """How many threads pass over a batch: `BNLAYER_THREADS`, read at the first call; 1 where it is not set.

    Raises:
        ValueError: the variable holds no number of 1 or more.
    """
    wanted = variable(os.environ, "BNLAYER_THREADS") or "1"
    if not wanted.isdecimal() or int(wanted) < 1:
        raise ValueError(f"BNLAYER_THREADS: expected a number of threads, 1 or more, received {wanted!r}.")
    return int(wanted)
