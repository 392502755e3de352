"""The labels of a data set, and which output of a model stands for which label.

The K classes are the distinct labels of the training rows, ascending: output k stands for `labels[k]`. So labels from
1 to 5 make five classes, not six of which one is empty. Checkpoints contain the labels, and output shows them wherever
output k does not stand for label k.

Shape suffixes: N rows, K classes, P labels from 0 to the greatest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bnworker.train.data.problem import DataError, Ranks
from bnworker.train.data.shards import Rows, Shard

_LISTED = 8  # labels in a line


def distinct(world: Ranks | None, labels_of_rank: list[NDArray[np.int64]], greatest: int) -> tuple[int, ...]:
    """The labels that occur on any rank, ascending; every rank calls it.

    Args:
        world: the ranks; None: this process has all labels.
        labels_of_rank: this rank's labels.
        greatest: the greatest label on any rank; -1: there are no labels.
    """
    occurs_P = np.zeros(greatest + 1, np.uint8)
    for labels_N in labels_of_rank:
        occurs_P[labels_N] = 1
    if world is not None and len(occurs_P):
        (occurs_P,) = world.allreduce([occurs_P], "max")
    return tuple(np.flatnonzero(occurs_P).tolist())


def numbered(shard: Shard, labels: tuple[int, ...], whose: str) -> Shard:
    """Replace each label of a shard by the number of its class.

    Args:
        shard: with labels as they are stored.
        labels: ascending; a label's index is the number of its class.
        whose: whose labels they are, for the error message.

    Raises:
        DataError: a row has another label.
    """
    labels_K = np.array(labels, np.int64)
    tests = None if shard.tests is None else _numbered(shard.tests, labels_K, whose)
    return Shard(_numbered(shard.given, labels_K, whose), tests)


def are_numbers(labels: tuple[int, ...]) -> bool:
    """Whether output k stands for label k."""
    return labels == tuple(range(len(labels)))


def spelled(labels: tuple[int, ...]) -> str:
    """Labels as text: "0 to 9", or "1, 3, 7"."""
    if len(labels) > 2 and labels[-1] - labels[0] == len(labels) - 1:
        return f"{labels[0]} to {labels[-1]}"
    shown = ", ".join(map(str, labels[:_LISTED]))
    return f"{shown} and {len(labels) - _LISTED:,} more" if len(labels) > _LISTED else shown


def _numbered(rows: Rows, labels_K: NDArray[np.int64], whose: str) -> Rows:
    classes_N = np.searchsorted(labels_K, rows.y_N)
    valid_N = classes_N < len(labels_K)
    valid_N[valid_N] = labels_K[classes_N[valid_N]] == rows.y_N[valid_N]
    wrong = np.flatnonzero(~valid_N)
    if len(wrong):
        key = "y_test" if rows.x.key == "x_test" else "y"
        raise DataError(
            f"{rows.x.where}: row {wrong[0]} of {key}: label {rows.y_N[wrong[0]]}; expected "
            f"{spelled(tuple(labels_K.tolist()))}, the labels of {whose}."
        )
    return Rows(rows.x, classes_N.astype(np.int64))
