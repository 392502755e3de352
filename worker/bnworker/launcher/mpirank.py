"""Stands between mpiexec and one rank: the rank's output and end go to the launcher, not through mpiexec.

    python -I -S mpirank.py FOLDER RANKS =COMMAND =ARGUMENT…

mpiexec mixes the output of its ranks, and reports only one exit code for a failed job. So each rank gets named pipes
in the launcher's folder: `N.out` and `N.err` for its output, `N.end` for "PID" when it starts and its status
when it ends. Where the folder is not there (another host), the rank keeps mpiexec's output.

Each word of the command has a "=" in front: mpiexec takes a word ":" for the end of its own command, wherever it is.

Signals for this process are passed to the rank, which dies with this process, and this process ends as the rank
did. If the rank failed because of another's failure (`N.peer-failure`), it first waits for that one: mpiexec ends all
ranks when the first fails, and would end the one that caused it. For the same reason a rank that was asked to end
(`stopping`) first waits for the others that were, which may still be saving. If it ended with 0 but has left its world
or MPI open (`N.world`, `N.mpi`), this process ends with 1: mpiexec ends the others then, at times with exit code 0.

A rank that knows MPI alone leaves no such mark. MPICH's mpiexec ends the others when it loses the connection to a rank
that has not finalized MPI; but not if it has waited for the process before it sees that (`exit_status` in `pmi_cb`):
then the others wait for ever. So after an end with 0 this process closes the connection, and stays until mpiexec has
killed it, or the others have ended; unless mpiexec itself has closed it, as it does when a rank finalizes.

Standard library alone: it starts once per rank, before the rank does.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_GRACE_S = 5.0  # the launcher's grace
_PAUSE_S = 0.01
_PASSED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_signalled: list[int] = []  # signals that came
_PYTHON_IGNORES = (signal.SIGPIPE, signal.SIGXFSZ)  # and what is ignored survives an exec
_OPEN = ("world", "mpi")  # see bnworker.failure_marker
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")


def _become_the_rank(parent: int, command: list[str]) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was asked to watch it
        os._exit(128 + signal.SIGKILL)
    try:
        os.execvp(command[0], command)  # noqa: S606 - the rank takes this process's place
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode())
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _close_what_is_mpiexecs() -> None:
    """Close the pipes that MPICH's mpiexec leaves open in ranks: it waits for everything that has one."""
    connection = _connection()
    if connection is not None:
        for descriptor in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
            if descriptor > 2 and descriptor != connection:
                with suppress(OSError):  # the listing's own
                    os.close(descriptor)


def _redirect(folder: Path, rank: str) -> int:
    """Send the output to the launcher; returns where to report, /dev/null where the launcher is elsewhere."""
    if not (folder / f"{rank}.end").is_fifo():
        return os.open(os.devnull, os.O_WRONLY)
    for name, descriptor in (("out", 1), ("err", 2)):
        pipe = os.open(folder / f"{rank}.{name}", os.O_WRONLY)
        os.dup2(pipe, descriptor, inheritable=True)
        os.close(pipe)
    return os.open(folder / f"{rank}.end", os.O_WRONLY)


def _wait_for_the_cause(folder: Path, ranks: range) -> None:
    """Return when every rank has ended or is marked as failing because of another, or a signal ends the wait."""
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and not _signalled:
        if all((folder / f"{rank}.ended").exists() or (folder / f"{rank}.peer-failure").exists() for rank in ranks):
            return
        time.sleep(_PAUSE_S)


def _wait_for_those_who_stop(folder: Path) -> None:
    """Return when every rank that the launcher has asked to end has ended, or their time is up."""
    try:
        seconds, *ranks = (folder / "stopping").read_text().split()
    except FileNotFoundError:
        return
    deadline = time.monotonic() + float(seconds)
    while time.monotonic() < deadline and not all((folder / f"{rank}.ended").exists() for rank in ranks):
        time.sleep(_PAUSE_S)


def _connection() -> int | None:
    """The descriptor by which MPICH's mpiexec hears from the rank; None: it is not MPICH's."""
    given = os.environ.get("PMI_FD", "")
    return int(given) if given.isdecimal() and Path("/proc/self/fd", given).exists() else None


def _let_mpiexec_notice(folder: Path, ranks: range) -> None:
    """Return when mpiexec has no reason to end the others, they have ended, or a signal has come."""
    connection = _connection()
    if connection is None:
        return
    poll = select.poll()
    poll.register(connection, 0)
    if poll.poll(0):  # it hung up
        return
    os.close(connection)
    for rank in ranks:  # one after the other: hundreds may wait like this, for hours
        while not (folder / f"{rank}.ended").exists():
            if _signalled or not folder.is_dir():
                return
            time.sleep(_PAUSE_S)


def _end_like(status: int) -> None:
    if status < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the rank has dumped its core already
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def main() -> None:
    """Run the rank; end as it ends."""
    folder, ranks, command = Path(sys.argv[1]), range(int(sys.argv[2])), [word[1:] for word in sys.argv[3:]]
    rank = next(value for name in _RANK_VARIABLES if (value := os.environ.get(name)))
    report = _redirect(folder, rank)
    os.environ["BNLAYER_RANK"] = rank
    # Blocked until they can be passed on. Handlers, unlike "ignore", do not survive the rank's exec.
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED)
    me = os.getpid()
    child = os.fork()
    if child == 0:
        for number in _PYTHON_IGNORES:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED)
        os.setpgid(0, 0)
        _close_what_is_mpiexecs()
        _become_the_rank(me, command)
    with suppress(PermissionError, ProcessLookupError):  # the child did it, and has become the rank, or ended
        os.setpgid(child, child)

    running = [child]

    def pass_on(number: int, _: object) -> None:
        _signalled.append(number)
        if running:
            os.killpg(child, number)

    for number in _PASSED:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED)
    os.write(report, f"{child}\n".encode())
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    running.clear()  # before its number is free for another process
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(report, f"{status}\n".encode())
    if folder.is_dir():
        (folder / f"{rank}.ended").touch()
    if status != 0 and (folder / f"{rank}.peer-failure").exists():  # see bnworker.failure_marker
        _wait_for_the_cause(folder, ranks)
    unfinished = status == 0 and any((folder / f"{rank}.{what}").exists() for what in _OPEN)
    if status != 0 or unfinished:
        _wait_for_those_who_stop(folder)
    else:
        _let_mpiexec_notice(folder, ranks)
    _end_like(1 if unfinished else status)


if __name__ == "__main__":
    main()
