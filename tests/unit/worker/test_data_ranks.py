"""Ranks that read together: the same rows at every step for any number of them, each rank its own shards alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormalization
from bnworker.train.data import Batch, DataError, Dataset, from_arrays, load, raise_on_every_rank
from support.datasets import Reader, all_well, rows, together, write
from support.ranks import Meeting, run_all

WORLDS = [1, 2, 3, 5]
SHARDS = [[26], [20, 6], [5, 0, 17, 4]]


def loaded(world_size: int, folder: Path, **options: Any) -> list[Dataset]:
    """What each rank sees of a folder."""
    return all_well(together(world_size, lambda world: load(str(folder), world=world, **options)))


def steps(data: Sequence[Dataset], epoch: int = 1) -> list[list[Batch]]:
    """The batches of each step, by rank."""
    return [list(step) for step in zip(*(one.batches(6, 3, epoch) for one in data), strict=True)]


def numbers(batches: Sequence[Batch]) -> list[float]:
    """Which rows these are, of all shards."""
    return sorted(np.concatenate([batch.x[:, 0] for batch in batches]).tolist())


@pytest.mark.parametrize("kind", ["npz", "compressed", "npy"])
@pytest.mark.parametrize("sizes", SHARDS, ids=str)
def test_the_rows_of_a_step_do_not_depend_on_the_ranks(sizes: list[int], kind: Any, tmp_path: Path) -> None:
    """With more ranks than shards as well, over two epochs, the last step of an epoch included."""
    write(tmp_path, sizes, kind)
    seen = []
    for world_size in WORLDS:
        data = loaded(world_size, tmp_path, validation_split=0.2)
        taken = [numbers(step) for epoch in (1, 2) for step in steps(data, epoch)]
        evaluated = [
            numbers([batch for one in data for batch in part(one)]) for part in (Dataset.test, Dataset.validation)
        ]
        seen.append((taken, evaluated, {one.fingerprint for one in data}, {one.rows for one in data}))
        assert [{batch.rows for batch in step} for step in steps(data)] == [{5}, {6}, {6}]
    assert all(one == seen[0] for one in seen)
    taken, evaluated, *_ = seen[0]
    epoch = taken[: len(taken) // 2]
    assert sorted(row for group in epoch + evaluated for row in group) == list(range(26))
    assert taken[0] != taken[len(epoch)], "another epoch has another order"


def test_statistics_have_the_same_bits(tmp_path: Path) -> None:
    """What a layer sees of the steps is equal in every bit, however the shards are spread."""
    write(tmp_path, [5, 0, 17, 4])

    def statistics(world_size: int) -> list[bytes]:
        by_rank = [[batch.x for batch in one.batches(6, 3, 1)] for one in loaded(world_size, tmp_path)]

        def moving(rank: Any) -> list[bytes]:
            layer = BatchNormalization(synchronized=True, name="bn", collective=rank)
            for x in by_rank[rank.rank]:
                layer(x, training=True)
            return [np.asarray(weight).tobytes() for weight in (layer.moving_mean, layer.moving_variance)]

        first, *others = run_all(Meeting(world_size), moving)
        assert all(other == first for other in others)
        return first

    results = [statistics(world_size) for world_size in WORLDS]
    assert all(one == results[0] for one in results)


def test_a_rank_opens_its_own_shards_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading, training and judging: every file is opened by one rank, and each rank by name."""
    write(tmp_path, [8, 8, 8, 8, 8], "npy")
    opened: dict[str, set[str]] = {}
    real = os.open

    def counted(path: Any, *options: Any, **more: Any) -> int:
        opened.setdefault(threading.current_thread().name, set()).add(Path(path).name)
        return real(path, *options, **more)

    monkeypatch.setattr(os, "open", counted)

    def body(world: Reader) -> set[str]:
        data = load(str(tmp_path), world=world)
        for batch in (*data.batches(6, 3, 1), *data.test()):
            assert batch.problem is None
        return opened[threading.current_thread().name]

    assert all_well(together(3, body)) == [
        {"x-0.npy", "y-0.npy", "x-1.npy", "y-1.npy"},
        {"x-2.npy", "y-2.npy"},
        {"x-3.npy", "y-3.npy", "x-4.npy", "y-4.npy"},
    ]


