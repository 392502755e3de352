"""`bnlayer train`: the main job, as the launcher of its ranks or as one of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnworker.cli import configuration
from bnworker.cli.elasticity import Elasticity
from bnworker.cli.errors import EXPLAINED, RESUMABLE, CommandError
from bnworker.cli.files import Files
from bnworker.cli.hosts import Hosts
from bnworker.cli.options import address_of_service, arguments, given, names, with_options
from bnworker.cli.ranks import Ranks, TrainTransport
from bnworker.cli.started import one_thread
from bnworker.train.settings import Settings

if TYPE_CHECKING:
    from bnlayer.environment import Announcement
    from bnworker.train.checkpoint import Checkpoint

# From Ctrl-C to SIGKILL: a step is ended, a checkpoint and a report are written; Kubernetes' own patience. A second
# Ctrl-C kills at once.
_STOP_S = 30.0
_OF_THE_LAUNCHER = ("config", "dry_run", *names(Ranks, Hosts, Elasticity))  # not passed on to ranks


@with_options(Ranks, Hosts, Elasticity, Settings, Files)
def train(
    context: typer.Context,
    data: Annotated[
        str, typer.Option(help="What to train on: `digits`, `mnist5k`, FILE.npz, or a folder of shards.")
    ] = "digits",
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Options from a file: `batch-size = 64`. Those of the command line beat it.",
            is_eager=True,
            callback=configuration.read,
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run/--no-dry-run", help="Show the plan: rows per rank, exchanges, bytes, memory. Start nothing."
        ),
    ] = False,
) -> None:
    """Train a perceptron with synchronized batch normalization, data-parallel.

    Two workers, through a statistics service that is started for the run:

    `bnlayer train --data digits --workers 2 --summary out/summary.json`

    The same over MPI: `bnlayer train --workers 3 --transport mpi`, or `mpiexec -n 3 bnlayer train`: inside mpiexec,
    torchrun, srun or `bnlayer launch`, the command is one of the ranks and starts none.

    On two hosts, started on each with its own --node-rank; data and, to go on, the checkpoint are on each:

    `bnlayer train --nnodes 2 --node-rank 0 --rendezvous one:7431 --insecure --workers 2`

    One that can be killed at any moment, and goes on when it is started again:

    `bnlayer train --workers 3 --save out/digits.safetensors --save-every 100 --resume`

    One that goes on when workers are lost, with two or more, and starts them again:

    `bnlayer train --workers 4 --elastic 2:4`

    The same over Open MPI, which starts none again: `mpirun --with-ft ulfm -n 4 bnlayer train --elastic 2:4`

    One that begins where a Keras or torch model of this form is, or an export of ours:

    `bnlayer train --data digits --init-from model.keras`

    The rows of a step, the loss and the statistics do not depend on the number of workers: nor does the result, up to
    the rounding of the Dense layers' gradients. `--transport none` shows what is lost without synchronization;
    with one worker it is a plain single process. A resumed run is bit for bit the one that was cut off, if the number
    of workers is the same; with another one, that rounding differs from there on.

    Ctrl-C, SIGTERM or SIGUSR1 ends it after the step under way: a checkpoint and the report are written. The exit code
    is 130 for Ctrl-C, and otherwise 75, if there is a checkpoint: the same command with --resume goes on.

    Exit code 1: training failed. 2: wrong options, data or checkpoint. Otherwise that of the first worker that failed.
    """
    del config
    one_thread()
    from bnlayer.environment import variable
    from bnworker.cli.checks import refuse_what_cannot_work
    from bnworker.cli.rank import run
    from bnworker.limits import VARIABLE as ELASTIC
    from bnworker.plan import survives_losses
    from bnworker.train.loop import Replica

    ranks, files = given(context, Ranks), given(context, Files)
    address = address_of_service(context, ranks.address, ranks.transport)
    rank, elastic = _rank(os.environ, ranks.workers), given(context, Elasticity)
    if elastic.elastic is not None and rank is not None and variable(os.environ, ELASTIC) is None:
        if ranks.transport not in (None, TrainTransport.mpi) or not (rank.mpi and survives_losses(os.environ)):
            raise CommandError(
                f"train: --elastic {elastic.elastic}, but {rank.source} started this process as rank {rank.rank}, and "
                "starts no rank again: leave it out, or let bnlayer start the ranks: train --workers. Over MPI it "
                "works under Open MPI's `mpirun --with-ft ulfm`."
            )
        os.environ[ELASTIC] = elastic.elastic
    settings = given(context, Settings)
    alone = ranks.transport is TrainTransport.none or (
        ranks.transport is None and variable(os.environ, "BNLAYER_TRANSPORT") == "alone"
    )
    hosts = given(context, Hosts)
    workers = ranks.workers or 1
    listed = hosts.listed("train", workers)
    many = rank.world_size if rank is not None else sum(n for _, n in listed) or workers * hosts.nnodes
    launching = rank is None and not dry_run and (ranks.transport is not TrainTransport.none or many > 1)
    start = refuse_what_cannot_work(data, settings, files, replicas=many if alone else 1, launching=launching)
    if dry_run:
        if rank is None or rank.rank == 0:
            _show(data, settings, many, str(ranks.transport or TrainTransport.service), start)
        return
    if launching:
        raise typer.Exit(_launch(context, ranks, hosts, elastic, address))
    run(
        data,
        settings,
        transport="alone" if alone else ranks.transport and ranks.transport.value,
        address=None if variable(os.environ, "BNLAYER_ADDRESS") == address else address,  # `join` sees it there
        job=ranks.job,
        replica=Replica(rank.rank, rank.world_size) if alone and rank is not None else Replica(),
        files=files,
    )


def _rank(environ: Mapping[str, str], workers: int | None) -> Announcement | None:
    """Which rank this process is, where a launcher started it as one of several.

    A Slurm step of one task is a shell on a compute node, not a rank.
    """
    from bnlayer.environment import announced

    try:
        announcement = next(iter(announced(environ)), None)
    except ValueError as error:
        raise CommandError(f"train: {error}") from None
    if announcement is None or (announcement.world_size == 1 and announcement.variable == "SLURM_PROCID"):
        return None
    if workers not in (None, announcement.world_size):
        source, outer = announcement.source, f"rank {announcement.rank} of {announcement.world_size}"
        raise CommandError(
            f"train: --workers {workers}, but {source} started this process as {outer}. Leave out --workers here, or "
            f"start the command without {source}."
        )
    return announcement


def _show(data: str, settings: Settings, workers: int, transport: str, start: Checkpoint | None) -> None:
    from bnworker.cli.forecast import show
    from bnworker.train.checkpoint import labels_of
    from bnworker.train.data import DataError, load
    from bnworker.train.initial import Sizes, fitted
    from bnworker.train.weight_files import WeightFileError, read

    settings = settings.completed(None if start is None else start.settings)
    try:
        loaded = load(
            data,
            settings.dtype,
            validation_split=settings.validation_split,
            labels=labels_of(settings, start),
        )
        if settings.init_from is not None and start is None:
            fitted(read(Path(settings.init_from)), Sizes.of(settings, loaded))
        show(settings, loaded, workers, transport, start)
    except (DataError, WeightFileError) as error:
        raise CommandError(f"train: {error}") from None


def _launch(context: typer.Context, ranks: Ranks, hosts: Hosts, elastic: Elasticity, address: str | None) -> int:
    """Start the ranks, each with this command's options."""
    from bnworker.launcher import Job, LaunchError, launch
    from bnworker.launcher.remote import launch as launch_over_ssh

    command = (sys.executable, "-P", "-m", "bnworker.cli.started", *arguments(context, without=_OF_THE_LAUNCHER))
    transport, workers = ranks.transport or TrainTransport.service, ranks.workers or 1
    kind = "alone" if transport is TrainTransport.none else transport.value
    try:
        if listed := hosts.listed("train", workers):
            options = {
                "transport": kind,
                "job": ranks.job or None,
                "address": address,
                "stop": _STOP_S,
                **elastic.given,
            }
            return launch_over_ssh(hosts.remote(listed, command, options))
        return launch(
            Job(
                command,
                workers,
                kind,
                address,
                ranks.job or None,
                foreground=True,
                program="train",
                stop_s=_STOP_S,
                explained=EXPLAINED,
                resumable=RESUMABLE,
                several=hosts.several("train", workers, 0.0),
                elastic=elastic.limits,
                max_restarts=elastic.max_restarts,
                final=frozenset({2, RESUMABLE}),
            )
        )
    except LaunchError as error:
        raise CommandError(f"train: {error}", error.code) from None
