"""`bnlayer launch --transport mpi`: the same output and exit codes as through the service."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from bnworker.launcher import mpirank
from support.processes import launch, launch_oddly, launched, script

pytestmark = pytest.mark.mpi

MPI = ("--transport", "mpi")


def test_ranks_reach_each_other() -> None:
    """MPI's ranks are the launcher's, and their output looks as it does through the service."""
    text = "import bnworker\nwith bnworker.join() as w: print(w.transport, w.rank == rank, *w.allreduce([rank]))"
    done = launch(3, *script(text), options=MPI)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] mpi True 3" for rank in range(3)]


def test_output_is_prefixed_by_rank() -> None:
    """stdout to stdout, stderr to stderr, a last line without its end: nothing of it goes through mpiexec."""
    done = launch(2, *script("os.write(1, 'h\\u00e9\\nlast'.encode()); os.write(2, b'oops\\n')"), options=MPI)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["[0] h\u00e9", "[0] last", "[1] h\u00e9", "[1] last"]
    assert {"[0] oops", "[1] oops"} <= set(done.stderr.splitlines())


def test_arguments_and_variables_arrive_as_given() -> None:
    """mpiexec took an argument ":" for the end of its command, and ran what followed as another program."""
    assert launch_oddly(MPI) == "[0] as given\n"


@pytest.mark.fault
def test_a_program_that_knows_mpi_alone() -> None:
    """A rank that ends with 0 without finalizing MPI: mpiexec kills the others, whatever it says itself."""
    text = "from mpi4py import MPI\nMPI.COMM_WORLD.Barrier()\nif rank == 1: os._exit(0)\nMPI.COMM_WORLD.Barrier()"
    done = launch(2, *script(text), options=MPI)
    assert done.returncode != 0
    assert "bnlayer launch: rank 0 " in done.stderr  # did not report an end, or was killed


@pytest.mark.fault
def test_a_process_in_the_background_keeps_nothing_waiting() -> None:
    """A shell's has all of the rank's descriptors, those of MPICH's mpiexec too; it is killed with the job."""
    done = launch(2, "sh", "-c", "[ $BNLAYER_RANK = 1 ] || { sleep 1000 & echo $!; }", options=MPI)
    assert done.returncode == 0, done.stderr
    with suppress(FileNotFoundError):
        assert Path("/proc", done.stdout.split()[-1], "stat").read_text(encoding="ascii").split()[2] == "Z"


@contextmanager
def _rank_of_mpich(
    folder: Path, command: str, *, finalized: bool = False
) -> Iterator[tuple[subprocess.Popen[bytes], socket.socket]]:
    """Rank 1 of 2 as MPICH's mpiexec starts it, and mpiexec's end of the connection, closed by `MPI_Finalize`."""
    for name in ("out", "err", "end"):
        os.mkfifo(folder / f"1.{name}")
    pipes = [os.open(folder / f"1.{name}", os.O_RDWR) for name in ("out", "err", "end")]
    ours, theirs = socket.socketpair()
    if finalized:
        ours.close()
    shim = subprocess.Popen(
        [sys.executable, "-I", "-S", mpirank.__file__, str(folder), "2", "=sh", "=-c", f"={command}"],
        env={**os.environ, "PMI_RANK": "1", "PMI_FD": str(theirs.fileno())},
        pass_fds=[theirs.fileno()],
    )
    theirs.close()
    try:
        yield shim, ours
    finally:
        shim.kill()
        shim.wait()
        ours.close()
        for pipe in pipes:
            os.close(pipe)


@pytest.mark.fault
@pytest.mark.parametrize("end", ["the other rank's", "a signal"])
def test_mpiexec_sees_that_the_connection_is_lost_before_the_end(tmp_path: Path, end: str) -> None:
    """MPICH's does not end the others for an end with 0 that it sees first."""
    with _rank_of_mpich(tmp_path, "exit 0") as (shim, connection):
        connection.settimeout(60)
        assert connection.recv(1) == b""
        with pytest.raises(subprocess.TimeoutExpired):
            shim.wait(0.5)  # an end that was to come at once would
        if end == "a signal":
            shim.send_signal(signal.SIGTERM)
        else:
            (tmp_path / "0.ended").touch()
        assert shim.wait(60) == 0


@pytest.mark.fault
@pytest.mark.parametrize(("command", "code", "finalized"), [("exit 0", 0, True), ("exit 3", 3, False)])
def test_a_rank_of_mpich_that_has_finalized_or_failed_waits_for_nobody(
    tmp_path: Path, command: str, code: int, finalized: bool
) -> None:
    """Nothing is left that mpiexec would have to notice."""
    with _rank_of_mpich(tmp_path, command, finalized=finalized) as (shim, _):
        assert shim.wait(60) == code


