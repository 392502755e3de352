"""Checks of a rank's command before it is started, so that a mistake is reported in one line, and not by every rank."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from bnlayer.environment import variable

# A shell's exit codes.
NOT_EXECUTABLE = 126
NOT_FOUND = 127

_PYTHON = re.compile(r"python(3(\.\d+)?)?")
_PROBE = "import importlib.util, sys; sys.exit(importlib.util.find_spec('bnworker') is None)"
_PROBE_S = 10.0  # a Python starts in 20 ms; on a cold network disk in seconds


def refusal(name: str, environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Why a command can't be executed, and a shell's code for it; None: it can.

    Args:
        name: the command's first word.
        environ: PATH.
    """
    executable = shutil.which(name, path=variable(environ, "PATH"))
    if executable is not None:
        return _refusal_of_script(name, Path(executable))
    path = Path(name)
    if "/" not in name:
        here = f"; there is a file of this name here: write {_through(path)}" if path.is_file() else ""
        return f"{name}: command not found{here}", NOT_FOUND
    if path.is_dir():
        return f"{name}: is a folder; expected a program", NOT_EXECUTABLE
    if path.exists():
        return f"{name}: is there, but not executable: write {_through(path)}", NOT_EXECUTABLE
    return f"{name}: command not found", NOT_FOUND


def _through(path: Path) -> str:
    """How to start a file that was given as a program."""
    if path.suffix == ".py":
        return f"python {path}"
    name = path if path.is_absolute() else f"./{path}"
    return str(name) if os.access(path, os.X_OK) else f"its interpreter in front of it, or chmod +x {path} and {name}"


def _refusal_of_script(name: str, path: Path) -> tuple[str, int] | None:
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError:  # executable and not readable: left to the kernel
        return None
    if not head.startswith(b"#!"):
        if path.suffix == ".py" and b"\0" not in head:
            return f"{name}: has no first line that names its interpreter (#!): write python {path}", NOT_EXECUTABLE
        return None
    line = head[2:].partition(b"\n")[0].strip(b" \t")  # to the kernel, the "\r" of a Windows editor is of the name
    interpreter = re.split(rb"[ \t]", line, maxsplit=1)[0].decode(errors="surrogateescape")
    if interpreter and Path(interpreter).exists():
        return None
    text = (
        f"{name}: its first line names the interpreter {interpreter!r}, which is not there; correct the line, or put "
        f"an interpreter in front, e.g. python {path}"
    )
    return text, NOT_EXECUTABLE


def foreign_python(command: tuple[str, ...], environ: Mapping[str, str]) -> str | None:
    """A hint for ranks that fail under a Python without this package; None without need for one.

    A program need not import it, so this is no reason to refuse. Only another environment's Python is checked, by
    starting it.
    """
    program = shutil.which(command[0], path=variable(environ, "PATH"))
    if (
        program is None
        or not _PYTHON.fullmatch(Path(program).name)
        or Path(program).parent == Path(sys.executable).parent
    ):
        return None
    try:
        code = subprocess.run(
            [program, "-c", _PROBE], env=dict(environ), capture_output=True, timeout=_PROBE_S, check=False
        ).returncode
    except (OSError, subprocess.TimeoutExpired):
        return None
    if code != 1:
        return None
    return (
        f"the ranks' Python, {program}, has no bnlayer: a program that imports it fails. Start them with "
        f"{sys.executable}, or install bnlayer there."
    )
