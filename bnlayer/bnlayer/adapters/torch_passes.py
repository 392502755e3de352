"""The passes over a batch that lies on a device of torch's: the reference kernels, operation by operation, as tensors.

Every operation is one of IEEE arithmetic on float32, float64 or int64, and sums are of integers, which have no order on
a device either. So the limbs have the same bits as on the host, and only they, a few numbers a channel, visit it.

Shape suffixes: C channels; batches are (A, C, B), and what belongs to a channel is (C, 1) on the device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnlayer.grid import BackwardGrid, Grid
from bnlayer.limbs import LOW, carried, flags
from bnlayer.precision import Precision, exponent_above, power_of_two
from bnlayer.view import View

_AT_ONCE = 2**22  # elements: a dozen float64 temporaries of them take 400 MB
_SPLITTER = 134_217_729.0  # 2^27 + 1: Veltkamp's constant, as in bnlayer.limbs
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


class DeviceView(View):
    """A batch as a tensor of (A, C, B)."""

    __slots__ = ()

    x: Any
    mask: Any

    @property
    def passes(self) -> Any:
        """The functions of this module."""
        return sys.modules[__name__]


def probe(view: DeviceView, grid: Grid) -> NDArray[np.int64]:
    """As `bnlayer.tiling.Passes.probe`."""
    precision = grid.precision
    best = np.full((2, view.x.shape[1]), precision.no_key, np.int64)
    for at in _pieces(view):
        x, mask = _values(view, at, precision), _truths(view, at)
        live = torch.isfinite(x) if mask is None else torch.isfinite(x) & mask
        for side, signed in enumerate((x, -x)):
            keys = _keys(torch.where(live, signed, -torch.inf), precision).amax((0, 2))
            best[side] = np.maximum(best[side], keys.cpu().numpy())
    return best


def moments(view: DeviceView, grid: Grid) -> NDArray[np.int64]:
    """As `bnlayer.tiling.Passes.moments`."""
    precision, device = grid.precision, view.x.device
    deviations = _Sum(_signed(grid.exponent_C + precision.slack, precision.folds), device)
    squares = _Sum(_positive(grid.exponent_C, precision.folds), device)
    pivot, window = _channels(grid.pivot_C, device), _channels(grid.window_C, device)
    count = torch.zeros(view.x.shape[1], dtype=torch.int64, device=device)
    out_of_range, not_finite = (torch.zeros_like(count, dtype=torch.bool) for _ in range(2))
    for at in _pieces(view):
        x, mask = _values(view, at, precision), _truths(view, at)
        d, finite = x.double() - pivot, torch.isfinite(x)
        fits = d.abs() < window
        counted = torch.ones_like(finite) if mask is None else mask.expand(finite.shape)
        count += counted.sum((0, 2))
        out_of_range |= (counted & finite & ~fits).any(2).any(0)
        not_finite |= (counted & ~finite).any(2).any(0)
        d = torch.where(counted & finite & fits, d, 0.0)
        deviations.add_values(d)
        squares.add_squares(d)
    raised = flags(out_of_range.cpu().numpy(), not_finite.cpu().numpy())
    return np.stack([*deviations.limbs, *squares.limbs, count.cpu().numpy(), raised])


def normalize(
    view: DeviceView,
    mean_C: NDArray[Any],
    scale_C: NDArray[Any],
    shift_C: NDArray[Any],
    nonfinite_C: NDArray[np.bool_],
    dtype: np.dtype[Any],
) -> Any:
    """As `bnlayer.tiling.Passes.normalize`."""
    device, kind = view.x.device, _DTYPES[mean_C.dtype.name]
    mean, scale, shift = (_channels(vector, device) for vector in (mean_C, scale_C, shift_C))
    y = torch.empty_like(view.x, dtype=_DTYPES[dtype.name])
    for at in _pieces(view):
        y[at] = (view.x[at].to(kind) - mean) * scale + shift
    return _with_nan(y, nonfinite_C)


def gradient_probe(dy: DeviceView, view: DeviceView, pivot_C: NDArray[Any], grid: BackwardGrid) -> NDArray[np.int64]:
    """As `bnlayer.tiling.Passes.gradient_probe`."""
    precision = grid.precision
    best = np.full((2, view.x.shape[1]), precision.lowest, np.int64)
    pivot = _channels(pivot_C, view.x.device)
    for at in _pieces(view):
        factors = _factors(_values(dy, at, precision), _values(view, at, precision), pivot)
        for side, values in enumerate(factors):
            largest = values.abs().amax((0, 2)).cpu().numpy()
            best[side] = np.maximum(best[side], exponent_above(largest, precision.lowest))
    return best


def gradient_sums(
    dy: DeviceView, view: DeviceView, pivot_C: NDArray[Any], grid: BackwardGrid, *, fits: bool = False
) -> NDArray[np.int64]:
    """As `bnlayer.tiling.Passes.gradient_sums`."""
    del fits
    precision, device = grid.precision, view.x.device
    wide = grid.gradient_C + precision.gradient_slack
    gradients = _Sum(_signed(wide, precision.folds), device)
    products = _Sum(_signed(wide + grid.deviation_C, precision.folds), device)
    window, reach = (_channels(power_of_two(e), device) for e in (grid.gradient_C, grid.deviation_C))
    small = _channels(power_of_two(grid.gradient_C - precision.gradient_span), device)
    pivot = _channels(pivot_C, device)
    seen = torch.zeros((4, view.x.shape[1]), dtype=torch.bool, device=device)
    for at in _pieces(view):
        block, mask = _values(dy, at, precision), _truths(view, at)
        g, h = _factors(block, _values(view, at, precision), pivot)
        outside = (g.abs() >= window) | (h.abs() >= reach)
        bad = ~torch.isfinite(block) if mask is None else ~torch.isfinite(block) & mask
        large, some = g.abs() >= small, g != 0
        seen |= torch.stack([each.any(2).any(0) for each in (outside, bad, large, some)])
        g, h = torch.where(outside, 0.0, g), torch.where(outside, 0.0, h)
        gradients.add_values(g)
        products.add_values(g * h)
    outside, bad, large, some = seen.cpu().numpy()
    return np.stack([*gradients.limbs, *products.limbs, flags(outside, bad), flags(large, some)])


def input_gradient(
    dy: DeviceView,
    view: DeviceView,
    mean_C: NDArray[Any],
    offset_C: NDArray[Any],
    slope_C: NDArray[Any],
    scale_C: NDArray[Any],
    nonfinite_C: NDArray[np.bool_],
    dtype: np.dtype[Any],
) -> Any:
    """As `bnlayer.tiling.Passes.input_gradient`."""
    device, kind = view.x.device, _DTYPES[mean_C.dtype.name]
    mean, offset, slope, scale = (_channels(vector, device) for vector in (mean_C, offset_C, slope_C, scale_C))
    dx = torch.empty_like(view.x, dtype=_DTYPES[dtype.name])
    for at in _pieces(view):
        g, mask = dy.x[at].to(kind), _truths(view, at)
        unmasked = (g - offset) - (view.x[at].to(kind) - mean) * slope
        dx[at] = (unmasked if mask is None else torch.where(mask, unmasked, g)) * scale
    return _with_nan(dx, nonfinite_C)


class _Sum:
    """A running exact sum, [hi, lo] per fold; the terms are those of `bnlayer.kernels.reference`."""

    def __init__(self, magics: list[NDArray[np.float64]], device: Any) -> None:
        self._magics = [_channels(magic, device) for magic in magics]
        self._units = [_channels(np.spacing(magic), device) for magic in magics]
        self.limbs = [np.zeros(magics[0].shape, np.int64) for _ in range(2 * len(magics))]

    def add_values(self, v: Any) -> None:
        q, rest = self._rounded(v, 0)
        if len(self._magics) == 1:
            tie = rest.abs() * 2 == self._units[0]
            self._add(0, q + ((tie & (rest > 0) & (v < 0)).long() - (tie & (rest < 0) & (v > 0)).long()))
        else:
            self._add(0, q)
            self._add(2, self._rounded(rest, 1)[0])

    def add_squares(self, d: Any) -> None:
        square, error = d * d, _square_error(d)
        q, rest = self._rounded(square, 0)
        if len(self._magics) == 1:
            tie = rest.abs() * 2 == self._units[0]
            self._add(0, q + ((tie & (rest > 0) & (error > 0)).long() - (tie & (rest < 0) & (error < 0)).long()))
        else:
            self._add(0, q)
            self._add(2, self._rounded(rest + error, 1)[0])

    def _rounded(self, v: Any, fold: int) -> tuple[Any, Any]:
        """v in units of the magic number's last place, and what was rounded away."""
        magic = self._magics[fold]
        shifted = v + magic
        return shifted.view(torch.int64) - magic.view(torch.int64), v - (shifted - magic)

    def _add(self, at: int, q: Any) -> None:
        hi, lo = torch.stack([(q >> 32).sum((0, 2)), (q & LOW).sum((0, 2))]).cpu().numpy()
        self.limbs[at], self.limbs[at + 1] = carried(self.limbs[at] + hi, self.limbs[at + 1] + lo)


