"""Which transport, and which rank? A pure decision over an environment and the arguments of `join`.

Laws:
1. An argument beats `BNLAYER_*`, which beat MPI's variables, which beat torchrun's, which beat those of a Kubernetes
   Job, which beat Slurm's.
2. Two sources that name different ranks are an error where guessing would train wrongly: `BNLAYER_RANK` against
   MPI or torchrun. Slurm's variables are inherited by a batch script's children, and a pod's by everything in it, so
   these only lose.
3. Nothing is read here but the mapping: no file, no socket, no MPI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from bnlayer.environment import Announcement, announced, batch_script, prte, variable
from bnproto.address import hint, split
from bnproto.credentials import NONE, Credentials, credentials
from bnworker.own_service import OwnService, own_service, refuse_credentials

TransportName = Literal["alone", "mpi", "service", "torch"]


@dataclass(frozen=True, slots=True)
class Plan:
    """How to join.

    Attributes:
        transport: how to reach the other ranks.
        rank, world_size: as announced. None under mpi where nothing announced them: MPI knows.
        address: of the service, "HOST:PORT"; None elsewhere, and so are the following.
        job: the job's name at the service.
        own: the service that the job brings along, in place of an address.
        local_socket: whether to use a local socket instead of gRPC where the service is on this machine.
        reason: why this transport and this rank, in words, for the log.
        warning: what the user should know of it; "" if nothing.
        credentials: what is used towards the service.
    """

    transport: TransportName
    rank: int | None
    world_size: int | None
    reason: str
    address: str | None = None
    job: str | None = None
    local_socket: bool = True
    warning: str = ""
    credentials: Credentials = NONE
    own: OwnService | None = None


def plan(
    environ: Mapping[str, str],
    *,
    transport: str | None = None,
    address: str | None = None,
    job: str | None = None,
    token: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    process_group: bool = False,
) -> Plan:
    """Decide how to join.

    Args:
        environ: the variables, e.g. `os.environ`.
        transport, address, job, token, rank, world_size: `join`'s arguments; None: not given.
        process_group: whether this process has initialized torch.distributed.

    Raises:
        ValueError: something is missing, contradicts something else, or is out of range.
    """
    launchers = announced(environ)
    chosen, why, address = _way(environ, transport, address, launchers, process_group)
    own = own_service(environ, launchers[0]) if chosen == "service" and not address and launchers else None
    if chosen == "alone":
        if transport is None and variable(environ, "BNLAYER_TRANSPORT") is None:
            _refuse_half(environ)
            if job is not None:
                raise ValueError("job= was given, but no address= (or BNLAYER_ADDRESS) of the service that knows it.")
            return _alone(rank, world_size, why, launchers, batch_script(environ) or "")
        return _alone(rank, world_size, why, launchers)
    rank, world_size, whence = _rank(environ, rank, world_size, launchers)
    if chosen in ("mpi", "torch"):
        return Plan(chosen, rank, world_size, f"{why}; {whence}")
    job, named = _job(environ, job, launchers)
    if own is not None:
        job = job or "job"  # it has no other
        named += f"; rank 0 starts the service at {own.listen}"
    missing = [
        f"{what} ({argument}= or {name})"
        for what, argument, name, value in (
            ("the service's address", "address", "BNLAYER_ADDRESS", address or own),
            ("the job's name", "job", "BNLAYER_JOB", job),
            ("this process's rank", "rank", "BNLAYER_RANK", rank),
            ("the number of ranks", "world_size", "BNLAYER_WORLD_SIZE", world_size),
        )
        if value is None
    ]
    if missing:
        raise ValueError(f"transport 'service': missing {', '.join(missing)}.")
    if address is not None:
        _refuse_address(address)
    local = variable(environ, "BNLAYER_LOCAL_SOCKET") or "1"
    if local not in ("0", "1"):
        raise ValueError(f"BNLAYER_LOCAL_SOCKET: expected 0 or 1, received {local!r}.")
    shown = credentials(environ, token)
    if own is not None:
        refuse_credentials(shown)
    else:
        shown.check(str(address))
    reason = f"{why}; {whence}{named}"
    return Plan("service", rank, world_size, reason, address, job, local == "1", credentials=shown, own=own)


def survives_losses(environ: Mapping[str, str]) -> bool:
    """Whether the ranks of an MPI job survive each other, as Open MPI's `mpirun --with-ft ulfm` says to its ranks."""
    return (variable(environ, "OMPI_MCA_mpi_ft_enable") or "").lower() in {"1", "true", "yes", "on", "t", "y"}


def _way(
    environ: Mapping[str, str],
    transport: str | None,
    given: str | None,
    launchers: list[Announcement],
    process_group: bool,
) -> tuple[TransportName, str, str | None]:
    """The transport, why, and the service's address."""
    if given and transport is None:  # an argument beats BNLAYER_TRANSPORT
        chosen, why = _at(given)
        return chosen, why + _beaten(environ, BNLAYER_TRANSPORT="service", BNLAYER_ADDRESS=given), given
    address = given or variable(environ, "BNLAYER_ADDRESS")
    chosen, why = _transport(environ, transport, address, launchers, process_group)
    if chosen == "service" or not address:
        beaten = _beaten(environ, BNLAYER_ADDRESS=given) if given else ""
        return chosen, why + beaten, address
    if given:
        raise ValueError(
            f"address= is of a statistics service, and transport={chosen!r} uses none: give transport='service' to "
            f"use the one at {given}, or leave out address=."
        )
    return chosen, f"{why}, so BNLAYER_ADDRESS={address} is not used", None


