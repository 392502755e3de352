"""Keras's way to name an object: by a string, by a configuration, or by itself.

One function resolves all four vocabularies of the layer; what it does not know it refuses by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar, cast

T = TypeVar("T")


class Configurable(Protocol):
    """An object that says how it was made."""

    def get_config(self) -> dict[str, Any]:
        """The keyword arguments of its constructor."""


def snake_case(name: str) -> str:
    """`MaxNorm` → `max_norm`, `L1L2` → `l1l2`, as Keras spells names of classes."""
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def resolve(
    value: Any,
    registered: Mapping[str, Callable[..., T]],
    kind: str,
    *,
    call: Callable[[Callable[..., Any]], T],
    aliases: Mapping[str, str] | None = None,
) -> T | None:
    """The object that a user's value names.

    Args:
        value: None, a class's name in either spelling, Keras's configuration of one, an instance (of ours, of
            Keras's class of the same name, or of the user's own), a class, or a callable.
        registered: class name → class.
        kind: what they are, for the error.
        call: wraps a callable of the user's.
        aliases: further names → class name.

    Returns:
        None for None.

    Raises:
        ValueError: nothing known is named so.
    """
    if value is None:
        return None
    if isinstance(value, str):
        named = {**{snake_case(name): name for name in registered}, **(aliases or {})}.get(value, value)
        if named in registered:
            return registered[named]()
    elif isinstance(value, Mapping):
        class_name = value.get("class_name")
        if isinstance(class_name, str) and class_name in registered:
            return registered[class_name](**value.get("config", {}))
    elif isinstance(value, type):
        return resolve(value(), registered, kind, call=call)
    elif isinstance(value, tuple(cls for cls in registered.values() if isinstance(cls, type))):
        return cast("T", value)
    elif type(value).__name__ in registered and type(value).__module__.partition(".")[0] == "keras":
        return registered[type(value).__name__](**value.get_config())
    elif callable(value):
        return call(value)
    accepted = ", ".join(f"{snake_case(name)!r}" for name in registered)
    raise ValueError(
        f"Unknown {kind}: {value!r}. Expected one of {accepted} by name, by Keras's configuration or by instance, "
        "or a callable."
    )


def described(value: Any, module: str) -> dict[str, Any] | None:
    """Keras's serialized form of an object; None for None.

    Raises:
        ValueError: the object is a plain callable, which has no serialized form.
    """
    if value is None:
        return None
    value = getattr(value, "function", value)  # a user's own object, as `resolve` wrapped it
    if not hasattr(value, "get_config"):
        raise ValueError(f"{value!r} has no get_config(): a plain callable can't be part of a layer's configuration.")
    ours = type(value).__module__.partition(".")[0] == "bnlayer"
    return {
        "module": module if ours else type(value).__module__,
        "class_name": type(value).__name__,
        "config": value.get_config(),
        "registered_name": None,
    }
