"""`--config FILE.toml`: the options of a command, from a file.

Laws:
1. A key is an option's name without its dashes, e.g. `batch-size = 64`; its value reads as on the command line.
2. What stands on the command line, or in an environment variable, beats the file.
"""

from __future__ import annotations

import difflib
import tomllib
from pathlib import Path
from typing import Any

import typer

from bnworker.cli.errors import CommandError

_NOT_IN_A_FILE = frozenset({"config", "help"})


def read(context: typer.Context, path: Path | None) -> Path | None:
    """Make a file's values the defaults of the options that come after; the callback of `--config`.

    Raises:
        CommandError: there is no such file, it is no TOML, or a key or value is wrong.
    """
    if path is None:
        return None
    command = context.info_name
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CommandError(f"{command}: --config {path}: {reason}") from None
    options = {
        opt.removeprefix("--"): option
        for option in context.command.params
        for opt in option.opts
        if opt.startswith("--") and opt.removeprefix("--") not in _NOT_IN_A_FILE
    }
    defaults: dict[str, Any] = {}
    for key, value in given.items():
        option = options.get(key)
        if option is None:
            raise CommandError(f"{command}: --config {path}: unknown key {key!r}.{_meant(key, options)}")
        text = _as_written(value)
        try:
            if text is None:
                raise typer.BadParameter("expected a string, a number, a boolean or a list of them")
            option.process_value(context, text)
        except typer.BadParameter as error:
            raise CommandError(f"{command}: --config {path}: {key} = {value!r}: {error.message.rstrip('.')}.") from None
        assert option.name is not None
        defaults[option.name] = text
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _meant(key: str, options: dict[str, Any]) -> str:
    near = difflib.get_close_matches(key.replace("_", "-"), options, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"{guess} Accepted are {', '.join(sorted(options))}."


def _as_written(value: object) -> str | None:
    """A TOML value as it would stand on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        parts = [_as_written(part) for part in value]
        return None if None in parts else ",".join(part for part in parts if part is not None)
    return str(value) if isinstance(value, str | int | float) else None