def _beaten(environ: Mapping[str, str], **given: str) -> str:
    """Which variables say something else than what was given, as text."""
    others = [
        f"{name}={variable(environ, name)}" for name in given if variable(environ, name) not in (None, given[name])
    ]
    return f", which beats {' and '.join(others)}" if others else ""


def _job(environ: Mapping[str, str], given: str | None, launchers: list[Announcement]) -> tuple[str | None, str]:
    """The job's name, and whence, if that is not plain."""
    if given:
        return given, _beaten(environ, BNLAYER_JOB=given) and f"; job= is given{_beaten(environ, BNLAYER_JOB=given)}"
    if (named := variable(environ, "BNLAYER_JOB")) is not None:
        return named, ""
    engine = next((launcher for launcher in launchers if launcher.job is not None), None)
    return (None, "") if engine is None else (engine.job, f"; {engine.source} names the job {engine.job}")


def _transport(
    environ: Mapping[str, str], given: str | None, address: str | None, launchers: list[Announcement], group: bool
) -> tuple[TransportName, str]:
    """The transport and why."""
    for value, source in ((given, "transport="), (variable(environ, "BNLAYER_TRANSPORT"), "BNLAYER_TRANSPORT")):
        if value is not None and value not in get_args(TransportName):
            raise ValueError(f"{source}: expected 'alone', 'mpi', 'service' or 'torch', received {value!r}.")
        if value is not None:
            return cast("TransportName", value), f"{source} says so"
    if address is not None:
        return _at(address)
    mpi = next((launcher.source for launcher in launchers if launcher.mpi), prte(environ))
    if mpi is not None:
        return "mpi", f"{mpi} started this process"
    if group:
        return "torch", "torch.distributed is initialized"
    many = next((launcher for launcher in launchers if launcher.world_size > 1), None)
    if many is not None and many is launchers[0] and own_service(environ, many) is not None:
        return "service", f"{many.source} announces {many.world_size} ranks"
    if many is not None:
        raise ValueError(
            f"{many.source} announces {many.world_size} ranks (this is rank {many.rank}), but not how they reach "
            "each other: give address= (or BNLAYER_ADDRESS) of a statistics service, or transport='mpi'; "
            "transport='alone' trains each rank for itself."
        )
    return "alone", "nothing announces other ranks"


def _at(address: str) -> tuple[TransportName, str]:
    return "service", f"the service's address is {address}"


def _alone(
    rank: int | None, world_size: int | None, why: str, launchers: list[Announcement], warning: str = ""
) -> Plan:
    if rank not in (None, 0) or world_size not in (None, 1):
        raise ValueError(
            f"transport 'alone' is a world of one: expected rank 0 of 1, received rank {rank} of {world_size}. "
            "Give address= or transport='mpi' for more."
        )
    many = next((launcher for launcher in launchers if launcher.world_size > 1), None)
    if many is not None:
        why += f", although {many.source} announces {many.world_size} ranks"
    return Plan("alone", 0, 1, why, warning=warning)


def _rank(
    environ: Mapping[str, str], rank: int | None, world_size: int | None, launchers: list[Announcement]
) -> tuple[int | None, int | None, str]:
    """The rank, the number of ranks, and whence."""
    if rank is None or world_size is None:
        _refuse_half(environ)
        _refuse_conflict(launchers)
        best = launchers[0] if launchers else None
        if best is None and (rank is None) != (world_size is None):
            raise ValueError(
                f"Expected both rank= and world_size=, received rank={rank} and world_size={world_size}, "
                "and no launcher announces the other."
            )
        if best is None:
            return None, None, "no launcher announces a rank"
        whence = f"{best.variable} says the rank" if rank is None else "rank= is given"
        rank = best.rank if rank is None else rank
        world_size = best.world_size if world_size is None else world_size
    else:
        whence = "rank= and world_size= are given"
    losers = [f"{a.variable}={a.rank}" for a in launchers if (a.rank, a.world_size) != (rank, world_size)]
    if losers:
        whence += f", which beats {' and '.join(losers)}"
    if not 0 <= rank < world_size:
        raise ValueError(f"Expected 0 <= rank < world_size, received rank {rank} of {world_size}.")
    return rank, world_size, whence


def _refuse_address(address: str) -> None:
    parts = split(address)
    if parts is None or parts[1] == 0:
        raise ValueError(
            f"The service's address: expected HOST:PORT, e.g. 127.0.0.1:50551; received {address!r}.{hint(address)}"
        )


def _refuse_half(environ: Mapping[str, str]) -> None:
    if variable(environ, "JOB_COMPLETION_INDEX") and not variable(environ, "BNLAYER_RANK"):
        return  # a pod's rank; its Job's manifest says how many there are
    for one, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if variable(environ, f"BNLAYER_{one}") and not variable(environ, f"BNLAYER_{other}"):
            raise ValueError(f"BNLAYER_{one} is set, but BNLAYER_{other} is not: set both, or neither.")


def _refuse_conflict(launchers: list[Announcement]) -> None:
    ours = next((a for a in launchers if a.variable == "BNLAYER_RANK"), None)
    if ours is None:
        return
    for other in launchers:
        if other.variable in ("SLURM_PROCID", "JOB_COMPLETION_INDEX") or (other.rank, other.world_size) == (
            ours.rank,
            ours.world_size,
        ):
            continue
        raise ValueError(
            f"Two launchers disagree: BNLAYER_RANK={ours.rank} of {ours.world_size}, but "
            f"{other.variable}={other.rank} of {other.world_size} ({other.source}). "
            "Start the ranks with one of them, or give rank= and world_size= to join()."
        )
