"""Arguments of a layer, read strictly: what is of another kind is refused by the argument's name."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

# What Keras 2 wrote into a configuration and Keras 3 does not know, with the values that change nothing here.
# `fused` chose a kernel.
_OF_KERAS_2: dict[str, tuple[Any, ...]] = {
    "virtual_batch_size": (None,),
    "adjustment": (None,),
    "fused": (None, False, True),
    "dynamic": (None, False),
}
_INPUT_SHAPE = "batch_input_shape"  # of a model's first layer


def number(name: str, value: Any) -> float:
    """A real number.

    Raises:
        ValueError: the value is none.
    """
    refusal = ValueError(f"{name}: expected a number, received {value!r}.")
    if isinstance(value, str | bytes):  # which float() would read
        raise refusal
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise refusal from None


def channel_axis(value: Any) -> int:
    """The axis of the channels: an integer, or a list of one, as Keras 2 writes it.

    Raises:
        ValueError: the value is neither.
    """
    one = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1
    try:
        return operator.index(value[0] if one else value)
    except TypeError:
        raise ValueError(f"axis: expected an integer, or a list of one, received {value!r}.") from None


def without_keras_2(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the keys of Keras 2 that change nothing.

    One with another value stays, and is then an unknown argument: no layer here does what it asks for.
    """
    return {
        key: value
        for key, value in config.items()
        if key != _INPUT_SHAPE and not any(value is silent for silent in _OF_KERAS_2.get(key, ()))
    }


def input_rank(config: Mapping[str, Any]) -> int | None:
    """The rank of the inputs, where a configuration of Keras 2 says their shape; None where it does not."""
    shape = config.get(_INPUT_SHAPE)
    return len(shape) if isinstance(shape, Sequence) else None
