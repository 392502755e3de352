"""Which rows a step takes."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from bnworker.data import DataError, epoch_batches, load, steps_per_epoch


def test_every_row_once_an_epoch() -> None:
    """The last batch takes what is left; nothing is padded or dropped."""
    batches = epoch_batches(10, 4, seed=0, epoch=1)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert sorted(np.concatenate(batches).tolist()) == list(range(10))
    assert steps_per_epoch(10, 4) == 3
    assert steps_per_epoch(8, 4) == len(epoch_batches(8, 4, 0, 1)) == 2


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    """The same arguments give the same rows, in any process; others give others."""
    first = np.concatenate(epoch_batches(50, 7, seed=3, epoch=2))
    assert np.concatenate(epoch_batches(50, 7, seed=3, epoch=2)).tolist() == first.tolist()
    assert np.concatenate(epoch_batches(50, 7, seed=3, epoch=3)).tolist() != first.tolist()
    assert np.concatenate(epoch_batches(50, 7, seed=4, epoch=2)).tolist() != first.tolist()


def test_a_batch_larger_than_the_data() -> None:
    """One step takes all rows."""
    assert [len(batch) for batch in epoch_batches(5, 64, 0, 1)] == [5]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_digits(dtype: str) -> None:
    """The split is fixed, disjoint and complete."""
    data = load("digits", dtype)
    assert (data.train_x.shape, data.test_x.shape) == ((1438, 64), (359, 64))
    assert (data.train_x.dtype, data.train_y.dtype) == (np.dtype(dtype), np.dtype(np.int64))
    assert (data.features, data.rows, data.classes) == (64, 1438, 10)
    assert data.train_x.min() == 0
    assert data.train_x.max() == 1
    assert np.bincount(np.concatenate([data.train_y, data.test_y])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip
    assert data.test_y[:8].tolist() == load("digits").test_y[:8].tolist()


def test_unknown_data() -> None:
    """The error says what is accepted."""
    with pytest.raises(DataError) as raised:
        load("mnist")
    assert str(raised.value) == (
        "--data: received 'mnist'; this version accepts digits (scikit-learn's 1,797 handwritten digits of 8 x 8 "
        "pixels)."
    )


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra."""
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"Install it: pip install 'bnlayer\[digits\]'"):
        load("digits")
