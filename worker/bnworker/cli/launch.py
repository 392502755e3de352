"""`bnlayer launch`: any program, N ranks."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnworker.cli.elasticity import Elasticity
from bnworker.cli.errors import CommandError
from bnworker.cli.hosts import Hosts
from bnworker.cli.options import address_of_service, given, with_options

if TYPE_CHECKING:
    from bnworker.launcher.remote import Remote


class LaunchTransport(StrEnum):
    """How the ranks reach each other."""

    service = "service"
    mpi = "mpi"


@with_options(Hosts, Elasticity)
def launch(
    context: typer.Context,
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="-- COMMAND [ARGUMENT]...", help="The program of every rank.", show_default=False),
    ] = None,
    ranks: Annotated[int, typer.Option("-n", "--ranks", help="How many ranks, on each host.")] = 1,
    transport: Annotated[
        LaunchTransport, typer.Option(help="Through the statistics service, or as MPI ranks under mpiexec.")
    ] = LaunchTransport.service,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            envvar="BNLAYER_ADDRESS",
            help="Of a running service; without it one is started for this job, on a free loopback port.",
        ),
    ] = None,
    job: Annotated[
        str | None, typer.Option(envvar="BNLAYER_JOB", help="The job's name; a fresh one if not given.")
    ] = None,
    wait: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="For the service at --address to listen, or for the other hosts: 300 s if 0.",
        ),
    ] = 0.0,
    grace: Annotated[
        float,
        typer.Option(metavar="SECONDS", help="For the other ranks after a failure, and from SIGTERM to SIGKILL."),
    ] = 5.0,
    timestamps: Annotated[
        bool | None,
        typer.Option(
            "--timestamps/--no-timestamps",
            help="The time before each line; on a terminal if not given.",
            show_default=False,
        ),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep each rank's output in files there as well.", show_default=False),
    ] = None,
    first_rank: Annotated[int | None, typer.Option(hidden=True)] = None,
    world_size: Annotated[int | None, typer.Option(hidden=True)] = None,
    stop: Annotated[float | None, typer.Option(hidden=True)] = None,
    attached: Annotated[bool, typer.Option("--attached", hidden=True)] = False,
) -> None:
    """Run a program as N ranks on this machine, or on each of several.

    Four ranks of your own program, which calls `bnworker.join()`:

    `bnlayer launch -n 4 -- python my_training.py --epochs 3`

    The same under MPI: `bnlayer launch -n 4 --transport mpi -- python my_training.py --epochs 3`

    Eight on two hosts, started on each of them with its own --node-rank:

    `bnlayer launch --nnodes 2 --node-rank 0 --rendezvous one:7431 --insecure -n 4 -- python my_training.py`

    The same from one host, over ssh: `bnlayer launch --hosts one:4,two:4 --insecure -- python my_training.py`

    Every line of output carries its rank: `[2] epoch 1`, with several hosts `[two:5] epoch 1`; on a terminal also the
    time, and a colour (not with NO_COLOR). `--log-dir logs` keeps what each rank wrote in logs/rank-2.out and .err. The
    ranks' standard input is empty.

    When a rank fails, the others get 5 s (`--grace`), then SIGTERM, then SIGKILL, and the exit code is that of the
    first that failed (128 + signal if one ended it; 127 if there is no such command). Ctrl-C asks the ranks to end,
    a second one kills them. SIGUSR1 and SIGUSR2 are passed on. Nothing is left running, background processes of the
    ranks included.

    With `--elastic 2:8` the job goes on when ranks are lost, and others may join: the program then calls
    `bnworker.elastic()`. Lost ranks are started again, `--max-restarts` of them.

    Each rank finds BNLAYER_TRANSPORT, BNLAYER_RANK, BNLAYER_WORLD_SIZE, BNLAYER_JOB and, with a service,
    BNLAYER_ADDRESS.
    """
    from bnworker.launcher import Job, LaunchError, Output
    from bnworker.launcher import launch as run

    used = address_of_service(context, address, transport)
    hosts, elastic = given(context, Hosts), given(context, Elasticity)
    if listed := hosts.listed("launch", ranks):
        options: dict[str, object] = {"transport": transport.value, "job": job, "address": used, "wait": wait}
        options |= {"grace": grace, "timestamps": timestamps, "log-dir": log_dir, **elastic.given}
        raise typer.Exit(_launch_over_ssh(hosts.remote(listed, tuple(command or ()), options)))
    placement = None if first_rank is None or world_size is None else (first_rank, world_size)
    several = hosts.several("launch", ranks, wait, placement=placement, attached=attached)
    try:
        described = Job(
            tuple(command or ()),
            ranks,
            transport.value,
            used,
            job or None,
            wait_s=wait,
            grace_s=grace,
            stop_s=stop,
            several=several,
            elastic=elastic.limits,
            max_restarts=elastic.max_restarts,
        )
        code = run(described, Output(timestamps, log_dir))
    except LaunchError as error:
        raise CommandError(f"launch: {error}", error.code) from None
    raise typer.Exit(code)


def _launch_over_ssh(remote: Remote) -> int:
    from bnworker.launcher import LaunchError
    from bnworker.launcher.remote import launch as run

    try:
        return run(remote)
    except LaunchError as error:
        raise CommandError(f"launch: {error}", error.code) from None
