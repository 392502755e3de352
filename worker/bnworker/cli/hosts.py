"""On which hosts a job runs: as options of `bnlayer launch` and `bnlayer train`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from bnworker.cli.errors import CommandError
from bnworker.train.declaration import Setting, at_least

if TYPE_CHECKING:
    from bnworker.launcher.starting import Several

_HOSTS = "Several hosts"


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

    def several(self, command: str, ranks: int, wait_s: float) -> Several | None:
        """For the launcher; None: there is one host.

        Args:
            command: for errors.
            ranks: on each host.
            wait_s: seconds until all must have come; 0: the default.

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
                self.node_rank * ranks,
                self.nnodes * ranks,
                self.insecure,
                *([wait_s] if wait_s else []),
            )
        except LaunchError as error:
            raise CommandError(f"{command}: {error}") from None
