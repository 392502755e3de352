"""Data sets, and which rows a step takes.

Laws of this room:
1. The split into training and test rows depends on the data alone: runs with other seeds are judged alike.
2. The rows of a step depend on (seed, epoch, step) alone, never on the number of ranks.
3. Every row is used once an epoch: the last batch takes what is left.

Shape suffixes: N rows, D features, B rows of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SPLIT_SEED = 1797  # any fixed number would do; this one is the number of rows
_TEST_SHARE = 0.2
_BRIGHTEST = 16.0  # a pixel of the digits is an integer from 0 to 16

ACCEPTED = "digits (scikit-learn's 1,797 handwritten digits of 8 x 8 pixels)"


class DataError(ValueError):
    """The data cannot be had; the text says what is accepted, or what to install."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Rows to train on, and rows to judge by.

    Attributes:
        name: as given to `--data`.
        train_x, test_x: (N, D), of the dtype asked for.
        train_y, test_y: (N,) int64, from 0 to classes − 1.
        classes: how many there are.
    """

    name: str
    train_x: NDArray[Any]
    train_y: NDArray[np.int64]
    test_x: NDArray[Any]
    test_y: NDArray[np.int64]
    classes: int

    @property
    def features(self) -> int:
        """D."""
        return int(self.train_x.shape[1])

    @property
    def rows(self) -> int:
        """How many rows there are to train on."""
        return len(self.train_y)


def check(name: str) -> None:
    """Make sure that a data set is one of those accepted, before anything is loaded or started.

    Raises:
        DataError: it is not.
    """
    if name != "digits":
        raise DataError(f"--data: received {name!r}; this version accepts {ACCEPTED}.")


def load(name: str, dtype: str = "float32") -> Dataset:
    """Load a data set.

    Args:
        name: "digits".
        dtype: of the features, "float32" or "float64".

    Raises:
        DataError: the name is unknown, or the package that holds the data is not installed.
    """
    check(name)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "--data digits comes with scikit-learn, which is not installed. Install it: pip install 'bnlayer[digits]'."
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    x, y = (pixels / _BRIGHTEST).astype(dtype), labels.astype(np.int64)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(y))
    tested, trained = np.split(order, [round(_TEST_SHARE * len(y))])
    return Dataset(name, x[trained], y[trained], x[tested], y[tested], classes=10)


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """How many batches hold all rows: ⌈rows / batch size⌉."""
    return -(-rows // batch_size)


def epoch_batches(rows: int, batch_size: int, seed: int, epoch: int) -> list[NDArray[np.intp]]:
    """The global batches of an epoch: indices of the rows that all ranks together take, step by step.

    Args:
        rows: how many there are.
        batch_size: of all ranks together; the last batch may be smaller.
        seed, epoch: what the order depends on, together with `rows`.

    Returns:
        One array of indices per step; together they hold every row once.
    """
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return np.split(order, range(batch_size, rows, batch_size))
