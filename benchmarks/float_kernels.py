"""Float kernels of the same quality: what exact sums are compared with. They live here alone.

Sums in float32 about a pivot, several rows a step, flushed to float64; multiplications and additions may fuse. The
result depends on the order, so on the number of ranks: that is what the exact kernels' extra time buys.

How many rows a step takes, and whether the second pass starts from the end, is what was fastest: both walks are
timed, and the better one counts.

Shape suffixes: as in `bnlayer.kernels`, (A, C, B); R rows where the channels come last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.native import function

Array = NDArray[Any]
_CHUNK = 2**15  # elements of a chunk, 128 KB, where the second pass walks from the end


@dataclass(frozen=True)
class FloatKernels:
    """The four passes, on (A, C, B).

    Attributes:
        from_the_end: whether the second pass starts where the first one ended.
    """

    from_the_end: bool

    def moments(self, x: Array, pivot_C: Array) -> tuple[Array, Array]:
        """Σ(x − pivot) and Σ(x − pivot)², float64."""
        total, squares = np.zeros(x.shape[1]), np.zeros(x.shape[1])
        if x.shape[2] == 1:
            function("moments_last")(x, pivot_C, total, squares, *x.shape[:2])
        else:
            function("moments_first")(x, pivot_C, total, squares, *x.shape)
        return total, squares

    def normalize(self, x: Array, mean_C: Array, scale_C: Array, shift_C: Array) -> Array:
        """(x − mean)·scale + shift."""
        y = np.empty(x.shape, x.dtype)
        if x.shape[2] == 1:
            function("normalize_last")(x, mean_C, scale_C, shift_C, y, *x.shape[:2], self._rows(x))
        else:
            function("normalize_first")(x, mean_C, scale_C, shift_C, y, *x.shape, self.from_the_end)
        return y

    def gradient_sums(self, dy: Array, x: Array, mean_C: Array) -> tuple[Array, Array]:
        """Σ dy and Σ dy·(x − mean), float64."""
        total, products = np.zeros(x.shape[1]), np.zeros(x.shape[1])
        if x.shape[2] == 1:
            function("sums_last")(dy, x, mean_C, total, products, *x.shape[:2])
        else:
            function("sums_first")(dy, x, mean_C, total, products, *x.shape)
        return total, products

    def input_gradient(
        self, dy: Array, x: Array, mean_C: Array, offset_C: Array, slope_C: Array, scale_C: Array
    ) -> Array:
        """((dy − offset) − (x − mean)·slope)·scale."""
        dx = np.empty(x.shape, x.dtype)
        vectors = (mean_C, offset_C, slope_C, scale_C)
        if x.shape[2] == 1:
            function("input_gradient_last")(dy, x, *vectors, dx, *x.shape[:2], self._rows(x))
        else:
            function("input_gradient_first")(dy, x, *vectors, dx, *x.shape, self.from_the_end)
        return dx

    def _rows(self, x: Array) -> int:
        """Rows per chunk; one chunk is the walk from the beginning."""
        return max(1, _CHUNK // int(x.shape[1])) if self.from_the_end else int(x.shape[0])