@pytest.mark.fault
def test_an_exit_code_that_could_be_a_signal() -> None:
    """MPICH's mpiexec says 9 for code 9 and for signal 9; the rank itself says which."""
    text = (
        "import bnworker\nwith bnworker.join() as w:\n    w.barrier()\n    if rank == 1: os._exit(9)\n    w.barrier()"
    )
    done = launch(3, *script(text), options=MPI)
    assert done.returncode == 9, done.stderr


@pytest.mark.fault
def test_the_first_cause_may_end_after_its_consequences(tmp_path: Path) -> None:
    """mpiexec ends a job with the first failure it hears of; of one that is no cause it must not hear first."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    text = (
        "import select\n"
        "from bnworker.failure_marker import mark\n"
        "if rank == 0:\n"
        f"    open({str(gate)!r}, 'w').write(str(os.getpid()))\n"
        "    mark()\n"
        "    sys.exit(1)\n"
        f"other = os.pidfd_open(int(open({str(gate)!r}).read()))\n"
        "select.select([other], [], [])\n"
        "time.sleep(1)  # in which mpiexec would end this rank\n"
        "sys.exit(7)"
    )
    done = launch(2, *script(text), options=MPI)
    lines = [line for line in done.stderr.splitlines() if line.startswith("bnlayer launch: rank")]
    assert lines == ["bnlayer launch: rank 0 exited with code 1", "bnlayer launch: rank 1 exited with code 7"]
    assert done.returncode == 7, done.stderr


@pytest.mark.fault
def test_abort() -> None:
    """MPI_Abort's code is the job's."""
    text = "from mpi4py import MPI\nif rank == 1: MPI.COMM_WORLD.Abort(3)\nMPI.COMM_WORLD.Barrier()"
    assert launch(3, *script(text), options=MPI).returncode == 3


def test_no_mpiexec(tmp_path: Path) -> None:
    """One line that says what to install."""
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "python").symlink_to(sys.executable)
    (bare / "true").symlink_to("/bin/true")
    # Run by its new name, this Python has no mpiexec beside it; it finds its packages by the path it is given.
    code = f"import sys; sys.path[:] = {sys.path!r}; from bnworker.cli import main; main()"
    done = subprocess.run(
        [bare / "python", "-c", code, "launch", *MPI, "--", "true"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PATH": str(bare)},
    )
    assert done.returncode == 2
    assert done.stderr == (
        "bnlayer: launch: transport mpi needs mpiexec: there is none beside this Python, nor on PATH. Install one, "
        "e.g. pip install 'bnlayer[mpich]'.\n"
    )


def test_the_doctor_finds_mpi_despite_files_named_like_modules(tmp_path: Path) -> None:
    """A `types.py` in the current folder is nobody's module but the user's."""
    for name in ("types.py", "mpi4py.py", "socket.py"):
        (tmp_path / name).write_text("raise SystemExit('not this one')", encoding="utf-8")
    doctor = Path(sys.executable).with_name("bnlayer")
    done = subprocess.run([doctor, "doctor"], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("MPI library"))
    assert "MPI" in line.removeprefix("MPI library"), line


def test_a_rank_gets_sigpipe_from_a_broken_pipe() -> None:
    """What Python ignores for itself, a program of another kind does not: it ends as it does in a shell."""
    done = launch(1, "sh", "-c", "kill -PIPE $$; echo alive", options=MPI)
    assert (done.returncode, done.stdout) == (141, "")


@pytest.mark.fault
def test_a_rank_that_has_ended_costs_nothing(tmp_path: Path) -> None:
    """Pipes whose other end is gone are always ready: who goes on watching them takes a whole core."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    text = f"print('here', flush=True)\nif rank == 0: open({str(gate)!r}).read()"
    with launched(2, *script(text), options=MPI) as process:
        stat = Path(f"/proc/{process.pid}/stat")
        assert process.stdout is not None
        assert {process.stdout.readline() for _ in range(2)} == {"[0] here\n", "[1] here\n"}
        before, began = _ticks(stat), time.monotonic()
        time.sleep(1.5)  # the time in which it must not work
        share = (_ticks(stat) - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - began)
        gate.write_text("", encoding="ascii")
        assert process.wait(150) == 0
    assert share < 0.1


def _ticks(stat: Path) -> int:
    """The processor time of a process: utime and stime, the fields 14 and 15."""
    return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))
