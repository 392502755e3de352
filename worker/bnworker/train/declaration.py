"""Declarations of settings: each setting is declared once, as a field of a dataclass.

    epochs: Annotated[int, Setting("Passes over the training rows.", "Training", at_least(1))] = 20

The option `--epochs`, its help, the key `epochs` of a file of options and the default follow from it
(`bnworker.cli.options`), and so does what `refuse` refuses. Nothing is imported here: the command line reads the
declarations before it imports NumPy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class SettingsError(ValueError):
    """A setting is out of range, or contradicts another one."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The values that a setting accepts.

    Attributes:
        problem: returns what is wrong with a value as text, or None for a valid value.
        lowest, highest: the range that the help shows; the command line refuses others; None: no bound.
        choices: the values that the help shows; the command line refuses others; empty: any value.
    """

    problem: Callable[[Any], str | None] = lambda _: None
    lowest: float | None = None
    highest: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Setting:
    """The properties of a setting besides its name, type and default.

    Attributes:
        help: a sentence in Markdown.
        panel: the group of options in the help; None: the first one.
        accepted: the valid values.
        metavar: the placeholder for the value in the help; None: its type.
        environ: the environment variable that sets it if the command line does not; None: there is none.
        written: the type on the command line; None: the field's type.
        read: converts a value of the type `written` to the field's type; raises ValueError, with the reason, for one
            that it can't convert.
    """

    help: str
    panel: str | None = None
    accepted: Accepted = Accepted()
    metavar: str | None = None
    environ: str | None = None
    written: type | None = None
    read: Callable[[Any], Any] | None = None


@dataclass(frozen=True, slots=True)
class Declared:
    """A declared setting.

    Attributes:
        name: the field's; `option(name)` is the command line's.
        kind: the type without None; str for literals.
        optional: whether the value may be None.
        default: the default value.
        setting: its other properties.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    setting: Setting


def declared(declaration: Any) -> tuple[Declared, ...]:
    """The settings that a dataclass declares, in the order of its fields."""
    return _declared(declaration)


@cache
def _declared(declaration: Any) -> tuple[Declared, ...]:
    module = vars(sys.modules[declaration.__module__])  # what conditions within the annotations refer to
    annotations = get_type_hints(declaration, module, include_extras=True)
    declared = []
    for field in fields(declaration):
        if get_origin(annotations[field.name]) is not Annotated:
            continue
        annotated, setting = get_args(annotations[field.name])
        assert isinstance(setting, Setting) and field.default is not MISSING
        parts = get_args(annotated) if get_origin(annotated) in (Union, UnionType) else (annotated,)
        kind = next(part for part in parts if part is not NoneType)
        origin = get_origin(kind) or kind
        kind = origin if isinstance(origin, type) else str
        declared.append(Declared(field.name, kind, NoneType in parts, field.default, setting))
    return tuple(declared)


def read(entry: Declared, value: Any) -> Any:
    """Convert a value from the command line's type to the field's.

    Raises:
        ValueError: it can't be converted; the text says why.
    """
    if entry.setting.read is not None:
        return entry.setting.read(value)
    return str(value) if entry.setting.accepted.choices else entry.kind(value)


def from_options(declaration: type[T], options: Mapping[str, str | bool]) -> T:
    """Build the settings from a command line that was checked before.

    Args:
        declaration: of the settings.
        options: the given values by the option's name; True for an option without a value.

    Raises:
        ValueError: a value is not accepted; the text says why.
    """
    values = {}
    for entry in declared(declaration):
        if (text := options.get(option(entry.name))) is not None:
            values[entry.name] = read(entry, text)
    return declaration(**values)


def refuse(settings: Any) -> None:
    """Refuse a dataclass instance with a value that its declaration does not accept; None passes where it is optional.

    Raises:
        SettingsError: names the option of the first such value.
    """
    for entry in declared(type(settings)):
        value = getattr(settings, entry.name)
        problem = None if value is None and entry.optional else entry.setting.accepted.problem(value)
        if problem is not None:
            raise SettingsError(f"{option(entry.name)}: {problem}.")


def option(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def spelled(value: object) -> str:
    """A setting's value as text for the command line."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# ---- what is accepted ----


def expected(
    text: str, holds: Callable[[Any], bool], *, shown: tuple[float | None, float | None] = (None, None)
) -> Accepted:
    """Values for which a condition holds; `shown` is the range that the help shows."""
    return Accepted(lambda value: None if holds(value) else f"expected {text}, received {value!r}", *shown)


def at_least(lowest: int, *, shown: bool = True) -> Accepted:
    """Integers not below a number."""
    return expected(f">= {lowest}", lambda value: value >= lowest, shown=(lowest if shown else None, None))


def fraction(*, shown: bool = False) -> Accepted:
    """Numbers from 0 to 1."""
    return expected("from 0 to 1", lambda value: 0 <= value <= 1, shown=(0.0, 1.0) if shown else (None, None))


def finite(*, shown: bool = False) -> Accepted:
    """Finite numbers not below 0."""
    lowest = 0.0 if shown else None
    return expected("a finite number >= 0", lambda value: 0 <= value < math.inf, shown=(lowest, None))


def one_of(*choices: str) -> Accepted:
    """One of several strings."""
    text = f"one of {', '.join(choices)}"
    accepted = expected(text, lambda value: value in choices)
    return Accepted(accepted.problem, choices=choices)
