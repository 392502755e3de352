"""The passes over the data, chosen once: everything that touches every element is here.

A kernel set is a module with the functions of `reference`. Arrays come as (A, C, B): the axes before the channel
axis, the channels, the axes after it. Masks broadcast to that. All sets give the same bits.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

from bnlayer.kernels.choice import REFERENCE, chosen


@cache
def kernels() -> ModuleType:
    """The kernel set of this process: see `choice.chosen`."""
    if chosen() == REFERENCE:
        from bnlayer.kernels import reference

        return reference
    from bnlayer.kernels.compiled import kernels as compiled

    return compiled
