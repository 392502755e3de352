"""`join`: the effects of joining a job, after `plan.py` has decided how."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bnlayer.environment import variable
from bnworker import own_service, process_groups
from bnworker.limits import RESTARTED, VARIABLE, Limits
from bnworker.plan import Plan, plan, survives_losses
from bnworker.presence import Presence
from bnworker.transports import Transport
from bnworker.transports.alone import AloneTransport
from bnworker.world import World

if TYPE_CHECKING:
    from bnworker.transports.mpi import MPITransport
    from bnworker.transports.mpi_recovery import RecoverableTransport

logger = logging.getLogger("bnworker")


def join(
    transport: str | None = None,
    address: str | None = None,
    job: str | None = None,
    token: str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    timeout: float = 300,
    deterministic: bool = False,
) -> World:
    """Make this process a rank of its job: over MPI, a process group of torch, a statistics service, or alone.

    Each argument that is None is looked up in the environment: `BNLAYER_TRANSPORT`, `BNLAYER_ADDRESS`,
    `BNLAYER_JOB`, `BNLAYER_TOKEN` (or `BNLAYER_TOKEN_FILE`), `BNLAYER_RANK` and `BNLAYER_WORLD_SIZE`; ranks then in the
    variables of mpiexec, torchrun and srun, in this order. An address means the service; an initialized
    torch.distributed means its process group; MPI's variables mean MPI; nothing means alone. The choice is logged by
    the logger `bnworker`. A service on this machine is reached over a local socket as well; `BNLAYER_LOCAL_SOCKET=0`
    does without. `BNLAYER_TLS_CA` makes the connection encrypted; `BNLAYER_TLS_CERT` and `BNLAYER_TLS_KEY` are this
    process's own certificate, where the service asks for one.

    Under torchrun and in a Slurm step the service needs no address: rank 0 starts one, and the others find it.

    Args:
        transport: "alone", "mpi", "service" or "torch", whose process group must have been initialized.
        address: of the service, "HOST:PORT"; with another transport, an error.
        job: the job's name at the service.
        token: for a service that asks for one. It is not sent in plain text to another machine, unless
            `BNLAYER_INSECURE=1`. The service that a job brings along asks for none, and a token is an error there.
        rank: who this process is, from 0.
        world_size: the number of ranks.
        timeout: seconds that joining, and each exchange, may take, outages of the service included.
        deterministic: under MPI and torch, add floats in rank order, as the service always does.

    Returns:
        The world, which is the process's current collective until it is left.

    Raises:
        ValueError: what is given or announced is incomplete or contradicts itself, or credentials can't be read.
        ImportError: transport "mpi" without mpi4py or without an MPI.
        RuntimeError: the process has joined already, or mpiexec belongs to another MPI than mpi4py.
        CollectiveError: the service refuses, or not all ranks came in time.
    """
    _refuse_timeout("join", timeout)
    if (elastic := variable(os.environ, VARIABLE)) is not None:
        raise ValueError(
            f"This job is elastic ({VARIABLE}={elastic}): its ranks change while it runs, and this program joins it "
            "once. Use bnworker.elastic() in place of bnworker.join(), or start the job without --elastic."
        )
    Presence.refuse_second()
    chosen = plan(
        os.environ,
        transport=transport,
        address=address,
        job=job,
        token=token,
        rank=rank,
        world_size=world_size,
        process_group=process_groups.is_initialized(),
    )
    world = World(_opened(chosen, float(timeout), deterministic))
    logger.info("rank %d of %d, transport %s: %s", world.rank, world.world_size, world.transport, chosen.reason)
    if chosen.warning:
        logger.warning("%s", chosen.warning)
    return world


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a rank was in an elastic job.

    Attributes:
        generation: its number.
        rank, world_size: as the service chose them, or the order of those that were left.
        transport: over MPI: its end of the exchanges, from which the next one is formed.
    """

    generation: int
    rank: int
    world_size: int
    transport: RecoverableTransport | None = None


