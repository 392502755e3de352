"""A shard that this rank reads: its arrays fit together, its labels are in memory, its features are read as needed.

Shape suffixes: N rows, B rows of one read, D features.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnworker.train.data.arrays import Array
from bnworker.train.data.batches import Indices
from bnworker.train.data.problem import DataError

CLASSES_AT_MOST = 65_536  # each label is an output of the model: a larger number can't be a label
_BRIGHTEST = 255.0  # uint8 features are pixels
_SAMPLED = 16  # rows of a shard that its fingerprint covers


@dataclass(frozen=True, eq=False)
class Rows:
    """Features in a file, and their labels in memory.

    Attributes:
        x: (N, …).
        y_N: int64, at least 0: labels as stored, or class numbers.
    """

    x: Array
    y_N: NDArray[np.int64]

    @property
    def features(self) -> int:
        """D, the number of values in a row."""
        return math.prod(self.x.shape[1:])

    def read(self, indices_B: Indices, dtype: str) -> NDArray[Any]:
        """Read some rows, (B, D); uint8 is divided by 255, other dtypes are converted without scaling.

        Raises:
            DataError: a value is not finite in `dtype`, or the rows cannot be read.
        """
        raw_BD = self.x.rows(indices_B)
        with np.errstate(over="ignore"):  # found below, with its row
            x_BD = raw_BD.astype(dtype)
        if raw_BD.dtype == np.uint8:
            x_BD /= _BRIGHTEST
        if raw_BD.dtype.kind == "f" and not np.isfinite(x_BD).all():
            row, feature = np.argwhere(~np.isfinite(x_BD))[0].tolist()
            value = raw_BD[row, feature]
            why = f"does not fit {dtype}" if np.isfinite(value) else "expected a finite number"
            raise DataError(
                f"{self.x.where}: row {indices_B[row]} of {self.x.key}: feature {feature} is {value}; {why}."
            )
        return x_BD


@dataclass(frozen=True, eq=False)
class Shard:
    """A shard that was opened and checked, except for its features.

    Attributes:
        given: the training rows; they include the test rows if those are not given separately.
        tests: test rows that are given separately; None: there are none.
    """

    given: Rows
    tests: Rows | None

    @property
    def fingerprint(self) -> int:
        """A hash of 63 bits over the shape, the labels and some rows; independent of the file format."""
        seen = hashlib.sha256()
        for rows in (self.given, self.tests):
            if rows is None:
                continue
            seen.update(repr((len(rows.y_N), rows.features, rows.x.dtype.name)).encode())
            seen.update(rows.y_N.astype("<i8").tobytes())
            if len(rows.y_N):
                looked_at = np.linspace(0, len(rows.y_N) - 1, _SAMPLED).astype(np.intp)
                seen.update(rows.x.rows(looked_at).astype("<f8").tobytes())
        return int.from_bytes(seen.digest()[:8]) >> 1


def shard(arrays: Mapping[str, Array]) -> Shard:
    """Build a shard from its arrays.

    Raises:
        DataError: they do not fit together, or a label is invalid.
    """
    given = _rows(arrays["x"], arrays["y"])
    if ("x_test" in arrays) != ("y_test" in arrays):
        there, lacks = ("x_test", "y_test") if "x_test" in arrays else ("y_test", "x_test")
        raise DataError(f"{arrays[there].where}: holds {there}, but no {lacks}; expected both, or neither.")
    if "x_test" not in arrays:
        return Shard(given, None)
    tests = _rows(arrays["x_test"], arrays["y_test"])
    if (tests.features, tests.x.dtype) != (given.features, given.x.dtype):
        raise DataError(
            f"{tests.x.where}: x_test holds {tests.features} features of {tests.x.dtype}, x holds {given.features} "
            f"of {given.x.dtype}; expected the same."
        )
    return Shard(given, tests)


def _rows(x: Array, y: Array) -> Rows:
    if len(x.shape) < 2 or 0 in x.shape[1:]:
        raise DataError(
            f"{x.where}: {x.key} is of shape {x.shape}; expected (rows, features), with at least one feature."
        )
    if len(y.shape) != 1:
        hint = f": {y.key}.argmax(axis=1)" if len(y.shape) == 2 and y.shape[1] > 1 else f": {y.key}.reshape(-1)"
        raise DataError(f"{y.where}: {y.key} is of shape {y.shape}; expected (rows,), a label for each row{hint}.")
    if x.shape[0] != y.shape[0]:
        raise DataError(
            f"{x.where}: {x.key} has {x.shape[0]:,} rows, and {y.key} has {y.shape[0]:,}; expected as many."
        )
    return Rows(x, _labels(y))


def _labels(y: Array) -> NDArray[np.int64]:
    raw_N = y.rows(np.arange(y.shape[0])).reshape(-1)
    with np.errstate(invalid="ignore"):  # NaN compares false, and is found here
        right_N = (raw_N >= 0) & (raw_N < CLASSES_AT_MOST)
        if raw_N.dtype.kind == "f":
            right_N &= raw_N == np.floor(raw_N)
    wrong = np.flatnonzero(~right_N)
    if len(wrong):
        raise DataError(
            f"{y.where}: row {wrong[0]} of {y.key}: label {raw_N[wrong[0]]}; expected an integer from 0 to "
            f"{CLASSES_AT_MOST - 1:,}."
        )
    return raw_N.astype(np.int64)
