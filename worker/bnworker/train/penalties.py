"""Keras's regularizers and constraints, named in one word: `l2=1e-4`, `l1_l2=1e-5,1e-4`, `max_norm=2`, `non_neg`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

from bnlayer.constraints import Constraint, MaxNorm, NonNeg, UnitNorm
from bnlayer.regularizers import L1, L1L2, L2, Regularizer

T = TypeVar("T")

# name: (how many factors it can have, how it is made of them)
_REGULARIZERS: dict[str, tuple[int, Callable[..., Regularizer]]] = {"l1": (1, L1), "l2": (1, L2), "l1_l2": (2, L1L2)}
_CONSTRAINTS: dict[str, tuple[int, Callable[..., Constraint]]] = {
    "non_neg": (0, NonNeg),
    "max_norm": (1, MaxNorm),
    "unit_norm": (0, UnitNorm),
}


def regularizer(text: str | None) -> Regularizer | None:
    """The regularizer of this name; Keras's default factors where none is given.

    Raises:
        ValueError: the name is unknown, or a factor is no finite number >= 0.
    """
    return _named(text, _REGULARIZERS, "l2=1e-4")


def constraint(text: str | None) -> Constraint | None:
    """The constraint of this name; Keras's default bound where none is given.

    Raises:
        ValueError: the name is unknown, or the bound is no finite number >= 0.
    """
    return _named(text, _CONSTRAINTS, "max_norm=2")


def _named(text: str | None, registered: Mapping[str, tuple[int, Callable[..., T]]], example: str) -> T | None:
    if text is None:
        return None
    name, separator, rest = text.partition("=")
    most, make = registered.get(name, (0, None))
    factors = [_number(part) for part in rest.split(",")] if separator else []
    if make is None or len(factors) > most or any(not 0 <= factor < math.inf for factor in factors):
        raise ValueError(
            f"expected one of {', '.join(registered)}, those with factors as NAME=FACTOR (finite, >= 0), e.g. "
            f"{example}; received {text!r}"
        )
    return make(*factors)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
