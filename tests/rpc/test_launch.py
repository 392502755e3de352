"""`bnlayer launch` with real processes: what ranks are given, and which of several failures counts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from support.processes import arguments, launch, launch_oddly, script

pytestmark = pytest.mark.rpc

# ---- what ranks are given ----


def test_ranks_reach_each_other_through_a_service_of_their_own() -> None:
    """The whole way: start a service, join, exchange, leave, stop the service."""
    done = launch(
        3,
        *script("import bnworker\nwith bnworker.join() as w: print(w.transport, w.world_size, *w.allreduce([rank]))"),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] service 3 3" for rank in range(3)]


def test_the_environment_of_a_rank() -> None:
    """Every variable that `join` reads; nothing of an outer launcher; an empty standard input."""
    text = (
        "import json; print(json.dumps({k: v for k, v in os.environ.items() "
        "if k.startswith(('BNLAYER_', 'PMI_RANK'))} | {'input': sys.stdin.read()}))"
    )
    environ = {**os.environ, "PMI_RANK": "0", "PMI_SIZE": "1", "BNLAYER_JOB": "named"}
    done = subprocess.run(
        arguments(2, *script(text)), capture_output=True, text=True, timeout=200, check=True, env=environ, input="x"
    )
    got = [json.loads(line.partition(" ")[2]) for line in sorted(done.stdout.splitlines())]
    for rank, variables in enumerate(got):
        assert variables.pop("BNLAYER_ADDRESS").startswith("127.0.0.1:")
        folder = Path(variables.pop("BNLAYER_LAUNCH_DIR"))
        assert not folder.exists()
        assert variables == {
            "BNLAYER_TRANSPORT": "service",
            "BNLAYER_RANK": str(rank),
            "BNLAYER_WORLD_SIZE": "2",
            "BNLAYER_JOB": "named",
            "input": "",
        }


def test_arguments_and_variables_arrive_as_given() -> None:
    """Whatever a shell or an mpiexec would see in them."""
    assert launch_oddly(()) == "[0] as given\n"


# ---- output ----


def test_output_is_prefixed_by_rank() -> None:
    """stdout to stdout, stderr to stderr; characters stay whole, and so does a last line without its end."""
    text = (
        "for piece in ('h\\u00e9'.encode()[:2], 'h\\u00e9'.encode()[2:], b'llo\\n', b'last'):\n"
        "    os.write(1, piece)\n"
        "os.write(2, b'oops\\n')"
    )
    done = launch(2, *script(text))
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["[0] h\u00e9llo", "[0] last", "[1] h\u00e9llo", "[1] last"]
    assert {"[0] oops", "[1] oops"} <= set(done.stderr.splitlines())


def test_much_output_from_many_arrives_whole() -> None:
    """More than pipes hold, from all ranks at once: every line is there, none is torn."""
    done = launch(3, *script("print('\\n'.join(f'{rank} {i}' for i in range(30000)))"))
    lines = done.stdout.splitlines()
    assert len(lines) == 90000
    for rank in range(3):
        mine = [line for line in lines if line.startswith(f"[{rank}] ")]
        assert mine == [f"[{rank}] {rank} {i}" for i in range(30000)]


# ---- exit codes ----


@pytest.mark.fault
def test_a_killed_rank() -> None:
    """128 + 9; the others were told by a CollectiveError, and their code comes second."""
    text = (
        "import bnworker\n"
        "with bnworker.join() as w:\n"
        "    w.barrier()\n"
        "    if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    w.barrier()"
    )
    done = launch(3, *script(text))
    assert done.returncode == 137
    assert "bnlayer launch: rank 1 was killed by SIGKILL" in done.stderr
    assert done.stderr.count("PeerLostError: ") == 2
    assert "SIGTERM" not in done.stderr  # they ended by themselves


def test_ranks_that_fail_as_a_consequence_come_second() -> None:
    """A rank that leaves with an exit code may end after those that are told of it."""
    text = (
        "import bnworker, select\n"
        "with bnworker.join() as w:\n"
        "    other = os.pidfd_open(int(w.allreduce([0 if rank else os.getpid()])[0]))\n"
        "    if rank == 1:\n"
        "        w._depart('failed with SystemExit: 7')\n"
        "        select.select([other], [], [])\n"
        "        sys.exit(7)\n"
        "    w.barrier()"
    )
    done = launch(2, *script(text))
    lines = [line for line in done.stderr.splitlines() if "exited with code" in line]
    assert lines == ["bnlayer launch: rank 0 exited with code 1", "bnlayer launch: rank 1 exited with code 7"]
    assert done.returncode == 7


# ---- another Python ----


def test_a_python_without_bnlayer_is_named(tmp_path: Path) -> None:
    """The command's Python is the first on PATH: a bare one has nothing to import. Other programs may not need it."""
    venv.create(tmp_path / "bare", symlinks=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    done = launch(2, python, "-c", "import bnworker")
    advice = (
        f"bnlayer launch: the ranks' Python, {python}, has no bnlayer: a program that imports it fails. Start them "
        f"with {sys.executable}, or install bnlayer there."
    )
    assert done.returncode == 1
    assert done.stderr.splitlines().count(advice) == 1
    done = launch(1, python, "-c", "raise SystemExit(3)")
    assert (done.returncode, done.stderr) == (3, "bnlayer launch: rank 0 exited with code 3\n")
    assert launch(1, python, "-c", "pass").stderr == ""


# ---- a service that runs already ----


def test_no_service_is_started_where_an_address_is_given() -> None:
    """The ranks find the address; what listens there is asked for no more than a connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        done = launch(1, *script("print(os.environ['BNLAYER_ADDRESS'])"), options=["--address", address])
    assert (done.returncode, done.stdout, done.stderr) == (0, f"[0] {address}\n", "")


def test_an_address_where_nobody_listens() -> None:
    """One line, exit code 2, and no rank is started: each of them would wait for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    done = launch(1, *script("print('started')"), options=["--address", address])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"bnlayer: launch: no statistics service at {address}: Connection refused. Check the address (--address or "
        f"BNLAYER_ADDRESS), or start one there: bnlayer serve --listen {address}\n"
    )
