"""The passes over the data, chosen once: everything that touches every element is here.

A kernel set is a module with the functions of `reference`. Arrays come as (A, C, B): the axes before the channel
axis, the channels, the axes after it. Masks broadcast to that. A set may have `channels` too: a module that computes
what `Moments`, `GradientSums` and `moving` do with the sums. All sets give the same bits.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType

_log = logging.getLogger("bnlayer.kernels")

_SETS = ("compiled", "reference")


@cache
def kernels() -> ModuleType:
    """The kernel set of this process: `BNLAYER_KERNELS=compiled|reference`, read at the first call.

    Where the variable is not set, the compiled kernels if there is a Numba, and the reference if not.

    Raises:
        ValueError: the variable holds something else.
        ImportError: it asks for the compiled kernels, and there is no Numba.
    """
    wanted = os.environ.get("BNLAYER_KERNELS")
    if wanted is not None and wanted not in _SETS:
        raise ValueError(f"BNLAYER_KERNELS: expected {' or '.join(map(repr, _SETS))}, received {wanted!r}.")
    chosen = _reference() if wanted == "reference" else _compiled(wanted is not None)
    _log.debug("kernels: %s", chosen.name)
    return chosen


def _reference() -> ModuleType:
    from bnlayer.kernels import reference

    return reference


def _compiled(asked_for: bool) -> ModuleType:
    try:
        from bnlayer.kernels import compiled
    except ImportError as error:
        if asked_for:
            raise ImportError(
                f"BNLAYER_KERNELS=compiled needs Numba: pip install 'bnlayer[fast]' ({error})."
            ) from error
        _log.info(
            "the kernels are NumPy's, for want of Numba; pip install 'bnlayer[fast]' brings those that are five times "
            "faster, with the same bits (%s)",
            error,
        )
        return _reference()
    return compiled
