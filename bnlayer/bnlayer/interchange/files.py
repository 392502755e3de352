"""Layers in files: saved whole and atomically, loaded whole or not at all.

A file holds weights, grids, version and configuration, so that training goes on with the very bits it would have had.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from bnlayer.files import write_atomically
from bnlayer.interchange.containers import CONTAINERS, Container
from bnlayer.interchange.contents import Stored, assign, describe, understand
from bnlayer.layer import BatchNormalization

T = TypeVar("T")


def save(path: str | os.PathLike[str], layers: BatchNormalization | Mapping[str, BatchNormalization]) -> None:
    """Write layers to a file, in place of any older one.

    The file is either the old one or the whole new one at every moment, a crash of the machine included: it is written
    under another name in the same folder, synced, and renamed. A link stays one, and its target is replaced; the mode
    stays the older file's.

    Args:
        path: ends in `.safetensors` or `.npz`.
        layers: name → layer; a layer alone goes by its own name. Layers that are not built are kept as such.

    Raises:
        ValueError: the ending is another one, a configuration has no serialized form, or a layer's name can't be
            written: it holds a NUL character, or half of a surrogate pair.
        OSError: the file can't be written; the old one is left as it was.
    """
    path = Path(path)
    container = _container(path)
    named = {layers.name: layers} if isinstance(layers, BatchNormalization) else layers
    write_atomically(path, container.encode(describe(named)))


def load(path: str | os.PathLike[str]) -> dict[str, BatchNormalization]:
    """New layers, as they were saved, by their names in the file.

    Raises:
        ValueError: the file is damaged or another program's, or holds what does not fit together.
        OSError: the file can't be read.
    """
    return _read(Path(path), lambda stored: {name: entry.layer() for name, entry in stored.items()})


def load_into(path: str | os.PathLike[str], layers: BatchNormalization | Mapping[str, BatchNormalization]) -> None:
    """Give layers the weights, grids and versions of a file. Their configurations stay their own.

    Args:
        path: of the file.
        layers: name → built layer, for all layers of the file; a layer alone takes those of a file of one, whatever
            its name there.

    Raises:
        ValueError: as `load`; or names, shapes or dtypes differ, or a layer is not built. No layer was changed.
        OSError: the file can't be read.
    """
    path = Path(path)
    fitted = _read(path, lambda stored: [(layer, entry.fitting(layer)) for layer, entry in _paired(stored, layers)])
    for layer, values in fitted:
        assign(layer, values)


def _paired(
    stored: dict[str, Stored], layers: BatchNormalization | Mapping[str, BatchNormalization]
) -> list[tuple[BatchNormalization, Stored]]:
    """Each layer with what the file holds for it."""
    held = ", ".join(stored) or "none"
    if isinstance(layers, BatchNormalization):
        if len(stored) != 1:
            raise ValueError(f"expected one layer for layer {layers.name!r}, received {held}. Pass a mapping by name.")
        return [(layers, entry) for entry in stored.values()]
    if layers.keys() != stored.keys():
        raise ValueError(f"expected the layers {', '.join(layers) or 'none'}, received {held}.")
    return [(layer, stored[name]) for name, layer in layers.items()]


def _read(path: Path, use: Callable[[dict[str, Stored]], T]) -> T:
    """What `use` makes of the layers in a file; its errors name the file."""
    container, data = _container(path), path.read_bytes()
    try:
        return use(understand(container.decode(data)))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _container(path: Path) -> Container:
    if path.suffix not in CONTAINERS:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(CONTAINERS)}, received {path.name!r}.")
    return CONTAINERS[path.suffix]
