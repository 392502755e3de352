"""Every way in which a launched job can end: one row each of the table in docs/launching.md, over any transport.

A row is a program for the ranks, something that is done to the job from outside, and what must come of it.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.processes import script
from support.running import Running

_AFTER_KILL_S = 3.0  # the promise: so long after kill -9 of the launcher nothing of it runs

# `make test` plays each once; ENDINGS=10 make test-long ten times more.
_REPETITIONS = range(2, 2 + int(os.environ.get("ENDINGS", "0")))
repeated = pytest.mark.parametrize("repetition", [1, *(pytest.param(n, marks=pytest.mark.soak) for n in _REPETITIONS)])


def _nothing(job: Running) -> None:
    """Leave the job alone."""


@dataclass(frozen=True)
class Ending:
    """One way to end.

    Attributes:
        row: what the table calls it.
        code: the launcher's exit code; for kill -9 of the launcher itself, what a shell says.
        body: what the ranks do once they have joined, as `w`.
        act: what is done to the job.
        messages: patterns that stderr must hold; without "bnlayer launch: " in front.
        never: a pattern that neither output may hold.
        shows: what stdout must hold.
        service: what alone the job's service may say; "" if nothing.
        transports: over which it can happen.
        ranks: how many.
        grace: `--grace`.
        hangs_up: whether stdout is closed after its first line.
        keeps: files in the log folder, and what they must hold.
        program: what the ranks run instead of `body`.
        timeout: `join`'s.
        slow: whether it is run with the slow tests alone.
    """

    row: str
    code: int
    body: str = ""
    act: Callable[[Running], None] = _nothing
    messages: tuple[str, ...] = ()
    never: str = "SIGKILL sent"
    shows: Callable[[str], bool] = lambda out: True
    service: str = ""
    transports: tuple[str, ...] = ("service", "mpi")
    ranks: int = 2
    grace: float = 5.0
    hangs_up: bool = False
    keeps: dict[str, bytes] = field(default_factory=dict)
    program: tuple[str, ...] = ()
    timeout: float = 300
    slow: bool = False

    def command(self) -> tuple[str, ...]:
        """What every rank runs."""
        joined = _JOINED.format(self.timeout)
        return self.program or script(joined + "".join(f"    {line}\n" for line in self.body.strip().splitlines()))


_JOINED = """\
import bnworker
def ready():
    print('ready', os.getpid(), os.environ['BNLAYER_LAUNCH_DIR'], flush=True)
with bnworker.join(timeout={}) as w:
    w.barrier()
"""
# Short sleeps: a signal that comes between Python's last look and the system call is seen only once that ends.
_SLEEP = "while True: time.sleep(0.05)"
_WAIT = f"ready()\n{_SLEEP}"


def _sent(*numbers: int) -> Callable[[Running], None]:
    def act(job: Running) -> None:
        job.ready()
        for number in numbers:
            job.signal(number)

    return act


def _twice(job: Running) -> None:
    job.ready()
    job.signal(signal.SIGINT)
    job.err.until("SIGINT sent to ranks 0, 1")
    job.signal(signal.SIGINT)


def _kill_rank(job: Running) -> None:
    os.kill(job.ready()[1], signal.SIGKILL)


def _stop_rank(job: Running) -> None:
    os.kill(job.ready()[1], signal.SIGSTOP)


def _kill_backbone(job: Running) -> None:
    job.ready()
    os.kill(job.backbone(), signal.SIGKILL)


def _kill_guardian(job: Running) -> None:
    job.ready()
    os.kill(job.guardian(), signal.SIGKILL)
    job.signal(signal.SIGUSR1)
    job.signal(signal.SIGUSR2)


def _holds(*lines: str) -> Callable[[str], bool]:
    return lambda out: set(lines) <= set(out.splitlines())


def _megabytes(out: str) -> bool:
    def text(rank: int) -> str:
        return "".join(line[4:] for line in out.splitlines() if line.startswith(f"[{rank}] "))

    return all(text(rank) == str(rank) * 2**20 for rank in range(2))


_BACKGROUND = (
    "import subprocess\n"
    "subprocess.Popen(['sh', '-c', 'trap \"\" TERM INT HUP; while :; do sleep 1; done'], start_new_session=True, "
    "stdout=-3, stderr=-3)"
)
_IGNORE = "signal.signal(signal.{}, signal.SIG_IGN)\n"
_GOT_USR = (
    "got = []\n"
    "for number in (signal.SIGUSR1, signal.SIGUSR2): signal.signal(number, lambda n, _: got.append(n))\n"
    "ready()\n"
    "while len(got) < 2: signal.sigtimedwait([], 0.02)\n"
    "print('got', *sorted(got))"
)
_SAVES = f"try:\n    ready()\n    {_SLEEP}\nexcept KeyboardInterrupt: print('saved')"
# Not print: the signal may come while `ready` holds the lock of the output.
_SAVES_ON_TERM = "signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b'saved\\n'), os._exit(0)))\n" + _WAIT
# Rank 1 is still saving when rank 0 has ended: mpiexec ends the others within milliseconds of the first.
_SAVES_SLOWLY = (
    """\
