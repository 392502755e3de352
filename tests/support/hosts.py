"""Hosts of a test's own: network namespaces with a name and an address each, on one bridge."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

SSH_PORT = 2222
NFT = "/usr/sbin/nft"
needs_sshd = pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="needs OpenSSH's sshd")
needs_nft = pytest.mark.skipif(not Path(NFT).exists(), reason="needs nftables' nft")
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="only root makes network namespaces, with iproute2's ip"
)


@dataclass(frozen=True)
class Host:
    """One of them.

    Attributes:
        name: its hostname.
        namespace: for `ip`.
        address: of its only interface, eth0.
        switch: the namespace of the bridge that it is on.
        table: a file with the names and addresses of all, its /etc/hosts.
    """

    name: str
    namespace: str
    address: str
    switch: str
    table: Path

    @property
    def prefix(self) -> list[str]:
        """What makes a command run there; the process is the command's."""
        # ip gives it a mount namespace of its own.
        own = f'hostname {self.name} && mount --bind {self.table} /etc/hosts && exec "$@"'
        named = ["unshare", "--uts", "sh", "-c", own, "sh"]
        return ["ip", "netns", "exec", self.namespace, *named]

    def processes(self) -> list[int]:
        """Everything that runs there."""
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split()]

    def sent(self) -> int:
        """Bytes that have left through its interface."""
        counter = "/sys/class/net/eth0/statistics/tx_bytes"
        return int(_ip("netns", "exec", self.namespace, "cat", counter))

    def cut_off(self) -> None:
        """Take its interface down: nothing arrives, and nobody is told."""
        _ip("-n", self.namespace, "link", "set", "eth0", "down")

    def connect(self) -> None:
        """Bring it up again."""
        _ip("-n", self.namespace, "link", "set", "eth0", "up")

    def drop(self) -> None:
        """Lose every packet to and from it on the way, until `heal`: its interface stays up."""
        rules = (
            "add table bridge partition",
            "add chain bridge partition lost { type filter hook forward priority 0; }",
            f'add rule bridge partition lost iifname "{self.name}" drop',
            f'add rule bridge partition lost oifname "{self.name}" drop',
        )
        for rule in rules:
            _ip("netns", "exec", self.switch, NFT, rule)

    def heal(self) -> None:
        """End what `drop` began."""
        _ip("netns", "exec", self.switch, NFT, "delete table bridge partition")


@contextmanager
def ssh_servers(on: Sequence[Host], folder: Path) -> Iterator[str]:
    """Run an sshd on each host, on a port of its own; yields the ssh command that is let in."""
    for name in ("host", "user"):
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)])
    (folder / "keys").write_bytes((folder / "user.pub").read_bytes())
    options = {
        "HostKey": folder / "host",
        "AuthorizedKeysFile": folder / "keys",
        "StrictModes": "no",
        "UsePAM": "no",
        "PidFile": "none",
        "PermitRootLogin": "yes",
        "Port": SSH_PORT,
    }
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))
    # The folder that it needs is in a file system of this process's own.
    own = f"mount -t tmpfs none /run && mkdir /run/sshd && exec /usr/sbin/sshd -D -e -f {folder / 'sshd_config'}"
    with ExitStack() as stack:
        for host in on:
            with (folder / f"sshd-{host.name}.log").open("wb") as log:
                process = subprocess.Popen(
                    [*host.prefix, "sh", "-c", own], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            stack.callback(_end, process)
        options = {
            "IdentityFile": folder / "user",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "no",
            "BatchMode": "yes",
            "LogLevel": "ERROR",
            "Port": SSH_PORT,
            "ConnectionAttempts": 60,  # one a second: until it listens
        }
        yield " ".join(["ssh", "-T", "-F", "none", *(f"-o {name}={value}" for name, value in options.items())])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@contextmanager
def hosts(*names: str) -> Iterator[list[Host]]:
    """Make hosts that reach each other; gone afterwards."""
    unique = f"bn{secrets.token_hex(3)}"
    switch, folder = f"{unique}-switch", Path(tempfile.mkdtemp(prefix="bnlayer-hosts-"))
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, start=1)}
    made = [Host(name, f"{unique}-{name}", address, switch, folder / "hosts") for name, address in addresses.items()]
    namespaces = [switch, *(host.namespace for host in made)]
    try:
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (folder / "hosts").write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
        for namespace in namespaces:
            _ip("netns", "add", namespace)
            _ip("-n", namespace, "link", "set", "lo", "up")
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for host in made:
            peer = ("peer", "name", "eth0", "netns", host.namespace)
            _ip("-n", switch, "link", "add", host.name, "type", "veth", *peer)
            _ip("-n", switch, "link", "set", host.name, "master", "bridge", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            _ip("-n", host.namespace, "link", "set", "eth0", "up")
        yield made
    finally:
        for namespace in namespaces:
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)
        shutil.rmtree(folder)


def _ip(*arguments: str) -> str:
    return _run(["ip", *arguments])


def _run(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
