"""Which kernels this process uses, decided once."""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType

from bnlayer.environment import variable

_log = logging.getLogger("bnlayer.kernels")

COMPILED, REFERENCE = "compiled", "reference"


@cache
def chosen() -> str:
    """The name of the kernel set: `BNLAYER_KERNELS=compiled|reference`, read at the first call.

    Where the variable is not set, the compiled kernels if there is a Numba, and the reference if not.

    Raises:
        ValueError: the variable holds something else.
        ImportError: it asks for the compiled kernels, and there is no Numba.
    """
    wanted = variable(os.environ, "BNLAYER_KERNELS")
    if wanted not in (None, COMPILED, REFERENCE):
        raise ValueError(f"BNLAYER_KERNELS: expected {COMPILED!r} or {REFERENCE!r}, received {wanted!r}.")
    name = REFERENCE if wanted == REFERENCE or not _numba(wanted == COMPILED) else COMPILED
    _log.debug("kernels: %s", name)
    return name


@cache
def quick_channels() -> ModuleType | None:
    """What computes in one call what follows from a channel's sums; None: NumPy does, where the formulas stand."""
    if chosen() == REFERENCE:
        return None
    from bnlayer.kernels.compiled import channels

    return channels


def _numba(needed: bool) -> bool:
    try:
        import numba  # noqa: F401 - whether it can be imported is the question
    except ImportError as error:
        if needed:
            raise ImportError(
                f"BNLAYER_KERNELS=compiled needs Numba: pip install 'bnlayer[fast]' ({error})."
            ) from error
        _log.info(
            "the kernels are NumPy's, for want of Numba; pip install 'bnlayer[fast]' brings those that are five times "
            "faster, with the same bits (%s)",
            error,
        )
        return False
    return True
