"""What a file says of layers: named arrays, and a description of them in JSON.

Laws:
1. Each array is named `LAYER/ARRAY`, e.g. `bn1/gamma`, `bn1/forward.pivot`: the variables and the grids.
2. The description names the layers in order, with their configuration and rank, and every array with its dtype; and it
   holds a digest of all of that and of the arrays' bytes. What is missing, added or changed is found.
3. What is read is checked as a whole before any layer is changed. Bytes and files are handled by other modules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from bnlayer.dtypes import dtype_named
from bnlayer.interchange.rank import build, rank_of
from bnlayer.layer import BatchNormalization
from bnlayer.state import LayerState

Arrays = dict[str, NDArray[Any]]

_FORMAT_VERSION = 1  # raised when an older reader would read wrongly
_OF_A_CHECKPOINT = {"format", "settings", "progress"}  # what the description of a checkpoint of a training job has


@dataclass(frozen=True, eq=False)
class Contents:
    """What is in a file.

    Attributes:
        arrays: all of them, by full name.
        description: JSON.
    """

    arrays: Arrays
    description: str


@dataclass(frozen=True, eq=False)
class Stored:
    """One layer, as a file holds it.

    Attributes:
        name: its name in the file.
        config: of `get_config()`.
        ndim: the rank of its inputs; None: it was not built, and has no arrays.
        arrays: by their names in the layer.
    """

    name: str
    config: dict[str, Any]
    ndim: int | None
    arrays: Arrays

    def layer(self) -> BatchNormalization:
        """A new layer, as it was when it was saved.

        Raises:
            ValueError: there is no such layer, or the arrays do not fit it.
        """
        try:
            layer = BatchNormalization.from_config(self.config)
        except (AttributeError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(f"layer {self.name!r}: its configuration is refused: {error}") from error
        if self.ndim is not None:
            mean = self.arrays.get("moving_mean")
            if mean is None or mean.ndim != 1:
                raise ValueError(f"layer {self.name!r}: expected moving_mean, received {_shapes(self.arrays)}.")
            try:
                build(layer, mean.shape[0], self.ndim)
            except ValueError as error:
                raise ValueError(f"layer {self.name!r}: {error}") from error
            assign(layer, self.fitting(layer))
        return layer

    def fitting(self, layer: BatchNormalization) -> tuple[Arrays, LayerState]:
        """The values of gamma and beta, and the state, if all of them fit a built layer.

        Raises:
            ValueError: they do not, or the layer is not built.
        """
        if not layer.built:
            raise ValueError(f"layer {self.name!r}: layer {layer.name!r} is not built: call its build(input_shape).")
        expected = _arrays_of(layer)
        if _shapes(expected) != _shapes(self.arrays):
            raise ValueError(
                f"layer {self.name!r}: expected {_shapes(expected)} for layer {layer.name!r}, "
                f"received {_shapes(self.arrays)}."
            )
        vectors = {variable.name: self.arrays[variable.name] for variable in layer.weights if variable.trainable}
        return vectors, LayerState.from_arrays(self.arrays, layer.dtype_policy.arithmetic)


def assign(layer: BatchNormalization, values: tuple[Arrays, LayerState]) -> None:
    """Give a layer what `Stored.fitting` found to fit it."""
    vectors, state = values
    named = {**vectors, **state.moving.vectors}
    layer.set_weights([named[variable.name] for variable in layer.weights])
    layer.restore(state)


def describe(layers: Mapping[str, BatchNormalization]) -> Contents:
    """What a file should say of some layers.

    Raises:
        ValueError: a layer's configuration has no serialized form, or its name none in a file.
    """
    for name, layer in layers.items():
        _writable(name)
        _writable(layer.name)
    described = {name: {"ndim": rank_of(layer), "config": layer.get_config()} for name, layer in layers.items()}
    arrays = {f"{name}/{key}": array for name, layer in layers.items() for key, array in _arrays_of(layer).items()}
    description = {
        "format_version": _FORMAT_VERSION,
        "digest": _digest(described, arrays),
        "layers": described,
        "dtypes": {key: array.dtype.name for key, array in arrays.items()},
    }
    return Contents(arrays, json.dumps(description, default=_plain))


def understand(contents: Contents) -> dict[str, Stored]:
    """The layers that a file's contents hold, in their order.

    An array of bfloat16 may come as its bits, in uint16, from a container that has no such dtype.

    Raises:
        ValueError: the contents are not what `describe` made.
    """
    described, dtypes, digest = _parsed(contents.description)
    _same_names(set(dtypes), set(contents.arrays))
    arrays = {}
    for key, name in dtypes.items():
        array = contents.arrays[key]
        bits = name == "bfloat16" and array.dtype == np.uint16
        arrays[key] = array.view(dtype_named(name)) if bits else array
        if arrays[key].dtype.name != name:
            raise ValueError(f"expected array {key!r} of dtype {name}, received {array.dtype}.")
    if _digest(described, arrays) != digest:
        raise ValueError("its digest differs from what it says: the file is damaged, or was changed.")
    parts: dict[str, Arrays] = {name: {} for name in described}
    for key, array in arrays.items():
        layer, _, name = key.rpartition("/")
        if layer not in parts:
            raise ValueError(f"expected arrays of the layers {', '.join(parts) or '(none)'}, received {key!r}.")
        parts[layer][name] = array
    return {name: Stored(name, entry["config"], entry["ndim"], parts[name]) for name, entry in described.items()}


def _parsed(description: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """The layers, dtypes and digest of a description."""
    try:
        parsed = json.loads(description)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected a description in JSON, received {description[:40]!r}….") from error
    version = parsed.get("format_version") if isinstance(parsed, dict) else None
    if isinstance(parsed, dict) and parsed.keys() >= _OF_A_CHECKPOINT:
        raise ValueError(
            "expected layers that interchange.save wrote, received a checkpoint of `bnlayer train --save`: "
            "`bnlayer export FILE layers.safetensors --names bnlayer` writes its layers as this reads them."
        )
    if version != _FORMAT_VERSION:
        raise ValueError(f"expected format version {_FORMAT_VERSION}, received {version!r}.")
    described, dtypes, digest = (parsed.get(key) for key in ("layers", "dtypes", "digest"))
    if not (isinstance(described, dict) and isinstance(dtypes, dict) and isinstance(digest, str)):
        raise ValueError(f"expected a description of layers, dtypes and digest, received {sorted(parsed)}.")
    for name, entry in described.items():
        rank = entry.get("ndim") if isinstance(entry, dict) else 0
        if not (isinstance(entry, dict) and isinstance(entry.get("config"), dict) and isinstance(rank, int | None)):
            raise ValueError(f"layer {name!r}: expected its configuration and rank, received {entry!r}.")
    return described, cast("dict[str, str]", dtypes), digest


def _same_names(expected: set[str], received: set[str]) -> None:
    if expected != received:
        missing, extra = sorted(expected - received), sorted(received - expected)
        raise ValueError(
            f"expected the {len(expected)} arrays that it describes; missing: {', '.join(missing) or 'none'}; "
            f"not described: {', '.join(extra) or 'none'}."
        )


def _arrays_of(layer: BatchNormalization) -> Arrays:
    if not layer.built:
        return {}
    return {**{variable.name: variable.value for variable in layer.weights}, **layer.state.arrays()}


def _shapes(arrays: Arrays) -> str:
    texts = (f"{name}: {array.dtype}{array.shape}" for name, array in sorted(arrays.items()))
    return ", ".join(texts) or "no arrays (not built)"


def _digest(described: dict[str, Any], arrays: Arrays) -> str:
    """A name of everything that counts."""
    digest = blake2b(digest_size=16)
    facts = [described, [[key, array.dtype.name, array.shape] for key, array in sorted(arrays.items())]]
    digest.update(json.dumps(facts, sort_keys=True, default=_plain).encode())
    for _, array in sorted(arrays.items()):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _writable(name: str) -> None:
    """Make sure that every reader of the containers finds a name as it was written."""
    # A zip archive's names end at a NUL, and neither container has a form for half of a surrogate pair.
    bad = next((character for character in name if character == "\0" or "\ud800" <= character <= "\udfff"), None)
    if bad is not None:
        raise ValueError(
            f"layer {name!r}: expected a name that a file can hold, received one with the character {bad!r}: "
            "save the layer under another name."
        )


def _plain(value: Any) -> Any:
    """A NumPy number of a configuration as Python's."""
    if isinstance(value, np.generic):
        return value.item()
    raise ValueError(f"A configuration holds {value!r}, which has no form in JSON.")
