"""A statistics service that a job brings along: in a Slurm step, or under torchrun, where no address is given.

Rank 0 starts it, and the others find it:

    Slurm      the first host of the step, and a port from the job's and the step's number
    torchrun   any port of rank 0's host, which it puts into the store of torchrun's agent

It runs until every rank has left. Plain text leaves the host only where `BNLAYER_INSECURE=1` permits it; certificates
and tokens are for a service that `bnlayer serve` runs.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from bnlayer.environment import Announcement, variable
from bnproto.credentials import Credentials, CredentialsError, credentials

# Above the ports that Linux gives to connections; as JAX does.
_FIRST_PORT, _PORTS = 61_440, 4_096
_START_S = 60.0  # Python and gRPC on a cold disk beside busy ranks
_STOP_S = 20.0  # it waits up to 10 s for the other ranks to leave, and drains within 5
_KEY = "bnlayer/address/{}"  # in torchrun's store, for each restart
_DAEMON, _FAILPOINTS = "BNSERVER_", "BNSERVER_FAILPOINTS"


@dataclass(frozen=True, slots=True)
class OwnService:
    """Where it is.

    Attributes:
        listen: HOST:PORT for rank 0; port 0: any.
        insecure: whether other hosts shall reach it, in plain text.
        store: HOST:PORT of the store that says the port; None: `listen` does.
        key: of the address in this store.
    """

    listen: str
    insecure: bool
    store: tuple[str, int] | None = None
    key: str = ""


def own_service(environ: Mapping[str, str], launcher: Announcement) -> OwnService | None:
    """Where this launcher's ranks can have a service of their own; None: they can't.

    Raises:
        ValueError: they are on several hosts, and plain text between these is not permitted; or credentials are
            malformed.
    """
    if launcher.variable == "SLURM_PROCID":
        return _of_step(environ, launcher)
    if launcher.variable == "RANK" and variable(environ, "TORCHELASTIC_USE_AGENT_STORE") == "True":
        return _of_torchrun(environ, launcher)
    return None


def _of_step(environ: Mapping[str, str], launcher: Announcement) -> OwnService | None:
    nodes = variable(environ, "SLURM_STEP_NODELIST")
    job, step = variable(environ, "SLURM_JOB_ID"), variable(environ, "SLURM_STEP_ID")
    if nodes is None or job is None or step is None or not (job.isdecimal() and step.isdecimal()):
        return None
    port = _FIRST_PORT + (int(job) + 61 * int(step)) % (_PORTS - 1)
    if variable(environ, "SLURM_STEP_NUM_NODES") == "1":
        return OwnService(f"127.0.0.1:{port}", insecure=False)
    host = first_host(nodes)
    _refuse_plain_text(environ, launcher, f"{host}:{port}")
    return OwnService(f"{host}:{port}", insecure=True)


def _of_torchrun(environ: Mapping[str, str], launcher: Announcement) -> OwnService | None:
    host, port = variable(environ, "MASTER_ADDR"), variable(environ, "MASTER_PORT")
    if host is None or port is None or not port.isdecimal():
        return None
    key = _KEY.format(variable(environ, "TORCHELASTIC_RESTART_COUNT") or "0")
    if variable(environ, "LOCAL_WORLD_SIZE") == variable(environ, "WORLD_SIZE"):
        return OwnService("127.0.0.1:0", insecure=False, store=(host, int(port)), key=key)
    _refuse_plain_text(environ, launcher, host)
    return OwnService(f"{host}:0", insecure=True, store=(host, int(port)), key=key)


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: n01 of `n[01-03,7],m1`."""
    match = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\]([^,\[]*))?", nodes)
    assert match is not None  # it matches the empty text
    return "".join(part for part in match.groups() if part)


def _refuse_plain_text(environ: Mapping[str, str], launcher: Announcement, where: str) -> None:
    if not credentials(environ).insecure:
        raise ValueError(
            f"{launcher.source} announces {launcher.world_size} ranks (this is rank {launcher.rank}) on several hosts, "
            f"and no address of a statistics service. Rank 0 can start one at {where}, in plain text and without a "
            "check of who joins: set BNLAYER_INSECURE=1 if the network is your own. Or give address= (or "
            "BNLAYER_ADDRESS)."
        )


def refuse_credentials(shown: Credentials) -> None:
    """Make sure that nobody expects encryption or tokens of a service that a job starts itself.

    Raises:
        CredentialsError: there are credentials, which it would not look at.
    """
    if shown.has_token or shown.ca is not None:
        what = " and ".join(["a token"] * shown.has_token + ["BNLAYER_TLS_CA"] * (shown.ca is not None))
        raise CredentialsError(
            f"The job starts its own service, which has neither encryption nor tokens yet; received {what}. Start one "
            "that has with bnlayer serve, and give its address; or take the credentials out of the environment."
        )


def daemon_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of such a service: what they say of another daemon, such as its certificates, is not for it."""
    return {name: text for name, text in environ.items() if not name.startswith(_DAEMON) or name == _FAILPOINTS}


class Started:
    """The service, on rank 0.

    Args:
        service: where it listens.

    Raises:
        RuntimeError: it did not start.

    Attributes:
        address: HOST:PORT.
    """

    def __init__(self, service: OwnService) -> None:
        script = str(Path(__file__).with_name("own_service_process.py"))
        command = [sys.executable, "-I", script, service.listen, *(["--insecure"] if service.insecure else [])]
        # A session of its own: it outlives the signals that end the ranks, as it must to tell the others of it.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=daemon_environment(os.environ),
            start_new_session=True,
            text=True,
        )
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], _START_S)
        self.address = self._process.stdout.readline().strip() if ready else ""
        if not self.address:
            self.stop()
            raise RuntimeError(
                f"Rank 0 could not start the statistics service of this job at {service.listen}; what it said stands "
                "above. Start one with bnlayer serve, and set BNLAYER_ADDRESS."
            )

    def stop(self) -> None:
        """End it, once every rank has left."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.write(".")
            self._process.stdin.close()
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def reach(service: OwnService, rank: int, timeout: float) -> tuple[str, Started | None]:
    """The service's address; rank 0 starts it.

    Raises:
        RuntimeError: it did not start.
        ImportError: torchrun started this process, and there is no torch.
    """
    started = Started(service) if rank == 0 else None
    address = started.address if started is not None else service.listen
    if service.store is None:
        return address, started
    store = _store(*service.store, timeout)
    if started is not None:
        store.set(service.key, address)
        return address, started
    return store.get(service.key).decode(), None  # waits until it is there


def _store(host: str, port: int, timeout: float) -> Any:
    from torch.distributed import TCPStore

    return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout))