def join_elastic(
    limits: Limits,
    before: Placement | None,
    *,
    address: str | None = None,
    job: str | None = None,
    token: str | None = None,
    timeout: float = 300,
) -> tuple[World, Placement]:
    """Make this process a rank of an elastic job's next generation; for `elastic`.

    Args:
        limits: how many ranks the job may have.
        before: where this process was in the generation before; None: it is new.
        address, job, token, timeout: as of `join`.

    Returns:
        The world, and where in the job it is.

    Raises:
        ValueError: as `join`; or the job would use neither a service that outlives its ranks, nor an MPI that lets
            them survive each other.
        RuntimeError: the process has joined already.
        JobFinishedError: the others have finished the job.
        RegroupError: the ranks changed again.
        CollectiveError: the service refuses, or too few ranks came in time.
    """
    _refuse_timeout("elastic", timeout)
    Presence.refuse_second()
    chosen = plan(os.environ, address=address, job=job, token=token, process_group=process_groups.is_initialized())
    if chosen.transport == "mpi" and survives_losses(os.environ):
        return _formed_over_mpi(chosen, limits, before, float(timeout))
    if chosen.transport != "service" or chosen.own is not None:
        own = chosen.own is not None
        what = (
            "a service that rank 0 would start, and that would end with it" if own else f"transport {chosen.transport}"
        )
        raise ValueError(
            f"elastic(): an elastic job needs a statistics service that outlives its ranks, and this one would use "
            f"{what} ({chosen.reason}). Start it with `bnlayer launch --elastic MIN:MAX`, or name a service: "
            "BNLAYER_ADDRESS. Over MPI it works under Open MPI's `mpirun --with-ft ulfm`."
        )
    from bnproto.v1 import statistics_pb2 as pb
    from bnworker.transports.service import ServiceTransport

    restarted = variable(os.environ, RESTARTED) is not None and before is None
    elastic = pb.Elastic(min=limits.minimum, max=limits.maximum, restarted=restarted)
    assert chosen.rank is not None
    assert chosen.world_size is not None
    rank, world_size = chosen.rank, chosen.world_size
    if before is not None:
        elastic.generation, rank, world_size = before.generation, before.rank, before.world_size
    transport = ServiceTransport(
        str(chosen.address),
        str(chosen.job),
        rank,
        world_size,
        timeout=timeout,
        local_socket=chosen.local_socket,
        credentials=chosen.credentials,
        elastic=elastic,
    )
    world = World(transport)
    placement = Placement(transport.generation, world.rank, world.world_size)
    logger.info("rank %d of %d in generation %d: %s", world.rank, world.world_size, placement.generation, chosen.reason)
    return world, placement


def _formed_over_mpi(chosen: Plan, limits: Limits, before: Placement | None, timeout: float) -> tuple[World, Placement]:
    """The next generation of ranks that Open MPI started, and lets survive each other."""
    _initialize_mpi_or_exit(timeout)
    from bnworker.transports import mpi_recovery
    from bnworker.transports.mpi_runtime import MPI

    if before is None and (text := _other_mpi(chosen, MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size)):
        raise RuntimeError(text)
    transport = mpi_recovery.formed(None if before is None else before.transport, limits, timeout)
    world = World(transport)
    placement = Placement(transport.generation, world.rank, world.world_size, transport)
    logger.info("rank %d of %d in generation %d: %s", world.rank, world.world_size, placement.generation, chosen.reason)
    return world, placement


def _refuse_timeout(function: str, timeout: float) -> None:
    if isinstance(timeout, bool) or not (timeout > 0 and math.isfinite(timeout)):
        raise ValueError(f"{function}(timeout=): expected a number of seconds above 0, received {timeout!r}.")


def _opened(chosen: Plan, timeout: float, deterministic: bool) -> Transport:
    if chosen.transport == "alone":
        return AloneTransport()
    if chosen.transport == "mpi":
        return _opened_mpi(chosen, timeout, deterministic)
    if chosen.transport == "torch":
        return process_groups.opened(chosen.rank, chosen.world_size, timeout, deterministic)
    from bnworker.transports.service import ServiceTransport

    assert chosen.job is not None
    assert chosen.rank is not None
    assert chosen.world_size is not None
    address, started = chosen.address, None
    if chosen.own is not None:
        address, started = own_service.reach(chosen.own, chosen.rank, timeout)
    assert address is not None
    try:
        return ServiceTransport(
            address,
            chosen.job,
            chosen.rank,
            chosen.world_size,
            timeout=timeout,
            local_socket=chosen.local_socket,
            credentials=chosen.credentials,
            left=None if started is None else started.stop,
        )
    except BaseException:
        if started is not None:
            started.stop()
        raise


def _opened_mpi(chosen: Plan, timeout: float, deterministic: bool) -> Transport:
    transport = _initialize_mpi_or_exit(timeout)(timeout=timeout, deterministic=deterministic)
    if not (text := _other_mpi(chosen, transport.rank, transport.world_size)):
        return transport
    transport.leave(f"failed with RuntimeError: {text}")
    raise RuntimeError(text)


def _other_mpi(chosen: Plan, rank: int, world_size: int) -> str:
    """What to say where mpi4py doesn't belong to the mpiexec that started this process; "" where it does."""
    if chosen.rank is None or (chosen.rank, chosen.world_size) == (rank, world_size):
        return ""
    return (
        f"This process is rank {chosen.rank} of {chosen.world_size} ({chosen.reason}), but to mpi4py it is rank "
        f"{rank} of {world_size}. Start it with the mpiexec of the MPI that mpi4py uses "
        "(python -m mpi4py --mpi-lib-version), and give no other rank=, world_size= or BNLAYER_RANK."
    )


def _initialize_mpi_or_exit(timeout: float) -> type[MPITransport]:
    """Import the transport, which initializes MPI: that blocks until every rank does it, and can't be interrupted.

    Where a rank never comes, only a C thread still runs: it prints where this one waits, and ends the process.
    """
    faulthandler.dump_traceback_later(timeout, exit=True)
    try:
        from bnworker.transports.mpi import MPITransport
    finally:
        faulthandler.cancel_dump_traceback_later()
    return MPITransport
