"""The layer as a framework's host callbacks call it: arrays in, arrays out, nothing kept for the backward pass.

A framework that traces its programs (JAX, TensorFlow) owns the variables and what a call saves for its gradient: both
come with each call, as arrays. On the host stays what is no variable: the grids, and the enrolment with the ranks.

    forward     x, [gamma], [beta], moving statistics, [mask]     →   y, moving statistics, saved
    backward    x, [mask], dy, saved                              →   dx, dgamma, dbeta

`saved` holds the per-channel results of a call in one float64 matrix, which is exact: its integers are small. So a
framework may pull a call back twice, or never, and nothing is left behind here.

Where the moving statistics that come differ from those of the call before, they were set by hand, and all ranks must
have set them alike, as with `BatchNormalization.restore`.

Frameworks set the floating-point modes of their threads: TensorFlow and XLA round subnormal numbers to zero. Here they
are IEEE's for the length of a pass, or a rank's bits would depend on its framework.

No framework is imported here. Shape suffixes: C channels.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.collective import current
from bnlayer.dtypes import is_real
from bnlayer.kernels.results import BatchStatistics
from bnlayer.layer import BatchNormalization
from bnlayer.pullback import SavedTraining
from bnlayer.tiling import passes
from bnlayer.view import View

# Rows of `saved`: those of the statistics and their other vectors, what the centered input is multiplied by, the two
# corrections of renorm, the step.
_ROWS = 8
SAVED_ROWS = _ROWS + 4 + 4

_FENV_BYTES = 256  # more than any C library's fenv_t takes
_FE_DFL_ENV = ctypes.c_void_p(-1)  # in glibc and musl, on every processor


@runtime_checkable
class Reducing(Protocol):
    """The part of a world that reduces gradients; `bnworker.World` has it."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    def allreduce(self, arrays: Iterable[ArrayLike], op: Literal["sum", "max", "min"] = "sum") -> list[NDArray[Any]]:
        """Reduce arrays over all ranks."""


Reduction = Literal["mean", "sum"]


def policy_name(compute: str, variable: str) -> str:
    """The dtype policy of data and variables of two dtypes, by Keras's names.

    Raises:
        ValueError: no policy has these two.
    """
    if compute == variable:
        return compute
    if variable == "float32" and compute in ("float16", "bfloat16"):
        return f"mixed_{compute}"
    raise ValueError(
        f"Expected data and variables of one dtype, or float16 or bfloat16 data with float32 variables; received "
        f"{compute} data and {variable} variables."
    )


