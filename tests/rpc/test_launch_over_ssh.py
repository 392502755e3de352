"""`bnlayer launch --hosts` over real ssh servers: what is started from one host ends on every one."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from bnworker.launcher.remote import AGENT
from support.hosts import Host, hosts, needs_nft, needs_root, needs_sshd, ssh_servers
from support.over_ssh import ENDINGS, Ending
from support.processes import script
from support.running import Running
from support.several import COMPUTES, JOINED

pytestmark = [pytest.mark.rpc, pytest.mark.fault, needs_root, needs_sshd]

_LEFT_S = 5.0  # the promise, as for launchers that were started by hand


@dataclass(frozen=True)
class Desk:
    """Where it is started, the hosts, and how they are reached."""

    desk: Host
    hosts: tuple[Host, Host]
    ssh: str
    servers: frozenset[int]

    def left(self) -> set[int]:
        """What runs on the hosts besides their ssh servers."""
        found = {pid for host in self.hosts for pid in host.processes()} - self.servers
        return {pid for pid in found if _name(pid) != "sshd"}  # one for each connection, which it may not know is dead


def _name(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return "sshd"  # it has ended


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """Two hosts with ssh servers, and one to start from."""
    with (
        hosts("desk", "one", "two") as (origin, one, two),
        ssh_servers((one, two), tmp_path_factory.mktemp("ssh")) as ssh,
    ):
        servers = frozenset(pid for host in (one, two) for pid in host.processes())
        yield Desk(origin, (one, two), ssh, servers)


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
        ended = time.monotonic()
        while desk.left() and time.monotonic() < ended + _LEFT_S:
            time.sleep(0.02)
        left = desk.left()
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


@needs_nft
def test_a_host_is_cut_off(desk: Desk, tmp_path: Path) -> None:
    """No packet says so: ssh gives up by its keep-alive options, the launchers on both hosts by theirs."""
    one, two = desk.hosts
    ssh = f"{desk.ssh} {AGENT.partition('BatchMode=yes ')[2]}"
    where = ["--insecure", f"--ssh={ssh}", f"--hosts={one.address}:2,{two.address}:2", "--grace=5"]
    job = Running(4, script(JOINED + "    " + COMPUTES), where, tmp_path / "logs", prefix=desk.desk.prefix)
    try:
        job.ready()
        two.drop()
        code = job.end()
        ended = time.monotonic()
        while desk.left() and time.monotonic() < ended + _LEFT_S:
            time.sleep(0.02)
        assert desk.left() == set()
        assert code in (255, 137), job.err.all()  # whichever notices first
    finally:
        two.heal()
        job.clean_up()
        for pid in desk.left():
            os.kill(pid, signal.SIGKILL)
