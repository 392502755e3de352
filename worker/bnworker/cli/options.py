"""Options of a command from declarations: see `bnworker.train.declaration`.

@with_options(Ranks, Settings)
def train(context: typer.Context, data: str = "digits") -> None:
    settings = given(context, Settings)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

from bnworker.cli.errors import CommandError
from bnworker.train.declaration import Declared, SettingsError, declared, option, read, spelled

T = TypeVar("T")


def with_options(*declarations: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that dataclasses declare, after its own."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(function).parameters.values()
        ]
        more = [_parameter(entry) for declaration in declarations for entry in declared(declaration)]

        def command(**values: Any) -> None:
            function(**{parameter.name: values[parameter.name] for parameter in own})

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        parameters = [*own, *more]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
        return command

    return decorate


def given(context: typer.Context, declaration: type[T]) -> T:
    """A declaration's settings, as they were given to a command.

    Raises:
        CommandError: one is not accepted.
    """
    command = context.info_name
    values = {}
    for entry in declared(declaration):
        value = context.params[entry.name]
        try:
            values[entry.name] = None if value is None else read(entry, value)
        except ValueError as error:
            raise CommandError(f"{command}: {option(entry.name)}: {error}.") from None
    try:
        return declaration(**values)
    except SettingsError as error:
        raise CommandError(f"{command}: {error}") from None


def address_of_service(context: typer.Context, address: str | None, transport: str | None) -> str | None:
    """`--address`, if it is one that this command shall use.

    A variable may be there for other jobs: it counts where the transport is the service, and is otherwise ignored.

    Raises:
        CommandError: it stands on the command line or in a file, with a transport that uses no service.
    """
    if not address or transport in (None, "service"):
        return address or None
    source = context.get_parameter_source("address")
    if source is None or source.name != "ENVIRONMENT":
        raise CommandError(
            f"{context.info_name}: --address is of a statistics service, and --transport {transport} uses none: "
            "leave out one of them."
        )
    return None


def arguments(context: typer.Context, *, without: Sequence[str]) -> list[str]:
    """A command's options, as they were given, wherever that was: those that run it again.

    Args:
        context: of the command.
        without: parameters that are left out.
    """
    written = []
    for parameter in context.command.params:
        value = context.params.get(parameter.name or "")
        if parameter.name not in without and value is not None and value is not False:
            written.append(parameter.opts[0] if value is True else f"{parameter.opts[0]}={value}")
    return written


def names(*declarations: type[Any]) -> list[str]:
    """Of the settings that are declared."""
    return [entry.name for declaration in declarations for entry in declared(declaration)]


def _parameter(entry: Declared) -> inspect.Parameter:
    """What a command's function would say of this option."""
    setting, default = entry.setting, entry.default
    kind: Any = setting.written or entry.kind
    if setting.accepted.choices:
        made: Any = StrEnum  # by its functional API, which mypy takes for literals alone
        kind = made(entry.name, {choice: choice for choice in setting.accepted.choices})
    if default is not None and not isinstance(default, kind):
        default = kind(spelled(default))
    names = [option(entry.name)]
    if kind is bool:
        names = [f"{names[0]}/--no-{names[0].removeprefix('--')}"]
    declared_option = typer.Option(
        *names,
        help=setting.help,
        rich_help_panel=setting.panel,
        metavar=setting.metavar,
        envvar=setting.environ,
        min=setting.accepted.lowest,
        max=setting.accepted.highest,
    )
    annotation: Any = Annotated[kind | None if entry.optional else kind, declared_option]
    return inspect.Parameter(
        entry.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default, annotation=annotation
    )