class HostLayer(BatchNormalization):
    """A synchronized layer whose variables and saved results belong to a framework.

    Its gamma and beta gradients are this rank's share: a framework's optimizer reduces all weights alike.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(synchronized=True, grad_reduction="local", **arguments)

    def expect(self, shape: Sequence[int]) -> None:
        """Build the layer for inputs of a shape, or check that they fit; exchanges nothing.

        Raises:
            ValueError: the shape contradicts the one that the layer was built for.
            RuntimeError: several ranks are announced, but no world was joined.
        """
        if not self.built:
            self.build(shape)
        self._pinned_axis(tuple(shape))
        self._in_force()

    def forward(
        self,
        x: NDArray[Any],
        weights: Sequence[NDArray[Any]],
        moving: Sequence[NDArray[Any]],
        mask: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...], NDArray[np.float64]]:
        """A training call.

        Args:
            x: the batch.
            weights: the values of gamma and beta, of those that the layer has.
            moving: of the moving statistics, in Keras's order.
            mask: as of a call.

        Returns:
            y, the moving statistics after the call, and what `pull_back` needs of the call, (SAVED_ROWS, C).

        Raises:
            ValueError, TypeError, RuntimeError, CollectiveError: as a call does.
        """
        self.expect(x.shape)
        with ieee_arithmetic():
            return self._forward(x, weights, moving, mask)

    def _forward(
        self, x: NDArray[Any], weights: Sequence[NDArray[Any]], moving: Sequence[NDArray[Any]], mask: Any
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...], NDArray[np.float64]]:
        for variable, value in zip((v for v in self._variables if v.trainable), weights, strict=True):
            variable.assign(value)
        for variable, value in zip(self._moving, moving, strict=True):
            # By their bits: a NaN equals itself, and 0 is not −0.
            if np.asarray(value, variable.dtype).tobytes() != variable.value.tobytes():
                variable.assign(value)
        y, saved = self._normalize(x, True, mask, True)
        assert isinstance(saved, SavedTraining)
        return y, tuple(variable.numpy() for variable in self._moving), _packed(saved)

    def pull_back(
        self, x: NDArray[Any], mask: NDArray[Any] | None, dy: NDArray[Any], saved: NDArray[np.float64]
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...]]:
        """The backward pass of a training call.

        Args:
            x, mask: the call's.
            dy: the gradient of its output.
            saved: what the call returned.

        Returns:
            The gradient of x, and those of the weights that the layer has, summed over this rank's rows.

        Raises:
            ValueError, TypeError, RuntimeError, CollectiveError: as `backward` does.
        """
        batch = self.dtype_policy.received(x, "inputs")
        view = View.of(batch, self._pinned_axis(batch.shape), mask)
        with ieee_arithmetic():
            dx, *gradients = self._pull(self._unpacked(view, saved), dy)
        return dx, tuple(gradient for gradient in gradients if gradient is not None)

    def _unpacked(self, view: View, saved: NDArray[np.float64]) -> SavedTraining:
        arithmetic = self.dtype_policy.arithmetic_dtype
        mean, pivot, reach, nonfinite, scale, r, d, step = saved[_ROWS:]
        kinds = arithmetic, arithmetic, np.dtype(np.int64), np.dtype(np.bool_)
        vectors = [v.astype(kind) for v, kind in zip((mean, pivot, reach, nonfinite), kinds, strict=True)]
        correction = (None, None) if self._renorm is None else (r, d)
        return SavedTraining(
            self._joined(),
            self._signature(),
            int(step[0]),
            view,
            passes().kernels.sample(view.x),
            BatchStatistics(np.ascontiguousarray(saved[:_ROWS]), *vectors),
            scale.astype(arithmetic),
            *correction,
        )


@contextmanager
def ieee_arithmetic() -> Iterator[None]:
    """The C library's default floating-point environment in this thread: to nearest, with subnormal numbers."""
    library, before = _libm(), ctypes.create_string_buffer(_FENV_BYTES)
    library.fegetenv(before)
    library.fesetenv(_FE_DFL_ENV)
    try:
        yield
    finally:
        library.fesetenv(before)


@cache
def _libm() -> ctypes.CDLL:
    return ctypes.CDLL(ctypes.util.find_library("m") or "libm.so.6")


def _packed(saved: SavedTraining) -> NDArray[np.float64]:
    packed = np.zeros((SAVED_ROWS, saved.scale_C.shape[0]))
    rows, *vectors = saved.statistics
    for row, vector in zip(packed, [*rows, *vectors, saved.scale_C, saved.r_C, saved.d_C, saved.step], strict=True):
        row[:] = 0.0 if vector is None else vector
    return packed


def allreduce(arrays: Sequence[NDArray[Any]], op: Reduction) -> list[NDArray[Any]]:
    """Sums, or means, of arrays over the ranks of the current world, of the dtypes that came in.

    Raises:
        ValueError: op is neither.
        RuntimeError: several ranks are announced, but no world was joined; or the world can't reduce.
        CollectiveError: the ranks disagree, or one is lost.
    """
    world = reducing(op)
    if world is None:
        return list(arrays)
    totals = world.allreduce(arrays)
    if op == "sum":
        return totals
    return [(total / np.asarray(world.world_size, total.dtype)).astype(total.dtype) for total in totals]


def reducing(op: Reduction) -> Reducing | None:
    """The current world, where it has several ranks; None for a world of one.

    Raises:
        ValueError, RuntimeError: as `allreduce`.
    """
    if op not in ("mean", "sum"):
        raise ValueError(f"op: expected 'mean' or 'sum', received {op!r}.")
    world = current()
    if world.world_size == 1:
        return None
    if not isinstance(world, Reducing):
        raise RuntimeError(f"Expected a world that reduces arrays, as bnworker.join() makes it; received {world!r}.")
    return world


def check_float(dtype: np.dtype[Any], what: str) -> None:
    """Refuse data that has no gradient.

    Raises:
        TypeError: the dtype is not a float's.
    """
    if not is_real(dtype) or dtype.kind in "iub":
        raise TypeError(f"Expected {what} of a float dtype, received {dtype}.")