def _signed(exponent: NDArray[np.int64], folds: int) -> list[NDArray[np.float64]]:
    first = 3.0 * power_of_two(exponent)
    return [first, np.ldexp(first, -52)][:folds]


def _positive(exponent: NDArray[np.int64], folds: int) -> list[NDArray[np.float64]]:
    return [power_of_two(2 * exponent), 1.5 * power_of_two(2 * exponent - 51)][:folds]


def _square_error(d: Any) -> Any:
    big = _SPLITTER * d
    hi = big - (big - d)
    lo = d - hi
    return lo * lo - (((d * d - hi * hi) - lo * hi) - hi * lo)


def _factors(dy: Any, x: Any, pivot: Any) -> tuple[Any, Any]:
    d = x - pivot
    g = torch.where(torch.isfinite(dy), dy, 0).double()
    return g, torch.where((g != 0) & torch.isfinite(d), d, 0).double()


def _keys(x: Any, precision: Precision) -> Any:
    bits = x.contiguous().view(torch.int32 if precision.folds == 1 else torch.int64).long()
    return bits ^ ((bits >> 63) & precision.sign)


def _with_nan(y: Any, nonfinite_C: NDArray[np.bool_]) -> Any:
    if nonfinite_C.any():
        y[:, torch.from_numpy(np.flatnonzero(nonfinite_C)).to(y.device)] = torch.nan
    return y


def _pieces(view: DeviceView) -> Iterator[slice]:
    """The pieces of a batch, along A; none of an empty one."""
    rows, size = view.x.shape[0], view.x.numel()
    step = max(1, _AT_ONCE * rows // max(1, size))
    return (slice(at, at + step) for at in range(0, rows if size else 0, step))


def _values(view: DeviceView, at: slice, precision: Precision) -> Any:
    return view.x[at].to(_DTYPES[precision.name])


def _truths(view: DeviceView, at: slice) -> Any:
    return None if view.mask is None else view.mask[at]


def _channels(vector: NDArray[Any], device: Any) -> Any:
    return torch.from_numpy(np.ascontiguousarray(vector)).to(device)[:, None]