@pytest.mark.parametrize("bad_rank", [0, 2])
def test_a_bad_shard_raises_on_every_rank(bad_rank: int, tmp_path: Path) -> None:
    """One rank alone can see it; all raise the same line."""
    write(tmp_path, [8, 8, 8])
    x, y = rows(8)
    y[5] = -2
    np.savez(tmp_path / f"{bad_rank}.npz", x=x, y=y)
    results = together(3, lambda world: load(str(tmp_path), world=world))
    expected = f"{tmp_path}/{bad_rank}.npz: row 5 of y: label -2; expected an integer from 0 to 65,535."
    assert [(type(one), str(one)) for one in results] == [(DataError, expected)] * 3


def test_a_bad_test_label_raises_on_every_rank(tmp_path: Path) -> None:
    """What is out of range is known when all shards are; its row is known to one rank."""
    for number in range(2):
        x, y = rows(6)
        labels = y.copy()
        labels[3] = 3 + number
        np.savez(tmp_path / f"{number}.npz", x=x, y=labels if not number else y, x_test=x, y_test=labels)
    results = together(2, lambda world: load(str(tmp_path), world=world))
    expected = f"{tmp_path}/1.npz: row 3 of y_test: label 4; expected 0 to 3, the labels of the rows to train on."
    assert [str(one) for one in results] == [expected] * 2


def test_a_bad_row_met_in_training(tmp_path: Path) -> None:
    """The rank that reads it goes on without rows, so that no rank waits for it; then all are told."""
    write(tmp_path, [12, 12])
    x, y = rows(12, 12)
    x[:, 1] = np.inf
    np.savez(tmp_path / "1.npz", x=x, y=y)

    def body(world: Reader) -> tuple[int, int]:
        data = load(str(tmp_path), world=world)
        batch = next(data.batches(6, 3, 1))
        assert (batch.problem is None) == (world.rank == 0)
        with pytest.raises(DataError, match=r"1\.npz: row \d+ of x: feature 1 is inf; expected a finite number\.$"):
            raise_on_every_rank(world, batch.problem)
        return len(batch.y), batch.rows

    assert all_well(together(2, body)) == [(2, 4), (0, 4)]


@pytest.mark.parametrize("world_size", WORLDS)
def test_classes_of_all_ranks(world_size: int, tmp_path: Path) -> None:
    """A rank sees some of the labels alone; its classes are numbered as everybody's."""
    for number, labels in enumerate(([9, 4] * 5, [], [7] * 10, [4, 2] * 5)):
        np.savez(tmp_path / f"{number}.npz", x=np.ones((len(labels), 2)) * np.array(labels)[:, None], y=labels)
    for data in loaded(world_size, tmp_path):
        assert data.labels == (2, 4, 7, 9)
        for batch in (*data.batches(6, 3, 1), *data.test()):
            assert np.array(data.labels)[batch.y].tolist() == batch.x[:, 0].tolist()


def test_hosts_that_see_other_files(tmp_path: Path) -> None:
    """Found before anything is opened; no exchange is out of step."""
    write(tmp_path / "0" / "data", [8, 8])
    write(tmp_path / "1" / "data", [8, 8, 8])
    results = together(2, lambda world: load(str(tmp_path / str(world.rank) / "data"), world=world))
    for rank, result in enumerate(results):
        assert str(result) == (
            f"--data {tmp_path}/{rank}/data: the ranks see different files (rank {rank} sees {rank + 2}); every host "
            "needs the same shards under the same names."
        )


def test_hosts_with_folders_of_their_own(tmp_path: Path) -> None:
    """The same shards under another path, on another file system, are the same data."""
    for rank in range(2):
        write(tmp_path / str(rank), [8, 8])
    data = all_well(together(2, lambda world: load(str(tmp_path / str(world.rank)), world=world)))
    assert len({one.fingerprint for one in data}) == 1


def test_arrays_in_memory_are_shared_out() -> None:
    """As the rows of a file are."""
    x, y = rows(26)
    alone = from_arrays("mine", x, y)
    shared: list[Dataset] = all_well(together(3, lambda world: from_arrays("mine", x, y, world=world)))
    for batch, *parts in zip(*(one.batches(6, 3, 1) for one in (alone, *shared)), strict=True):
        assert numbers([batch]) == numbers(parts)
        lengths = [len(part.y) for part in parts]
        assert max(lengths) - min(lengths) <= 1


def test_no_rank_has_a_problem() -> None:
    """One exchange, and nothing is raised."""

    def body(world: Reader) -> int:
        raise_on_every_rank(world, None)
        return world.table.exchanges

    assert all_well(together(3, body)) == [1, 1, 1]
