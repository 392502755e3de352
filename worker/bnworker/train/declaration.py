"""How a setting is declared: once, as a field of a dataclass.

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
    """What a setting accepts.

    Attributes:
        problem: what is wrong with a value, as text; None: nothing is.
        lowest, highest: the range that help shows, and outside of which a value is an error of usage; None: no bound.
        choices: likewise, the values that there are; empty: others.
    """

    problem: Callable[[Any], str | None] = lambda _: None
    lowest: float | None = None
    highest: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Setting:
    """What there is to say of a setting, besides its name, type and default.

    Attributes:
        help: a sentence, in Markdown.
        panel: the group of the help that it stands in; None: the first one.
        accepted: what it accepts.
        metavar: what help shows for its value; None: its type.
        environ: the variable that gives it where the command line does not; None: there is none.
        written: its type on the command line, where that is another one than the field's.
        read: the value that a written one stands for.

    Raises:
        ValueError: by `read`: what was written stands for nothing; the text says why.
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
    """A field that is a setting.

    Attributes:
        name: of the field; `option(name)` is its option.
        kind: its type, None aside; str for words.
        optional: whether it may be None.
        default: its default.
        setting: the rest.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    setting: Setting


def declared(declaration: Any) -> tuple[Declared, ...]:
    """The settings that a dataclass declares, in its order."""
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
    """The value that one written for this setting stands for, once it has the type of the command line.

    Raises:
        ValueError: it stands for nothing; the text says why.
    """
    if entry.setting.read is not None:
        return entry.setting.read(value)
    return str(value) if entry.setting.accepted.choices else entry.kind(value)


def from_options(declaration: type[T], options: Mapping[str, str | bool]) -> T:
    """The settings of a command line that was checked before.

    Args:
        declaration: of the settings.
        options: what was given, by the option's name; True where it has no value.

    Raises:
        ValueError: a value is not accepted; the text says why.
    """
    values = {}
    for entry in declared(declaration):
        if (text := options.get(option(entry.name))) is not None:
            values[entry.name] = read(entry, text)
    return declaration(**values)


def refuse(settings: Any) -> None:
    """Refuse an instance of a declaration whose values are not accepted; None is, where it is permitted.

    Raises:
        SettingsError: the first one that isn't, by its option's name.
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
    """A setting's value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


# ---- what is accepted ----


def expected(
    text: str, holds: Callable[[Any], bool], *, shown: tuple[float | None, float | None] = (None, None)
) -> Accepted:
    """Values for which a condition holds; `shown` is the range of them that help shows."""
    return Accepted(lambda value: None if holds(value) else f"expected {text}, received {value!r}", *shown)


def at_least(lowest: int, *, shown: bool = True) -> Accepted:
    """Integers from a number on."""
    return expected(f">= {lowest}", lambda value: value >= lowest, shown=(lowest if shown else None, None))


def fraction(*, shown: bool = False) -> Accepted:
    """Numbers from 0 to 1."""
    return expected("from 0 to 1", lambda value: 0 <= value <= 1, shown=(0.0, 1.0) if shown else (None, None))


def finite(*, shown: bool = False) -> Accepted:
    """Finite numbers from 0 on."""
    lowest = 0.0 if shown else None
    return expected("a finite number >= 0", lambda value: 0 <= value < math.inf, shown=(lowest, None))


def one_of(*choices: str) -> Accepted:
    """One of several words."""
    text = f"one of {', '.join(choices)}"
    accepted = expected(text, lambda value: value in choices)
    return Accepted(accepted.problem, choices=choices)
