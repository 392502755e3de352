"""`bnlayer launch --hosts` over real ssh servers: what is started from one host ends on every one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from support.hosts import SSH_PORT, Host, hosts, needs_nft, needs_root, needs_sshd, ssh_servers
from support.over_ssh import ENDINGS, MUTE, NOBODY, STRANGER, UNREACHED, UNREACHED_CODE, Ending, Unreached
from support.processes import PYTHON, script
from support.running import Running
from support.several import COMPUTES, JOINED

pytestmark = [pytest.mark.rpc, pytest.mark.fault, needs_root, needs_sshd]

_LEFT_S = 5.0  # the promise, as for launchers that were started by hand


@dataclass(frozen=True)
class Desk:
    """Where it is started, the hosts, another one that accepts connections and is silent, and how they are reached."""

    desk: Host
    hosts: tuple[Host, Host]
    mute: Host
    ssh: str
    servers: frozenset[int]

    def left(self) -> set[int]:
        """What runs on the hosts besides their ssh servers."""
        pids = {pid for host in self.hosts for pid in host.processes()} - self.servers
        return {pid for pid in pids if _name(pid) != "sshd"}  # one for each connection, which it may not know is dead

    def left_in_time(self) -> set[int]:
        """What still does when the promised time has passed."""
        deadline = time.monotonic() + _LEFT_S
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.left()


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "sshd"  # it has ended


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Two hosts with ssh servers, one to start from, and one without a server."""
    with (
        hosts("desk", "one", "two", "mute") as (origin, one, two, mute),
        ssh_servers((one, two), tmp_path_factory.mktemp("ssh")) as ssh,
    ):
        servers = frozenset(pid for host in (one, two) for pid in host.processes())
        yield Desk(origin, (one, two), mute, ssh, servers)


@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.row)
def test_ending(ending: Ending, desk: Desk, tmp_path: Path) -> None:
    """The exit code of the first cause; 5 s later nothing is left on either host. Lines carry host and rank."""
    one, two = desk.hosts
    where = ["--insecure", f"--ssh={desk.ssh}", f"--hosts={one.address}:2,{two.address}:2", "--grace=5"]
    job = Running(4, script(JOINED + "    " + ending.body), where, tmp_path / "logs", prefix=desk.desk.prefix)
    try:
        if "ready" in ending.body:
            job.ready()
        ending.act(job)
        code = job.end()
        left = desk.left_in_time()
        out, err = job.out.all(), job.err.all()
        assert code == ending.code, (out, err)
        assert left == set(), (out, err)
        assert re.search(re.escape(ending.says), err), err
        if ending.body.startswith("print"):
            assert sorted(out.splitlines()) == ["[one:0] done", "[one:1] done", "[two:2] done", "[two:3] done"]
    finally:
        job.clean_up()
        for pid in desk.left():
            os.kill(pid, signal.SIGKILL)


_SILENT = "import socket, time; s = socket.create_server(('', {port})); print('listens', flush=True); time.sleep(600)"


@pytest.mark.parametrize("host", UNREACHED, ids=lambda host: host.row)
def test_a_host_is_not_reached(host: Unreached, desk: Desk, tmp_path: Path) -> None:
    """ssh says why, the launcher which host; what was started on the other one ends."""
    one, two = desk.hosts
    subprocess.run([*desk.desk.prefix, *desk.ssh.split(), one.address, "true"], check=True, timeout=100)  # it listens
    where = {NOBODY: "10.77.0.99", STRANGER: f"stranger@{two.address}", MUTE: desk.mute.address}[host.host]
    silent = [*desk.mute.prefix, PYTHON, "-c", _SILENT.format(port=SSH_PORT)]
    # One attempt, and two seconds of the ten, for the test's sake.
    ssh = desk.ssh.replace("ssh ", "ssh -o ConnectionAttempts=1 -o ConnectTimeout=6 ", 1)
    options = ["--insecure", f"--ssh={ssh}", f"--hosts={one.address}:2,{where}:2", "--grace=5"]
    with subprocess.Popen(silent, stdout=subprocess.PIPE) as listener:
        assert listener.stdout is not None
        assert listener.stdout.readline() == b"listens\n"
        job = Running(4, script(JOINED + "    " + COMPUTES), options, tmp_path / "logs", prefix=desk.desk.prefix)
        try:
            code, err = job.end(), job.err.all()
            assert code == UNREACHED_CODE, err
            assert re.search(host.says, err), err
            assert f"bnlayer launch: the connection to {where} failed; ssh's reason is above. `ssh " in err
            assert f" {where} true` must work here, and ask for nothing\n" in err
            assert desk.left_in_time() == set(), err
        finally:
            job.clean_up()
            listener.kill()
            for pid in desk.left():
                os.kill(pid, signal.SIGKILL)


@needs_nft
def test_a_host_is_cut_off(desk: Desk, tmp_path: Path) -> None:
    """No packet says so: ssh gives up by its keep-alive options, the launchers on both hosts by theirs."""
    one, two = desk.hosts
    where = ["--insecure", f"--ssh={desk.ssh}", f"--hosts={one.address}:2,{two.address}:2", "--grace=5"]
    job = Running(4, script(JOINED + "    " + COMPUTES), where, tmp_path / "logs", prefix=desk.desk.prefix)
    try:
        job.ready()
        two.drop()
        code = job.end()
        assert desk.left_in_time() == set()
        assert code in (255, 137), job.err.all()  # whichever notices first
    finally:
        two.heal()
        job.clean_up()
        for pid in desk.left():
            os.kill(pid, signal.SIGKILL)
