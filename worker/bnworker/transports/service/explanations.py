"""What a rank's errors and log lines say of the service, of its connection, and of itself."""

from __future__ import annotations

from bnlayer.errors import ServiceError
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service.events import Disconnected


def left() -> ServiceError:
    """The rank has left, and can't make exchanges any more."""
    return ServiceError("This rank has left its job: join anew.")


def forked(pid: int, rank: int) -> ServiceError:
    """This process is a child of a rank."""
    return ServiceError(
        f"Process {pid} was forked from rank {rank}, which has joined its job: a rank is one process. Make exchanges "
        "there, or start processes before joining."
    )


def not_elastic(address: str) -> ServiceError:
    """The service is older than elastic jobs."""
    return ServiceError(
        f"The service at {address} does not know elastic jobs: use a newer one, or give every rank a fixed place "
        "(bnworker.join, no --elastic)."
    )


def out_of_step(address: str, answered: int, asked: int) -> ServiceError:
    """The service answered another contribution than the one that waits."""
    return ServiceError(
        f"The service at {address} answered contribution {answered}, expected an answer to {asked}. An exchange of "
        "this rank was interrupted: leave, and join anew."
    )


def late(address: str, timeout: float) -> ServiceError:
    """The service is connected, and does not answer."""
    return ServiceError(
        f"The service at {address} did not answer within {timeout:g} s. It may be frozen or cut off; if it is only "
        "slow, wait longer: timeout=."
    )


def never_reached(address: str, timeout: float) -> ServiceError:
    """No connection could be made."""
    return ServiceError(
        f"No statistics service could be reached at {address} within {timeout:g} s. Check the address, and that the "
        "service runs there (bnlayer serve --listen HOST:PORT)."
    )


def not_made_anew(address: str, outage: float, ended: Disconnected) -> ServiceError:
    """A connection broke, and no other one could be made."""
    return ServiceError(
        f"The connection to the service at {address} broke, and could not be made anew within {outage:g} s "
        f"({ended.code}: {ended.text}). It is down, or this host is cut off from it. Look at the service's log; "
        "once it is back, start the job again."
    )


def not_reached_yet(address: str, timeout: float) -> str:
    """No connection could be made so far."""
    return f"nobody listens at {address} yet; trying until {timeout:g} s have passed (timeout=)"


def broken(rank: int, address: str, outage: float, ended: Disconnected) -> str:
    """A connection broke, and another one is being made."""
    return (
        f"rank {rank}: the connection to the service at {address} broke ({ended.code}: {ended.text}); trying for "
        f"{outage:g} s to come back"
    )


def goodbye_repeated(rank: int, address: str, ended: Disconnected) -> str:
    """The connection ended before the goodbye was answered."""
    return (
        f"rank {rank} has left, and the service at {address} has not confirmed it yet ({ended.code}: {ended.text}): "
        "saying it again"
    )


def unconfirmed(join: pb.Join, address: str, why: str, *, saves: bool) -> str:
    """The goodbye was not answered as it should be.

    Args:
        join: who it is.
        address: of the service.
        why: what came instead.
        saves: whether the answer would have said that the job is on disk.
    """
    what = "that its job is on disk" if saves else "it"
    return (
        f"rank {join.rank} has left job {join.job!r}, but the service at {address} did not confirm {what}: "
        f"{why.rstrip('.')}."
    )
