"""`bnlayer launch --transport mpi`: the same output, exit codes and ends as through the service."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.processes import children, gone, launch, launched, pids, script, watched

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(120)]

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


JOINED = "import bnworker\nwith bnworker.join() as w:\n    w.barrier()\n    if rank == 1: {}\n    w.barrier()"


@pytest.mark.fault
@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(7)", 7),
        ("os._exit(9)", 9),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139),
        ("raise ValueError('no')", 1),
    ],
)
def test_the_failing_ranks_code(end: str, code: int) -> None:
    """mpiexec ends the others; what it did to them does not count."""
    done = launch(3, *script(JOINED.format(end)), options=MPI)
    assert done.returncode == code, done.stderr


@pytest.mark.fault
def test_abort() -> None:
    """MPI_Abort's code is the job's."""
    text = "from mpi4py import MPI\nif rank == 1: MPI.COMM_WORLD.Abort(3)\nMPI.COMM_WORLD.Barrier()"
    assert launch(3, *script(text), options=MPI).returncode == 3


def test_command_not_found() -> None:
    """Found out before mpiexec is started."""
    done = launch(2, "no-such-command", options=MPI)
    assert (done.returncode, done.stderr) == (127, "bnlayer: launch: no-such-command: command not found\n")


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
        timeout=60,
        check=False,
        env={**os.environ, "PATH": str(bare)},
    )
    assert done.returncode == 2
    assert done.stderr == (
        "bnlayer: launch: transport mpi needs mpiexec: there is none beside this Python, nor on PATH. Install one, "
        "e.g. pip install 'bnlayer[mpich]'.\n"
    )


FOREVER = "import bnworker\nwith bnworker.join() as w:\n    print(os.getpid(), flush=True)\n    time.sleep(300)"


@pytest.mark.fault
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_nothing_is_left_running(number: int, code: int) -> None:
    """Ranks, mpiexec and the guardian end with the launcher, whatever ends it."""
    with launched(2, *script(FOREVER), options=MPI) as process:
        everybody = sorted({*pids(process, 2), *children(process.pid)})
        assert len(everybody) == 4
        with watched(everybody) as handles:
            process.send_signal(number)
            assert process.wait(30) == code
            assert gone(handles)
