"""The files of a data set; nothing is opened here.

A folder contains shards of one kind, in the order of their names:

* `NAME.npz`, each with the arrays x and y, and optionally x_test and y_test;
* `x-NAME.npy` with `y-NAME.npy`, and optionally `x_test-NAME.npy` with `y_test-NAME.npy`.

No entry of a folder is ignored silently. One with the name of a shard is read or named in an error: a link without a
target, a folder, a pipe, `NAME.NPZ`. All others are listed as ignored: files with other suffixes, hidden files,
subfolders.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bnworker.train.data.arrays import Array, open_npy, open_npz
from bnworker.train.data.files import File
from bnworker.train.data.problem import DataError

_LISTED = 8  # names in a line
_ENDINGS = (".npz", ".npy")
REQUIRED = ("x", "y")
OPTIONAL = ("x_test", "y_test")
_FEATURES = ("x", "x_test")


@dataclass(frozen=True, slots=True)
class Source:
    """A shard that was found.

    Attributes:
        where: the file, or the file of x, for messages.
        size: the total size of its files in bytes.
        paths: of one .npz, or of a .npy for each array, by the array's name.
        archive: whether it is a .npz.
    """

    where: str
    size: int
    paths: dict[str, Path]
    archive: bool

    def open(self, *, features: bool = True) -> dict[str, Array]:
        """Open the arrays, by name; x and y are among them.

        Args:
            features: whether rows of features will be read; if not, x of a compressed file is not decompressed.

        Raises:
            DataError: an array cannot be read.
        """
        headers = () if features else _FEATURES
        if self.archive:
            return open_npz(self.paths["x"], REQUIRED, OPTIONAL, headers)
        return open_npy(self.paths, headers)


@dataclass(frozen=True, slots=True)
class Listing:
    """What a name on the command line stands for.

    Attributes:
        shards: in the order of their names.
        ignored: entries of the folder that are not read, with the reason unless the name shows it.
    """

    shards: tuple[Source, ...]
    ignored: tuple[str, ...] = ()


def listed_shards(name: str) -> Listing:
    """The shards that a name on the command line stands for.

    Raises:
        DataError: there are none, or an entry with the name of a shard is not one.
    """
    path = Path(name)
    if _is_folder(path):
        return _folder(path)
    if path.suffix != ".npz":
        File.at(path)  # the error names a link without a target, or a pipe, as such
        raise DataError(f"{name}: expected the name of a .npz file, or of a folder with shards.")
    return Listing((_archive(path),))


def listing(seen: Iterable[tuple[str, int]]) -> int:
    """A hash of the names and sizes of the shards: equal on two hosts that see the same ones, in any folder."""
    return zlib.crc32(repr([(Path(where).name, size) for where, size in seen]).encode())


def _folder(path: Path) -> Listing:
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    shards = [name for name in names if not name.startswith(".") and name.lower().endswith(_ENDINGS)]
    ignored = tuple(_ignored(path, name) for name in names if name not in set(shards))
    for name in shards:
        if not name.endswith(_ENDINGS):
            raise DataError(
                f"{path / name}: expected the ending {name[-4:].lower()}, received {name[-4:]}. Rename the file, or "
                "move it out of the folder."
            )
    archives = [name for name in shards if name.endswith(".npz")]
    plain = [name for name in shards if name.endswith(".npy")]
    if archives and plain:
        raise DataError(f"{path}: holds both .npz ({archives[0]}) and .npy ({plain[0]}); expected shards of one kind.")
    if archives:
        return Listing(tuple(_archive(path / name) for name in archives), ignored)
    if plain:
        return Listing(_pairs(path, plain), ignored)
    raise DataError(
        f"{path}: expected shards, NAME.npz, or x-NAME.npy with y-NAME.npy; found {listed(ignored) or 'nothing'}."
    )


def listed(names: tuple[str, ...]) -> str:
    """Names as a line of text; only the first ones of many."""
    shown = ", ".join(names[:_LISTED])
    return f"{shown} and {len(names) - _LISTED:,} more" if len(names) > _LISTED else shown


def _ignored(folder: Path, name: str) -> str:
    shown = name if name.isprintable() else repr(name)
    if name.startswith("."):
        return f"{shown} (hidden)"
    return f"{shown} (a folder)" if _is_folder(folder / name) else shown


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # no permission; reading it will report why
        return False


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
