"""`bnlayer serve` and `bnlayer doctor` as a user meets them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest

from support.service import daemon

pytestmark = pytest.mark.rpc

BNLAYER = (sys.executable, "-m", "bnworker.cli")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command from start to end."""
    return subprocess.run([*BNLAYER, *arguments], capture_output=True, text=True, timeout=200, check=False)


def test_serve_runs_until_a_signal() -> None:
    """It says where it listens; SIGTERM is an orderly end."""
    with subprocess.Popen(
        [*BNLAYER, "serve", "--listen", "127.0.0.1:0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as service:
        assert service.stdout is not None
        assert re.fullmatch(r"bnserver listening on 127\.0\.0\.1:\d+\n", service.stdout.readline())
        service.send_signal(signal.SIGTERM)
        assert service.wait(150) == 0


def test_serve_refuses_to_be_reached_in_plain_text() -> None:
    """Beyond loopback only with --insecure: exit code 2, no traceback."""
    done = run("serve", "--listen", "0.0.0.0:0")
    assert done.returncode == 2
    assert "--insecure" in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_reaches_a_service() -> None:
    """It asks the service itself."""
    with daemon() as address:
        done = run("doctor", "--address", address)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{address} answers: SERVING" in done.stdout


def test_doctor_says_that_nobody_answers() -> None:
    """Exit code 1; the rest is still said."""
    done = run("doctor", "--address", "127.0.0.1:1")
    assert done.returncode == 1
    assert "127.0.0.1:1 does not answer: UNAVAILABLE" in done.stdout
    assert re.search(r"^mpiexec +\S+/mpiexec \((MPICH|Open MPI)\)", done.stdout, re.MULTILINE)
    assert re.search(r"^numpy +\d", done.stdout, re.MULTILINE)
