"""On which hosts a job runs: as options of `bnlayer launch` and `bnlayer train`."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from bnworker.cli.errors import CommandError
from bnworker.train.declaration import Setting, at_least

if TYPE_CHECKING:
    from bnworker.launcher.remote import Remote
    from bnworker.launcher.starting import Several

_HOSTS = "Several hosts"
_WAIT_S = 300.0  # for the other hosts, where nothing else is said: as long as `join` waits for ranks


@dataclass(frozen=True, slots=True)
class Hosts:
    """Which of several hosts this one is, and where they meet; torchrun's words."""

    nnodes: Annotated[int, Setting("How many hosts: the same command is started on each.", _HOSTS, at_least(1))] = 1
    node_rank: Annotated[
        int | None, Setting("Which of them this one is, from 0. Node 0 keeps the service.", _HOSTS, at_least(0))
    ] = None
    rendezvous: Annotated[
        str | None,
        Setting(
            "Where they meet: an address of node 0 that all can reach, and a port; the one after it is used too.",
            _HOSTS,
            metavar="HOST:PORT",
        ),
    ] = None
    insecure: Annotated[
        bool,
        Setting("Plain text between the hosts, and no check of who joins: for trusted networks.", _HOSTS),
    ] = False

    hosts: Annotated[
        str | None,
        Setting(
            "Start it on these, over ssh: names, each with its ranks. In place of --nnodes and --node-rank.",
            _HOSTS,
            metavar="HOST[:N],...",
        ),
    ] = None
    hostfile: Annotated[
        Path | None, Setting("The same from a file, one host a line: `a:4` or `a slots=4`.", _HOSTS, metavar="FILE")
    ] = None
    ssh: Annotated[
        str | None, Setting("What to start it with instead of ssh, e.g. `ssh -p 2222`.", _HOSTS, metavar="COMMAND")
    ] = None

    def listed(self, command: str, ranks: int) -> tuple[tuple[str, int], ...]:
        """The hosts to start it on over ssh, each with its number of ranks; empty: none.

        Args:
            command: for errors.
            ranks: on a host that is listed without a number.

        Raises:
            CommandError: they are malformed, or given together with what is for one host.
        """
        if self.hosts is None and self.hostfile is None:
            return ()
        if self.hosts is not None and self.hostfile is not None:
            raise CommandError(f"{command}: --hosts and --hostfile: give one of them.")
        if self.nnodes != 1 or self.node_rank is not None:
            raise CommandError(
                f"{command}: --hosts starts the command on each host; --nnodes and --node-rank are for starting it."
            )
        name = "--hosts" if self.hosts is not None else f"--hostfile {self.hostfile}"
        try:
            text = self.hosts if self.hostfile is None else self.hostfile.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CommandError(f"{command}: {name}: {getattr(error, 'strerror', None) or error}.") from None
        lines = [part.strip() for line in (text or "").splitlines() for part in line.partition("#")[0].split(",")]
        pairs = []
        for line in filter(None, lines):
            match = re.fullmatch(r"([^\s:]+)(?:(?::|\s+slots\s*=\s*)([1-9]\d*))?", line)
            if match is None:
                hint = " Give an IPv6 address a name, in /etc/hosts or ~/.ssh/config." if line.count(":") > 1 else ""
                raise CommandError(
                    f"{command}: {name}: expected HOST, HOST:N or HOST slots=N, received {line!r}.{hint}"
                )
            pairs.append((match[1], int(match[2] or ranks)))
        if not pairs:
            raise CommandError(f"{command}: {name}: expected a host, received none.")
        return tuple(pairs)

    def remote(
        self, hosts: tuple[tuple[str, int], ...], program: tuple[str, ...], options: Mapping[str, object]
    ) -> Remote:
        """For the launcher over ssh.

        Args:
            hosts: as of `listed`.
            program: of every rank.
            options: of the launchers there; those that are None or False are left out.
        """
        from bnworker.launcher.remote import AGENT, Remote

        host = hosts[0][0].rpartition("@")[2]
        # Likely to be free there, as is the one after it: below those that kernels choose themselves.
        rendezvous = self.rendezvous or f"{host}:{10_000 + 2 * secrets.randbelow(10_000)}"
        given = tuple(
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in options.items()
            if value is not None and value is not False
        )
        return Remote(program, hosts, rendezvous, self.insecure, self.ssh or AGENT, given)

    def several(
        self,
        command: str,
        ranks: int,
        wait_s: float,
        *,
        placement: tuple[int, int] | None = None,
        attached: bool = False,
    ) -> Several | None:
        """For the launcher; None: there is one host.

        Args:
            command: for errors.
            ranks: on each host.
            wait_s: seconds until all must have come; 0: the default.
        placement: the first rank here, and the number of ranks, where not all hosts have as many.
        attached: see `Several`.

        Raises:
            CommandError: what is given does not go together.
        """
        from bnworker.launcher import LaunchError, Several

        if self.nnodes == 1 and self.rendezvous is None:
            if self.node_rank:
                raise CommandError(f"{command}: --node-rank {self.node_rank} needs --nnodes, the number of hosts.")
            return None
        if self.node_rank is None or self.rendezvous is None:
            missing = "--node-rank" if self.node_rank is None else "--rendezvous"
            raise CommandError(
                f"{command}: --nnodes {self.nnodes} needs {missing} on each host, e.g. --node-rank 0 --rendezvous "
                "one:7431."
            )
        try:
            return Several(
                self.nnodes,
                self.node_rank,
                self.rendezvous,
                *(placement or (self.node_rank * ranks, self.nnodes * ranks)),
                self.insecure,
                wait_s or _WAIT_S,
                attached,
            )
        except LaunchError as error:
            raise CommandError(f"{command}: {error}") from None
