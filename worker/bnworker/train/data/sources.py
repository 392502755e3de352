"""Which files a data set is made of; nothing is opened here.

A folder holds shards of one kind, in the order of their names:

* `NAME.npz`, each with the arrays x and y, and maybe x_test and y_test;
* `x-NAME.npy` with `y-NAME.npy`, and maybe `x_test-NAME.npy` with `y_test-NAME.npy`.

Other files, hidden ones and folders within are not looked at.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bnworker.train.data.arrays import Array, open_npy, open_npz
from bnworker.train.data.files import File
from bnworker.train.data.problem import DataError

REQUIRED = ("x", "y")
OPTIONAL = ("x_test", "y_test")


@dataclass(frozen=True, slots=True)
class Source:
    """A shard that was found.

    Attributes:
        where: for messages: the file, or the file of x.
        size: of its files together, in bytes.
        paths: one .npz, or a .npy of each array, by the array's name.
        archive: whether it is a .npz.
    """

    where: str
    size: int
    paths: dict[str, Path]
    archive: bool

    def open(self) -> dict[str, Array]:
        """Its arrays by name, x and y among them.

        Raises:
            DataError: they cannot be read.
        """
        if self.archive:
            return open_npz(self.paths["x"], REQUIRED, OPTIONAL)
        return open_npy(self.paths)


def found(name: str) -> tuple[Source, ...]:
    """The shards that a name on the command line stands for.

    Raises:
        DataError: there are none.
    """
    path = Path(name)
    if path.is_dir():
        return _folder(path)
    if path.suffix != ".npz":
        raise DataError(f"{name}: expected the name of a .npz file, or of a folder with shards.")
    return (_archive(path),)


def listing(seen: Iterable[tuple[str, int]]) -> int:
    """A number that two hosts share if they see shards of the same names and sizes, in whatever folder."""
    return zlib.crc32(repr([(Path(where).name, size) for where, size in seen]).encode())


def _folder(path: Path) -> tuple[Source, ...]:
    try:
        names = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".") and entry.is_file())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    archives = [name for name in names if name.endswith(".npz")]
    plain = [name for name in names if name.endswith(".npy")]
    if archives and plain:
        raise DataError(f"{path}: holds both .npz ({archives[0]}) and .npy ({plain[0]}); expected shards of one kind.")
    if archives:
        return tuple(_archive(path / name) for name in archives)
    if plain:
        return _pairs(path, plain)
    raise DataError(
        f"{path}: expected shards, NAME.npz, or x-NAME.npy with y-NAME.npy; found {len(names)} other files."
    )


def _archive(path: Path) -> Source:
    return Source(str(path), File.at(path).signature.size or 1, {"x": path}, archive=True)


def _pairs(folder: Path, names: list[str]) -> tuple[Source, ...]:
    shards: dict[str, dict[str, Path]] = {}
    for name in names:
        key, dash, shard = name.removesuffix(".npy").partition("-")
        if not dash or key not in REQUIRED + OPTIONAL:
            raise DataError(f"{folder / name}: expected the name x-NAME.npy, y-NAME.npy, x_test-… or y_test-….")
        shards.setdefault(shard, {})[key] = folder / name
    for shard, paths in shards.items():
        for key, other in (("x", "y"), ("y", "x"), ("x_test", "y_test"), ("y_test", "x_test")):
            if (key in paths or key in REQUIRED) and other not in paths:
                raise DataError(f"{folder / f'{other}-{shard}.npy'}: is missing; {_any(paths)} is there.")
    return tuple(
        Source(str(paths["x"]), sum(File.at(path).signature.size for path in paths.values()) or 1, paths, archive=False)
        for _, paths in sorted(shards.items())
    )


def _any(paths: dict[str, Path]) -> str:
    return next(iter(paths.values())).name
