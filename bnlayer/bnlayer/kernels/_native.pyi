"""The extension module: see `native/module.cpp`. Arrays are in one piece, and of the shapes that `reference` says.

Shape suffixes: A axes before the channels, C channels, B axes after them, W limbs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[Any]
_Truths = NDArray[np.bool_]
_Long = NDArray[np.int64]
_Double = NDArray[np.float64]
_Single = NDArray[np.float32]
_Bytes = NDArray[np.uint8]

def variants() -> list[str]: ...
def compiled() -> list[str]: ...
def probe(variant: int, threads: int, worth: int, x: _Array, mask: _Truths | None, best: _Long, /) -> None: ...
def moments(
    variant: int, threads: int, worth: int, x: _Array, mask: _Truths | None, pivot: _Double, exponent: _Long,
    limbs: _Long, /,
) -> None: ...  # fmt: skip
def normalize(
    variant: int, threads: int, worth: int, x: _Array, mean: _Array, scale: _Array, shift: _Array, nonfinite: _Truths,
    y: _Array, /,
) -> None: ...  # fmt: skip
def gradient_probe(
    variant: int, threads: int, worth: int, x: _Array, dy: _Array, pivot: _Array, best: _Long, /
) -> None: ...
def gradient_sums(
    variant: int, threads: int, worth: int, x: _Array, dy: _Array, mask: _Truths | None, pivot: _Array, gradient: _Long,
    deviation: _Long, fits: bool, limbs: _Long, /,
) -> None: ...  # fmt: skip
def input_gradient(
    variant: int, threads: int, worth: int, x: _Array, dy: _Array, mask: _Truths | None, mean: _Array, offset: _Array,
    slope: _Array, scale: _Array, nonfinite: _Truths, dx: _Array, /,
) -> None: ...  # fmt: skip
def statistics(
    variant: int, limbs: _Long, pivot: _Double, exponent: _Long, epsilon: float, e: float, rows: _Double,
    singles: _Single, reach: _Long, flags: _Truths, /,
) -> bool: ...  # fmt: skip
def moved(
    variant: int, rows: _Double, nonfinite: _Truths, old_mean: _Single, old_variance: _Single, momentum: float,
    synchronized: bool, masked: bool, unbiased: bool, new: _Single, /,
) -> None: ...  # fmt: skip
def coefficients(
    variant: int, rows: _Double, gamma: _Single | None, beta: _Single | None, made: _Single, /
) -> None: ...
def gradients(
    variant: int, limbs: _Long, gradient: _Long, deviation: _Long, forward: _Double, forward_nonfinite: _Truths,
    rows: _Double, singles: _Single, flags: _Truths, /,
) -> bool: ...  # fmt: skip
def finish_forward(
    variant: int, threads: int, worth: int, x: _Array, limbs: _Long, pivot: _Double, exponent: _Long,
    epsilon: float, e: float, accepted: bool, gamma: _Single | None, beta: _Single | None, old_mean: _Single,
    old_variance: _Single, momentum: float, synchronized: bool, unbiased: bool, new_mean: _Single,
    new_variance: _Single, record: _Bytes, y: _Array, /,
) -> bool: ...  # fmt: skip
def finish_backward(
    variant: int, threads: int, worth: int, x: _Array, dy: _Array, mask: _Truths | None, limbs: _Long | None,
    gradient: _Long, deviation: _Long, accepted: bool, forward: _Double, forward_nonfinite: _Truths, mean: _Single,
    scale: _Single, rows: _Double, singles: _Single, flags: _Truths, dx: _Array, /,
) -> bool: ...  # fmt: skip
def train_alone(
    variant: int, threads: int, worth: int, x: _Array, pivot: _Double, exponent: _Long, epsilon: float,
    gamma: _Single | None, beta: _Single | None, old_mean: _Single, old_variance: _Single, momentum: float,
    synchronized: bool, unbiased: bool, new_mean: _Single, new_variance: _Single, record: _Bytes, y: _Array, /,
) -> bytes | None: ...  # fmt: skip
def pull_alone(
    variant: int, threads: int, worth: int, x: _Array, dy: _Array, mask: _Truths | None, seen: bytes | None,
    record: _Bytes, gradient: _Long, deviation: _Long, lowest: int, highest: int, gamma: _Single | None,
    beta: _Single | None, dx: _Array, /,
) -> bool: ...  # fmt: skip
def sample(x: _Array, /) -> bytes: ...
def forward_at(
    variant: int, threads: int, worth: int, a: int, c: int, b: int, x: int, y: int, affine: bool, gamma: int, beta: int,
    mean: int, variance: int, calls: int, pivot: _Double, exponent: _Long, epsilon: float, momentum: float,
    unbiased: bool, before: _Bytes, record: _Bytes, /,
) -> bool: ...  # fmt: skip
def backward_at(
    variant: int, threads: int, worth: int, a: int, c: int, b: int, x: int, dy: int, dx: int, gamma: int, beta: int,
    record: _Bytes, gradient: _Long, deviation: _Long, lowest: int, highest: int, /,
) -> bool: ...  # fmt: skip
