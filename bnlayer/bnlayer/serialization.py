"""Keras's way to name an object: by a string, by a configuration, or by itself.

One function resolves all four vocabularies of the layer; what it does not know it refuses by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

T = TypeVar("T")


class Configurable(Protocol):
    """An object that says how it was made."""

    def get_config(self) -> dict[str, Any]:
        """The keyword arguments of its constructor."""


def snake_case(name: str) -> str:
    """`MaxNorm` → `max_norm`, `L1L2` → `l1_l2`, as Keras spells names of classes."""
    out = ""
    for i, letter in enumerate(name):
        starts_word = letter.isupper() and i > 0 and not (name[i - 1].isupper())
        out += ("_" if starts_word else "") + letter.lower()
    return out


def resolve(
    value: Any, known: Mapping[str, Callable[..., T]], kind: str, *, call: Callable[[Callable[..., Any]], T]
) -> T | None:
    """The object that a user's value names.

    Args:
        value: None, a class's name in either spelling, Keras's configuration of one, an instance, or a callable.
        known: class name → class.
        kind: what they are, for the error.
        call: wraps a plain callable.

    Returns:
        None for None.

    Raises:
        ValueError: nothing known is named so.
    """
    if value is None:
        return None
    for cls in known.values():
        if isinstance(cls, type) and isinstance(value, cls):
            return cast("T", value)
    if isinstance(value, str):
        for name, cls in known.items():
            if value in (name, snake_case(name)):
                return cls()
    elif isinstance(value, Mapping):
        class_name = value.get("class_name")
        if isinstance(class_name, str) and class_name in known:
            return known[class_name](**value.get("config", {}))
    elif callable(value) and not isinstance(value, type) and not hasattr(value, "get_config"):
        return call(value)
    accepted = ", ".join(f"{snake_case(name)!r}" for name in known)
    raise ValueError(
        f"Unknown {kind}: {value!r}. Expected one of {accepted} by name, by Keras's configuration or by instance, "
        "or a plain callable."
    )


def described(value: Any, module: str) -> dict[str, Any] | None:
    """Keras's serialized form of an object; None for None.

    Raises:
        ValueError: the object is a plain callable, which has no serialized form.
    """
    if value is None:
        return None
    if not hasattr(value, "get_config"):
        raise ValueError(f"{value!r} has no get_config(): a plain callable can't be part of a layer's configuration.")
    return {
        "module": module,
        "class_name": type(value).__name__,
        "config": value.get_config(),
        "registered_name": None,
    }
