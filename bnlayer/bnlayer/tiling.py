"""The passes over a batch: whole, or piece by piece.

A batch is passed over in pieces where it has to be converted on the way (half types are computed in float32, a mask of
fewer axes is given a place for every element), so that what is converted is never there as a whole; and where
`BNLAYER_THREADS` asks for several threads, which then take a piece each. Sums are integers: the pieces can't be seen in
any bit.

Shape suffixes: A axes before the channels, C channels, B axes after them, W limbs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnlayer.dtypes import rounded
from bnlayer.environment import variable
from bnlayer.gradients import GradientSums
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import kernels
from bnlayer.limbs import carried
from bnlayer.moments import Moments
from bnlayer.view import WHOLE, View

Array = NDArray[Any]
T = TypeVar("T")

_HERE = sys.modules[__name__]
_PIECE = 2**16  # elements to convert at a time: a quarter of a megabyte of float32, from a second-level cache
_WORTH_A_THREAD = 2**16  # elements: a thread's part of fewer is done sooner than it is handed over


def passes_of(view: View) -> Any:
    """Where the passes over a batch are: here, or with the batch itself, where it lies on a framework's device."""
    return _HERE if view.passes is None else view.passes


def probe(view: View, grid: Grid) -> NDArray[np.int64]:
    """The largest keys of x and of −x over all finite unmasked values; (2, C)."""
    kind = grid.precision.dtype

    def pass_over(at: slice) -> NDArray[np.int64]:
        keys: NDArray[np.int64] = kernels().probe(view.values(at, kind), view.truths(at), grid)
        return keys

    found = _over(view, kind, pass_over)
    return found[0] if len(found) == 1 else np.maximum.reduce(found)


def moments(view: View, grid: Grid) -> Moments:
    """The exact moments of the batch."""
    kind = grid.precision.dtype

    def pass_over(at: slice) -> NDArray[np.int64]:
        found: Moments = kernels().moments(view.values(at, kind), view.truths(at), grid)
        return found.limbs

    return Moments(_pooled(_over(view, kind, pass_over), flags=1), grid)


def normalize(
    view: View, mean_C: Array, scale_C: Array, shift_C: Array, nonfinite_C: Array, dtype: np.dtype[Any]
) -> Array:
    """(x − mean)·scale + shift in the dtype of the coefficients, rounded once to `dtype`; NaN in nonfinite channels."""
    kind = mean_C.dtype

    def pass_over(at: slice, out: Array | None) -> Array:
        y: Array = kernels().normalize(view.values(at, kind), mean_C, scale_C, shift_C, nonfinite_C, out)
        return y

    return _written(view, kind, dtype, pass_over)


def gradient_probe(dy: View, view: View, pivot_C: Array, grid: BackwardGrid) -> NDArray[np.int64]:
    """The exponents of the largest finite |dy| and |x − pivot|; (2, C)."""
    kind = grid.precision.dtype

    def pass_over(at: slice) -> NDArray[np.int64]:
        sizes: NDArray[np.int64] = kernels().gradient_probe(dy.values(at, kind), view.values(at, kind), pivot_C, grid)
        return sizes

    found = _over(view, kind, pass_over)
    return found[0] if len(found) == 1 else np.maximum.reduce(found)


def gradient_sums(dy: View, view: View, pivot_C: Array, grid: BackwardGrid, *, fits: bool) -> GradientSums:
    """The exact sums of the output's gradients; `fits`: the forward pass has shown that every x lies in its window."""
    kind = grid.precision.dtype

    def pass_over(at: slice) -> NDArray[np.int64]:
        values = dy.values(at, kind), view.values(at, kind), view.truths(at)
        limbs: NDArray[np.int64] = kernels().gradient_sums(*values, pivot_C, grid, fits=fits).limbs
        return limbs

    return GradientSums(_pooled(_over(view, kind, pass_over), flags=2), grid)


def input_gradient(
    dy: View,
    view: View,
    mean_C: Array,
    offset_C: Array,
    slope_C: Array,
    scale_C: Array,
    nonfinite_C: Array,
    dtype: np.dtype[Any],
) -> Array:
    """((dy − offset) − (x − mean)·slope)·scale where unmasked, dy·scale where masked, rounded once to `dtype`."""
    kind = mean_C.dtype
    coefficients = mean_C, offset_C, slope_C, scale_C, nonfinite_C

    def pass_over(at: slice, out: Array | None) -> Array:
        values = dy.values(at, kind), view.values(at, kind), view.truths(at)
        dx: Array = kernels().input_gradient(*values, *coefficients, out)
        return dx

    return _written(view, kind, dtype, pass_over)


def scaled(dy: View, scale_C: Array, dtype: np.dtype[Any]) -> Array:
    """dy·scale in the dtype of the scale, rounded once to `dtype`."""
    kind = scale_C.dtype
    return _written(dy, kind, dtype, lambda at, out: np.multiply(dy.values(at, kind), scale_C[:, None], out))


def _over(view: View, kind: np.dtype[Any], pass_over: Callable[[slice], T]) -> list[T]:
    """What a pass says of each piece of a batch, in order."""
    if threads() == 1 and view.is_ready(kind):
        return [pass_over(WHOLE)]
    pieces = _pieces(view, view.is_ready(kind))
    return _mapped(pass_over, pieces)


def _written(
    view: View, kind: np.dtype[Any], dtype: np.dtype[Any], pass_over: Callable[[slice, Array | None], Array]
) -> Array:
    """What a pass writes, in a new array of a dtype."""
    whole = dtype == kind
    if threads() == 1 and whole and view.is_ready(kind):
        return pass_over(WHOLE, None)
    pieces = _pieces(view, whole and view.is_ready(kind))
    written = np.empty(view.x.shape, dtype)

    def write(at: slice) -> None:
        if whole:
            pass_over(at, written[at])
        else:
            written[at] = rounded(pass_over(at, None), dtype)

    _mapped(write, pieces)
    return written


def _pieces(view: View, ready: bool) -> list[slice]:
    """The pieces of a batch, along A; one at least."""
    rows, size = view.x.shape[0], view.x.size
    parts = max(1, min(threads(), size // _WORTH_A_THREAD))
    step = -(-rows // parts)
    if not ready:
        step = min(step, _PIECE * rows // max(1, size))
    step = max(1, step)
    return [slice(at, at + step) for at in range(0, rows, step)] or [WHOLE]


def _mapped(function: Callable[[slice], T], pieces: list[slice]) -> list[T]:
    if threads() == 1 or len(pieces) == 1:
        return [function(at) for at in pieces]
    # A copy each: NumPy's error state belongs to the context, and a context can be entered once at a time.
    contexts = [copy_context() for _ in pieces]
    return list(_pool(os.getpid()).map(lambda context, at: context.run(function, at), contexts, pieces))


def _pooled(parts: list[NDArray[np.int64]], *, flags: int) -> NDArray[np.int64]:
    """The limbs of all pieces: sums added and carried, counts added, flags joined.

    Args:
        parts: (W, C) each.
        flags: how many of the last rows are flags.
    """
    if len(parts) == 1:
        return parts[0]
    total = np.add.reduce(parts)
    total[-flags:] = np.bitwise_or.reduce([part[-flags:] for part in parts])
    for row in range(0, total.shape[0] - 2, 2):
        total[row], total[row + 1] = carried(total[row], total[row + 1])
    return np.asarray(total, np.int64)


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


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """The threads of a process: those of its parent did not come along in a fork."""
    del process
    return ThreadPoolExecutor(threads(), thread_name_prefix="bnlayer")
