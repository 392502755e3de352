"""The passes over the data, chosen once: everything that touches every element is here.

A kernel set is a module with the functions of `reference`. Arrays come as (A, C, B): the axes before the channel
axis, the channels, the axes after it. Masks broadcast to that.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType

from bnlayer.kernels import reference

_log = logging.getLogger("bnlayer.kernels")


@cache
def kernels() -> ModuleType:
    """The kernel set of this process: `BNLAYER_KERNELS=reference|compiled`, read at the first call.

    Raises:
        ValueError: the variable holds something else.
    """
    wanted = os.environ.get("BNLAYER_KERNELS", "reference")
    if wanted not in ("reference", "compiled"):
        raise ValueError(f"BNLAYER_KERNELS: expected 'reference' or 'compiled', received {wanted!r}.")
    if wanted == "compiled":
        _log.warning("BNLAYER_KERNELS=compiled: this version has no compiled kernels; using the reference ones.")
    _log.debug("kernels: reference (NumPy)")
    return reference