first = int(w.allreduce([os.getpid() if rank == 0 else 0])[0])
def save(*_):
    try:
        while rank == 1: os.kill(first, 0); time.sleep(0.01)
    except ProcessLookupError: time.sleep(0.5)
    os.write(1, b'saved\\n')
    os._exit(0)
signal.signal(signal.SIGTERM, save)
"""
    + _WAIT
)
# Each byte is in the log, and so has been read by the launcher, before the next one is written.
_BYTE_BY_BYTE = (
    "text = 'a \\U0001f600 \\u20ac\\n'.encode()\n"
    "for count, byte in enumerate(text, 1):\n"
    "    os.write(1, bytes([byte]))\n"
    "    while os.stat(os.environ['LOGS'] + f'/rank-{rank}.out').st_size < count: time.sleep(0.002)"
)
_FAILS = "if rank == 1: {}\nw.barrier()"
_FORKS = (
    "import warnings\n"
    "warnings.simplefilter('ignore', DeprecationWarning)  # threads beside a fork\n"
    "child = os.fork()\n"
    "if child == 0:\n"
    "    try: w.allreduce([1000])\n"
    "    except bnworker.CollectiveError as error: print(str(error).replace(str(os.getpid()), 'PID').split(' (')[0])\n"
    "    sys.exit(3)  # through `with`, Python's atexit and that of C\n"
    "print('child:', os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *w.allreduce([1]))"
)

ENDINGS = (
    Ending("all ranks succeed", 0, "print('done')", shows=_holds("[0] done", "[1] done"), never="bnlayer launch:"),
    Ending(
        "a rank raises an exception",
        1,
        _FAILS.format("raise KeyError('mine')"),
        messages=("rank 1 exited with code 1",),
        ranks=3,
    ),
    Ending(
        "a rank exits with code 7", 7, _FAILS.format("sys.exit(7)"), messages=("rank 1 exited with code 7",), ranks=3
    ),
    Ending(
        "a rank leaves by os._exit(0), and others wait for it",
        1,
        _FAILS.format("os._exit(0)"),
        messages=("rank 1 exited with code 0 without leaving the job (os._exit?): a failure, code 1",),
        ranks=3,
    ),
    Ending(
        "a rank leaves the job, and then by os._exit(0)",
        1,
        "w.leave()\nif rank == 1: os._exit(0)",
        messages=("rank 1 exited with code 0 without the normal end that MPI needs (os._exit?): a failure, code 1",),
        transports=("mpi",),
    ),
    Ending(
        "a process that is forked from a rank ends by sys.exit(3)",
        0,
        _FORKS,
        shows=_holds(
            *(f"[{rank}] Process PID was forked from rank {rank}" for rank in range(2)),
            *(f"[{rank}] child: 3 2" for rank in range(2)),
        ),
        never="bnlayer launch:",
    ),
    Ending(
        "a rank is killed with SIGKILL",
        137,
        f"ready()\nif rank == 1:\n    {_SLEEP}\nw.barrier()",
        _kill_rank,
        messages=("rank 1 was killed by SIGKILL",),
        ranks=3,
    ),
    Ending(
        "a rank freezes (SIGSTOP)",
        1,
        f"ready()\nif rank == 1:\n    {_SLEEP}\nw.barrier()",
        _stop_rank,
        never="rank 1 was",
        service="rank 1 .* keeps 1 other waiting for [0-9.]+ s",
        grace=0.5,
        timeout=10,  # MPI sees a frozen rank by its silence alone
        slow=True,
    ),
    Ending(
        "a rank crashes with SIGSEGV",
        139,
        _FAILS.format("os.kill(os.getpid(), signal.SIGSEGV)"),
        messages=("rank 1 was killed by SIGSEGV",),
        ranks=3,
    ),
    Ending(
        "a rank exits with code 7, another ignores SIGTERM",
        7,
        _IGNORE.format("SIGTERM") + "w.barrier()\nif rank == 1: os._exit(7)\n" + _WAIT,
        messages=("rank 1 exited with code 7",),
        never="exited with code 1$",
        grace=0.5,
    ),
    Ending(
        "the service is killed with SIGKILL",
        137,
        _WAIT,
        _kill_backbone,
        messages=("the statistics service was killed by SIGKILL", "SIGTERM sent to ranks 0, 1"),
        transports=("service",),
        grace=0.5,
    ),
    Ending(
        "mpiexec is killed with SIGKILL",
        137,
        _WAIT,
        _kill_backbone,
        messages=("mpiexec was killed by SIGKILL",),
        transports=("mpi",),
    ),
    Ending("the launcher is killed with SIGKILL", 137, _BACKGROUND + "\n" + _WAIT, _sent(signal.SIGKILL)),
    Ending(
        "the launcher's guardian is killed with SIGKILL",
        0,
        _BACKGROUND + "\n" + _GOT_USR,
        _kill_guardian,
        shows=_holds("[0] got 10 12", "[1] got 10 12"),
    ),
    Ending(
        "Ctrl-C (SIGINT) once",
        130,
        _SAVES,
        _sent(signal.SIGINT),
        messages=("SIGINT sent to ranks 0, 1; SIGKILL follows in 30 s, or at once on Ctrl-C",),
        shows=_holds("[0] saved", "[1] saved"),
        grace=30,
    ),
    Ending(
        "Ctrl-C twice",
        130,
        _IGNORE.format("SIGINT") + _WAIT,
        _twice,
        messages=("SIGINT sent to ranks 0, 1", "SIGKILL sent to ranks 0, 1"),
        never="saved",
        grace=3600,
    ),
    Ending(
        "SIGTERM",
        143,
        _SAVES_ON_TERM,
        _sent(signal.SIGTERM),
        messages=("SIGTERM sent to ranks 0, 1",),
        shows=_holds("[0] saved", "[1] saved"),
        grace=30,
    ),
    Ending(
        "SIGTERM, and a rank saves longer than another",
        143,
        _SAVES_SLOWLY,
        _sent(signal.SIGTERM),
        messages=("SIGTERM sent to ranks 0, 1",),
        shows=_holds("[0] saved", "[1] saved"),
        grace=30,
    ),
    Ending("SIGHUP: the terminal is gone", 129, _WAIT, _sent(signal.SIGHUP), messages=("SIGTERM sent to ranks 0, 1",)),
    Ending(
        "SIGTERM, and the ranks ignore it",
        143,
        _IGNORE.format("SIGTERM") + _WAIT,
        _sent(signal.SIGTERM),
        messages=("SIGTERM sent to ranks 0, 1", "SIGKILL sent to ranks 0, 1"),
        never="saved",
        grace=0.5,
    ),
    Ending(
        "SIGUSR1, SIGUSR2",
        0,
        _GOT_USR,
        _sent(signal.SIGUSR1, signal.SIGUSR2),
        shows=_holds("[0] got 10 12", "[1] got 10 12"),
        never="bnlayer launch:",
    ),
    Ending(
        "a rank closes its output, and fails later",
        5,
        "if rank == 1: os.close(1); os.close(2)\nw.barrier()\nif rank == 0: print('after', flush=True)\n"
        "w.barrier()\nw.leave()\nif rank == 1: os._exit(5)",
        shows=_holds("[0] after"),
        messages=("rank 1 exited with code 5",),
    ),
    Ending(
        "a rank writes a megabyte without a line end",
        0,
        "os.write(1, str(rank).encode() * 2**19)\nos.write(1, str(rank).encode() * 2**19)",
        shows=_megabytes,
        keeps={f"rank-{rank}.out": str(rank).encode() * 2**20 for rank in range(2)},
        never="bnlayer launch:",
    ),
    Ending(
        "a rank writes a character byte by byte",
        0,
        _BYTE_BY_BYTE,
        shows=_holds("[0] a \U0001f600 \u20ac", "[1] a \U0001f600 \u20ac"),
        keeps={"rank-1.out": "a \U0001f600 \u20ac\n".encode()},
        never="bnlayer launch:",
    ),
    Ending(
        "nobody reads the output any more",
        141,
        "while True: print('y' * 100)",
        messages=("SIGTERM sent to ranks 0, 1",),
        hangs_up=True,
    ),
    Ending("a rank leaves a process in the background", 0, _BACKGROUND, never="bnlayer launch:"),
    Ending(
        "the command is not found", 127, program=("no-such-command",), messages=("no-such-command: command not found",)
    ),
)


def endings(transport: str) -> pytest.MarkDecorator:
    """The rows that can happen over a transport."""
    rows = [
        pytest.param(ending, id=ending.row, marks=[pytest.mark.slow] if ending.slow else [])
        for ending in ENDINGS
        if transport in ending.transports
    ]
    return pytest.mark.parametrize("ending", rows)


def play(ending: Ending, transport: str, folder: Path) -> None:
    """Run a job into its ending, and look at what comes of it."""
    options = [f"--transport={transport}", f"--grace={ending.grace}"]
    job = Running(ending.ranks, ending.command(), options, folder, hangs_up=ending.hangs_up)
    try:
        ending.act(job)
        killed = time.monotonic()
        code = job.end()
        if ending.row.startswith("the launcher is killed"):
            while job.carriers() and time.monotonic() < killed + _AFTER_KILL_S:
                time.sleep(0.01)
        left = job.carriers()
        out, err = job.out.all(), job.err.all()
        assert code == ending.code, (out, err)
        assert left == []
        # An Open MPI's mpiexec that was killed left its session here; the next with its pid did not start.
        assert list(job.temporary.iterdir()) == []
        assert ending.shows(out), (out, err)
        for pattern in ending.messages:
            assert re.search(f"^bnlayer(?: launch)?: (?:launch: )?{re.escape(pattern)}", err, re.MULTILINE), err
        assert not re.search(ending.never, out + err, re.MULTILINE), (out, err)
        for line in err.splitlines():
            assert not line.startswith("[service] ") or (ending.service and re.search(ending.service, line)), line
        if "ready" in out:
            assert not job.job_folder().exists()
        for name, held in ending.keeps.items():
            assert (folder / name).read_bytes() == held
    finally:
        job.clean_up()
