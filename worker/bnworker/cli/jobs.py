"""`bnlayer jobs`: what runs on a service, who waits for whom, and which rank holds up the others."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bnworker.cli.errors import CommandError

if TYPE_CHECKING:
    from rich.table import Table

_ANSWER_S = 10.0
_EVERY_S = 1.0
_SHOWN_RANKS = 16  # of a job; the table has a screen, `--json` has all
_COLUMNS = ("job", "state", "ranks", "step", "waited", "held up others", "now")


def jobs(
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", envvar="BNLAYER_ADDRESS", help="The service.")
    ] = "127.0.0.1:50051",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print an object, for programs; with --watch one a line.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Look again every second, until Ctrl-C.")] = False,
) -> None:
    """List the jobs that run on a service, with the time that each rank has waited, and mark the straggler.

    `bnlayer jobs --address 127.0.0.1:50051 --watch`

    `waited` is the time that a rank has waited for others, `held up others` the time that all others have waited for it
    alone. The straggler is the rank that in the last minute held up the others more than all other ranks together, and
    for a twentieth of the time or more; or whoever has been awaited for 2 s now. Of a job with more than 16 ranks those
    are shown that held up the others most.

    The service is reached as a rank would reach it, with what BNLAYER_TLS_CA, BNLAYER_TLS_CERT, BNLAYER_TLS_KEY and
    BNLAYER_TOKEN_FILE name. A token of the role `reader` will do; its jobs are listed. Jobs that are over are not:
    their statistics are in the state directory.

    Exit code 1 if nothing answers there, or the service refuses.
    """
    from bnproto.connection import Connector
    from bnproto.credentials import CredentialsError, credentials

    try:
        connector = Connector(address, credentials(os.environ))
    except CredentialsError as error:
        raise CommandError(f"jobs: {error}") from None
    try:
        _show(connector, as_json=as_json, watch=watch)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _show(connector: Any, *, as_json: bool, watch: bool) -> None:
    from bnworker.cli.console import console

    if as_json:
        for jobs in _looks(connector, watch=watch):
            typer.echo(json.dumps({"jobs": jobs}, indent=None if watch else 2))
        return
    screen = console()
    if not watch or not screen.is_terminal:
        for jobs in _looks(connector, watch=watch):
            screen.print(_table(jobs))
        return
    from rich.live import Live

    with Live(console=screen, auto_refresh=False, screen=True, vertical_overflow="crop") as live:
        for jobs in _looks(connector, watch=True):
            live.update(_table(jobs), refresh=True)


def _looks(connector: Any, *, watch: bool) -> Any:
    """What there is to see: once, or every second."""
    with connector.channel() as channel:
        while True:
            yield _listed(connector, channel)
            if not watch:
                return
            time.sleep(_EVERY_S)


def _listed(connector: Any, channel: Any) -> list[dict[str, Any]]:
    """All jobs, as JSON has them."""
    import grpc

    from bnproto.failures import error_in
    from bnproto.v1 import observation_pb2 as pb
    from bnproto.v1 import observation_pb2_grpc as rpc

    call = rpc.ObservationServiceStub(channel).ListJobs(pb.ListJobsRequest(), timeout=_ANSWER_S)
    try:
        return [_described(response.job) for response in call]
    except grpc.RpcError as error:
        code = error.code()
        why: object = error_in(call.trailing_metadata())
        if why is None and code is grpc.StatusCode.UNAVAILABLE:
            why = connector.fault()
        if why is None and code is grpc.StatusCode.UNIMPLEMENTED:
            why = f"{connector.address} lists no jobs: it is no statistics service, or one of an earlier release."
        why = why or f"{connector.address} does not answer: {code.name}: {error.details()}"
        raise CommandError(f"jobs: {why}", code=1) from None


def _described(job: Any) -> dict[str, Any]:
    from bnproto.v1 import observation_pb2 as pb
    from bnproto.v1 import statistics_pb2 as wire

    has_call = job.operation != wire.OPERATION_UNSPECIFIED
    return {
        "job": job.name,
        "state": pb.JobPhase.Name(job.phase).removeprefix("JOB_PHASE_").lower(),
        "generation": job.generation,
        "world_size": job.world_size,
        "completed": job.completed,
        "operation": wire.Operation.Name(job.operation).removeprefix("OPERATION_").lower() if has_call else None,
        "layer": job.layer if job.HasField("layer") else None,
        "direction": wire.Direction.Name(job.direction).removeprefix("DIRECTION_").lower() if job.direction else None,
        "step": job.step if has_call else None,
        "layers": job.layers,
        "version": job.version,
        "ranks": [
            {
                "rank": rank.rank,
                "host": rank.host,
                "pid": rank.pid,
                "connected": rank.connected,
                "waited_s": rank.waited_s,
                "held_up_s": rank.held_up_s,
                "waiting_s": rank.waiting_s,
                "awaited_s": rank.awaited_s,
                "silent_s": rank.silent_s,
                "straggler": rank.straggler,
            }
            for rank in job.ranks
        ],
        "more_ranks": job.more_ranks,
    }


# ---- the table ----


def _table(jobs: list[dict[str, Any]]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, caption=None if jobs else "no job runs", caption_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="right" if name in ("step", "waited", "held up others") else "left")
    for job in jobs:
        here = len(job["ranks"]) + job["more_ranks"]
        ranks = f"{here} of {job['world_size']}" if here != job["world_size"] else str(here)
        table.add_row(Text(_plain(job["job"]), "bold"), job["state"], ranks, str(job["completed"]), "", "", _where(job))
        for rank in _shown(job["ranks"]):
            whence = f"  {rank['rank']}  {_plain(rank['host'])}:{rank['pid']}"
            state = "" if rank["connected"] else "away"
            style = "bold red" if rank["straggler"] else ""
            row = (whence, state, "", "", _seconds(rank["waited_s"]), _seconds(rank["held_up_s"]), _now(rank))
            table.add_row(*(Text(cell, style) for cell in row))
        left_out = here - min(len(job["ranks"]), _SHOWN_RANKS)
        if left_out:
            table.add_row(f"  and {left_out} more")
    return table


def _shown(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that matter most, in order."""
    most = sorted(ranks, key=lambda rank: (not rank["straggler"], -rank["held_up_s"]))[:_SHOWN_RANKS]
    return sorted(most, key=lambda rank: int(rank["rank"]))


def _where(job: dict[str, Any]) -> str:
    if job["operation"] is None:
        return ""
    if job["layer"] is None:
        return f"{job['operation']} {job['step']}"
    way = f"{job['direction']} " if job["direction"] else ""
    return f"{way}{_plain(job['layer'])}, step {job['step']}"


def _now(rank: dict[str, Any]) -> str:
    if rank["straggler"]:
        awaited = f", awaited for {_seconds(rank['awaited_s'])}" if rank["awaited_s"] else ""
        return f"◀ straggler{awaited}"
    return f"waiting for {_seconds(rank['waiting_s'])}" if rank["waiting_s"] >= _EVERY_S else ""


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


def _plain(text: str) -> str:
    """What a peer named, without what would move the cursor."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
