"""What all ranks know about all shards, exchanged between the ranks that opened them.

Shape suffixes: M shards, K columns of the exchanged table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnworker.train.data.problem import DataError, Ranks
from bnworker.train.data.shards import Shard

_NOTHING = -1  # below every value: the maximum over the ranks is the value of the rank that has one
# The columns of the exchanged table.
_ROWS, _TESTS, _FEATURES, _DTYPE, _GREATEST, _FINGERPRINT, _COLUMNS = range(7)


@dataclass(frozen=True, eq=False)
class Manifest:
    """Properties of a data set whose shards fit together.

    Attributes:
        rows_M: rows of every shard, without given test rows.
        tests_M: given test rows of every shard.
        has_tests: whether test rows are given.
        features: D.
        greatest_label: of the training rows; -1: there are none.
        fingerprint: of all shards, in hexadecimal.
    """

    rows_M: NDArray[np.int64]
    tests_M: NDArray[np.int64]
    has_tests: bool
    features: int
    greatest_label: int
    fingerprint: str


def exchanged(
    world: Ranks | None, opened: Mapping[int, Shard], names: Sequence[str], *, fingerprinted: bool = True
) -> Manifest:
    """Exchange what the ranks found in their shards.

    Args:
        world: the ranks; None: this process opened all.
        opened: the shards that this rank opened, by number.
        names: of all shards.
        fingerprinted: whether to compute the fingerprint, for which some features are read.

    Raises:
        DataError: on every rank: shards do not fit together.
    """
    table_MK = np.full((len(names), _COLUMNS), _NOTHING, np.int64)
    for number, shard in opened.items():
        table_MK[number] = _described(shard, shard.fingerprint if fingerprinted else 0)
    if world is not None:
        (table_MK,) = world.allreduce([table_MK], "max")
    for column, what in ((_FEATURES, "features a row"), (_DTYPE, "as the features' dtype")):
        _same(table_MK, column, what, names)
    with_tests = table_MK[:, _TESTS] != _NOTHING
    if with_tests.any() and not with_tests.all():
        there, lacks = names[int(with_tests.argmax())], names[int(with_tests.argmin())]
        raise DataError(f"{lacks}: holds no test rows, and {there} does; expected them in every shard, or in none.")
    return Manifest(
        rows_M=table_MK[:, _ROWS],
        tests_M=table_MK[:, _TESTS],
        has_tests=bool(with_tests.any()),
        features=int(table_MK[0, _FEATURES]),
        greatest_label=int(table_MK[:, _GREATEST].max()),
        fingerprint=hashlib.sha256(table_MK[:, _FINGERPRINT].astype("<i8").tobytes()).hexdigest(),
    )


def _described(shard: Shard, fingerprint: int) -> list[int]:
    x, labels = shard.given.x, shard.given.y_N
    # An empty array is of NumPy's default dtype more often than of one that was chosen.
    dtype = _NOTHING if not len(labels) else ord(x.dtype.kind) * 256 + x.dtype.itemsize
    return [
        len(labels),
        _NOTHING if shard.tests is None else len(shard.tests.y_N),
        shard.given.features,
        dtype,
        int(labels.max(initial=_NOTHING)),
        fingerprint,
    ]


def _same(table_MK: NDArray[np.int64], column: int, what: str, names: Sequence[str]) -> None:
    """Check that a property is the same for all shards that have it."""
    (asked,) = np.nonzero(table_MK[:, column] != _NOTHING)
    values = table_MK[asked, column]
    if (values != values[:1]).any():
        other = int((values != values[0]).argmax())
        shown = [_shown(int(value), column) for value in (values[other], values[0])]
        raise DataError(
            f"{names[asked[other]]}: has {shown[0]} {what}, and {names[asked[0]]} has {shown[1]}; expected the same in "
            "every shard."
        )


def _shown(value: int, column: int) -> Any:
    return np.dtype(f"{chr(value // 256)}{value % 256}").name if column == _DTYPE else value
