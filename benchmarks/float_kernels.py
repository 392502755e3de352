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
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]
_FLUSH = 1024  # rows, or values of a channel, per float32 partial sum
_CHUNK = 2**15  # elements of a chunk, 128 KB, where the second pass walks from the end
_LARGE = 2**21  # elements: beyond it a processor fetches two streams ahead better than eight
_compiled = njit(cache=True, nogil=True, fastmath=True, error_model="numpy")


@_compiled
def _moments_two_rows(x: Array, pivot: Array, partial: Array, partial_squares: Array) -> None:
    for k in range(x.shape[0] // 2):
        a, b = x[2 * k], x[2 * k + 1]
        for j in range(x.shape[1]):
            p = pivot[j]
            c, d = a[j] - p, b[j] - p
            partial[j] += c + d
            partial_squares[j] += c * c + d * d


@_compiled
def _moments_eight_rows(x: Array, pivot: Array, partial: Array, partial_squares: Array) -> None:
    for k in range(x.shape[0] // 8):
        a, b, c, d = x[8 * k], x[8 * k + 1], x[8 * k + 2], x[8 * k + 3]
        e, f, g, h = x[8 * k + 4], x[8 * k + 5], x[8 * k + 6], x[8 * k + 7]
        for j in range(x.shape[1]):
            p = pivot[j]
            q, r, s, t = a[j] - p, b[j] - p, c[j] - p, d[j] - p
            u, v, w, z = e[j] - p, f[j] - p, g[j] - p, h[j] - p
            partial[j] += ((q + r) + (s + t)) + ((u + v) + (w + z))
            partial_squares[j] += ((q * q + r * r) + (s * s + t * t)) + ((u * u + v * v) + (w * w + z * z))


@_compiled
def _moments_last(x: Array, pivot: Array, total: Array, squares: Array) -> None:
    rows, channels = x.shape
    step = 2 if channels <= 128 else 8
    whole = rows // step * step
    for start in range(0, whole, _FLUSH):
        part = x[start : min(start + _FLUSH, whole)]
        partial, partial_squares = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
        if step == 2:
            _moments_two_rows(part, pivot, partial, partial_squares)
        else:
            _moments_eight_rows(part, pivot, partial, partial_squares)
        for j in range(channels):
            total[j] += partial[j]
            squares[j] += partial_squares[j]
    for i in range(whole, rows):
        row = x[i]
        for j in range(channels):
            d = row[j] - pivot[j]
            total[j] += d
            squares[j] += d * d


@_compiled
def _moments_first(x: Array, pivot: Array, total: Array, squares: Array) -> None:
    for a in range(x.shape[0]):
        for j in range(x.shape[1]):
            values, p = x[a, j], pivot[j]
            for start in range(0, values.shape[0], _FLUSH):
                part = values[start : start + _FLUSH]
                s, q = np.float32(0), np.float32(0)
                for i in range(part.shape[0]):
                    d = part[i] - p
                    s += d
                    q += d * d
                total[j] += s
                squares[j] += q


@_compiled
def _normalize_last(x: Array, mean: Array, scale: Array, shift: Array, y: Array, chunk: int) -> None:
    rows = x.shape[0]
    for k in range((rows + chunk - 1) // chunk):
        stop = rows - k * chunk
        start = max(stop - chunk, 0)
        part, out = x[start:stop], y[start:stop]
        for i in range(part.shape[0]):
            a, b = part[i], out[i]
            for j in range(x.shape[1]):
                b[j] = (a[j] - mean[j]) * scale[j] + shift[j]


@_compiled
def _normalize_first(x: Array, mean: Array, scale: Array, shift: Array, y: Array, from_the_end: bool) -> None:
    for k in range(x.shape[0]):
        a = x.shape[0] - 1 - k if from_the_end else k
        part, out = x[a], y[a]
        for j in range(x.shape[1]):
            values, results, m, s, t = part[j], out[j], mean[j], scale[j], shift[j]
            for i in range(values.shape[0]):
                results[i] = (values[i] - m) * s + t


@_compiled
def _sums_one_row(dy: Array, x: Array, mean: Array, partial: Array, partial_products: Array) -> None:
    for i in range(x.shape[0]):
        a, g = x[i], dy[i]
        for j in range(x.shape[1]):
            partial[j] += g[j]
            partial_products[j] += g[j] * (a[j] - mean[j])


@_compiled
def _sums_four_rows(dy: Array, x: Array, mean: Array, partial: Array, partial_products: Array) -> None:
    for k in range(x.shape[0] // 4):
        a, b, c, d = x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]
        e, f, g, h = dy[4 * k], dy[4 * k + 1], dy[4 * k + 2], dy[4 * k + 3]
        for j in range(x.shape[1]):
            m = mean[j]
            partial[j] += (e[j] + f[j]) + (g[j] + h[j])
            partial_products[j] += (e[j] * (a[j] - m) + f[j] * (b[j] - m)) + (g[j] * (c[j] - m) + h[j] * (d[j] - m))


@_compiled
def _sums_last(dy: Array, x: Array, mean: Array, total: Array, products: Array) -> None:
    rows, channels = x.shape
    step = 1 if x.size > _LARGE else 4
    whole = rows // step * step
    for start in range(0, whole, _FLUSH):
        stop = min(start + _FLUSH, whole)
        partial, partial_products = np.zeros(channels, np.float32), np.zeros(channels, np.float32)
        if step == 1:
            _sums_one_row(dy[start:stop], x[start:stop], mean, partial, partial_products)
        else:
            _sums_four_rows(dy[start:stop], x[start:stop], mean, partial, partial_products)
        for j in range(channels):
            total[j] += partial[j]
            products[j] += partial_products[j]
    for i in range(whole, rows):
        row, gradient = x[i], dy[i]
        for j in range(channels):
            total[j] += gradient[j]
            products[j] += gradient[j] * (row[j] - mean[j])


@_compiled
def _sums_first(dy: Array, x: Array, mean: Array, total: Array, products: Array) -> None:
    for a in range(x.shape[0]):
        for j in range(x.shape[1]):
            values, gradients, m = x[a, j], dy[a, j], mean[j]
            for start in range(0, values.shape[0], _FLUSH):
                part, slopes = values[start : start + _FLUSH], gradients[start : start + _FLUSH]
                s, q = np.float32(0), np.float32(0)
                for i in range(part.shape[0]):
                    s += slopes[i]
                    q += slopes[i] * (part[i] - m)
                total[j] += s
                products[j] += q


@_compiled
def _input_gradient_last(
    dy: Array, x: Array, mean: Array, offset: Array, slope: Array, scale: Array, dx: Array, chunk: int
) -> None:
    rows = x.shape[0]
    for k in range((rows + chunk - 1) // chunk):
        stop = rows - k * chunk
        start = max(stop - chunk, 0)
        part, gradients, out = x[start:stop], dy[start:stop], dx[start:stop]
        for i in range(part.shape[0]):
            a, g, b = part[i], gradients[i], out[i]
            for j in range(x.shape[1]):
                b[j] = ((g[j] - offset[j]) - (a[j] - mean[j]) * slope[j]) * scale[j]


@_compiled
def _input_gradient_first(
    dy: Array, x: Array, mean: Array, offset: Array, slope: Array, scale: Array, dx: Array, from_the_end: bool
) -> None:
    for n in range(x.shape[0]):
        at = x.shape[0] - 1 - n if from_the_end else n
        part, gradients, out = x[at], dy[at], dx[at]
        for j in range(x.shape[1]):
            a, g, b = part[j], gradients[j], out[j]
            m, c, k, s = mean[j], offset[j], slope[j], scale[j]
            for i in range(a.shape[0]):
                b[i] = ((g[i] - c) - (a[i] - m) * k) * s


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
            _moments_last(x[:, :, 0], pivot_C, total, squares)
        else:
            _moments_first(x, pivot_C, total, squares)
        return total, squares

    def normalize(self, x: Array, mean_C: Array, scale_C: Array, shift_C: Array) -> Array:
        """(x − mean)·scale + shift."""
        y = np.empty(x.shape, x.dtype)
        if x.shape[2] == 1:
            _normalize_last(x[:, :, 0], mean_C, scale_C, shift_C, y[:, :, 0], self._rows(x))
        else:
            _normalize_first(x, mean_C, scale_C, shift_C, y, self.from_the_end)
        return y

    def gradient_sums(self, dy: Array, x: Array, mean_C: Array) -> tuple[Array, Array]:
        """Σ dy and Σ dy·(x − mean), float64."""
        total, products = np.zeros(x.shape[1]), np.zeros(x.shape[1])
        if x.shape[2] == 1:
            _sums_last(dy[:, :, 0], x[:, :, 0], mean_C, total, products)
        else:
            _sums_first(dy, x, mean_C, total, products)
        return total, products

    def input_gradient(
        self, dy: Array, x: Array, mean_C: Array, offset_C: Array, slope_C: Array, scale_C: Array
    ) -> Array:
        """((dy − offset) − (x − mean)·slope)·scale."""
        dx = np.empty(x.shape, x.dtype)
        vectors = (mean_C, offset_C, slope_C, scale_C)
        if x.shape[2] == 1:
            _input_gradient_last(dy[:, :, 0], x[:, :, 0], *vectors, dx[:, :, 0], self._rows(x))
        else:
            _input_gradient_first(dy, x, *vectors, dx, self.from_the_end)
        return dx

    def _rows(self, x: Array) -> int:
        """Rows per chunk; one chunk is the walk from the beginning."""
        return max(1, _CHUNK // int(x.shape[1])) if self.from_the_end else int(x.shape[0])
