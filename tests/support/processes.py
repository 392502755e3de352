"""Launches as processes of their own, and handles that tell whether a process is gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PYTHON = sys.executable
# Arguments and names of variables that somebody on the way to a rank might take for something else: ":" is mpiexec's.
ODD_ARGUMENTS = (
    "x",
    ":",
    "",
    "a b",
    "new\nline",
    "-n",
    "--",
    "=",
    "a:b",
    "$HOME",
    "*",
    "\\",
    "\"'",
    "\u00e9\U0001f600",
)
ODD_VARIABLES = {"A:B": "1", "a b": "2", "BASH_FUNC_f%%": "() { :\n}", "\u00e9": " \u00fc ", "EMPTY": "", "E": "x=y"}


def arguments(ranks: int, *command: str, options: Sequence[str] = ()) -> list[str]:
    """The command line of a launch."""
    return [PYTHON, "-m", "bnworker.cli", "launch", "-n", str(ranks), *options, "--", *command]


def launch(
    ranks: int, *command: str, options: Sequence[str] = (), errors: str = "strict"
) -> subprocess.CompletedProcess[str]:
    """A launch from start to end; `errors` says what becomes of bytes that are no UTF-8."""
    return subprocess.run(
        arguments(ranks, *command, options=options),
        capture_output=True,
        encoding="utf-8",
        errors=errors,
        timeout=200,
        check=False,
    )


def script(text: str) -> tuple[str, str, str]:
    """A rank's program; `rank` is its number."""
    return PYTHON, "-c", "import os, signal, sys, time\nrank = int(os.environ['BNLAYER_RANK'])\n" + text


def launch_oddly(options: Sequence[str]) -> str:
    """What a rank says of odd arguments and variables: "as given"."""
    text = (
        "import json\n"
        "arguments, variables = json.loads(sys.argv[1])\n"
        "got = sys.argv[2:], {name: os.environ.get(name) for name in variables}\n"
        "print('as given' if got == (arguments, variables) else got)"
    )
    given = json.dumps([ODD_ARGUMENTS, ODD_VARIABLES])
    done = subprocess.run(
        arguments(1, *script(text), given, *ODD_ARGUMENTS, options=options),
        capture_output=True,
        encoding="utf-8",
        timeout=60,
        check=False,
        env={**os.environ, **ODD_VARIABLES},
    )
    return done.stdout + done.stderr


@contextmanager
def launched(ranks: int, *command: str, options: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A launch under way."""
    process = subprocess.Popen(
        arguments(ranks, *command, options=options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def pids(process: subprocess.Popen[str], count: int) -> list[int]:
    """The pids that ranks wrote, one a line: `[0] PID`."""
    assert process.stdout is not None
    return [int(process.stdout.readline().split()[-1]) for _ in range(count)]


@contextmanager
def watched(numbers: Sequence[int]) -> Iterator[list[int]]:
    """Handles of processes; what still runs at the end is killed."""
    handles = [os.pidfd_open(number) for number in numbers]
    try:
        yield handles
    finally:
        for handle in handles:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)


def children(pid: int) -> list[int]:
    """The pids of a process's children: ranks, service and guardian."""
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()))
