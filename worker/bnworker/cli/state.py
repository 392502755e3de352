"""`bnlayer state`: the jobs in the state directory of a service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bnworker.cli.errors import CommandError

if TYPE_CHECKING:
    from bnserver.checkpoints import StoredCheckpoint
    from bnserver.state_survey import Entry
    from bnserver.store import Store

state = typer.Typer(
    no_args_is_help=True, help="Look at the jobs in a service's state directory, and take them in and out."
)

_Directory = Annotated[
    Path,
    typer.Option("--state-dir", metavar="DIR", envvar="BNSERVER_STATE_DIR", help="What the service was given."),
]
_LISTED = 5  # checkpoints in an error

_Job = Annotated[str, typer.Argument(metavar="JOB", help="The job's name.")]
_File = Annotated[Path, typer.Argument(metavar="FILE.safetensors", help="Or FILE.npz.")]


@state.command("show")
def show(
    state_dir: _Directory,
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", show_default=False, help="Without: all jobs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an object, or a list of them, for programs.")] = False,
) -> None:
    """List the jobs, or the layers of one: channels, versions, and the ranges of their moving statistics.

    `bnlayer state show --state-dir /var/lib/bnlayer`

    `bnlayer state show mine --state-dir /var/lib/bnlayer --json`

    A job is `over`, `failed`, or `unfinished`: it runs, or its ranks may come back. Nothing is changed, and the service
    may be running. Exit code 1: a file is damaged; 2: there is no such job, or no such directory.
    """
    from bnserver.state_survey import look, survey

    directory = _existing(state_dir)
    with _errors("show"):
        surveyed = look(directory, job) if job is not None else survey(directory)
    if surveyed is None:
        raise CommandError(f"state show: {_unknown(directory, str(job))}")
    files = surveyed if isinstance(surveyed, list) else [surveyed]
    if as_json:
        shown = [entry.as_json() for entry in files]
        typer.echo(json.dumps(shown if job is None else shown[0], indent=2))
    elif job is None:
        _print_jobs(files)
    else:
        _print_layers(files[0])
    raise typer.Exit(1 if _print_faults(files) else 0)


@state.command("verify")
def verify(state_dir: _Directory) -> None:
    """Check every file: its checksums, its records, its place. Names each one with which the service would not start.

    `bnlayer state verify --state-dir /var/lib/bnlayer`

    Nothing is changed, and the service may be running. Exit code 0: it would start; 1: it would not; 2: there is no
    such directory.
    """
    from bnserver.state_survey import survey

    with _errors("verify"):
        files = survey(_existing(state_dir))
    for entry in files:
        if entry.torn:
            typer.echo(f"{entry.path} {entry.torn}")
    wrong = _print_faults(files)
    typer.echo(f"{len(files)} files, {wrong} of them damaged" if wrong else f"{len(files)} files, all sound")
    raise typer.Exit(1 if wrong else 0)


@state.command("export")
def export(
    job: _Job,
    file: _File,
    state_dir: _Directory,
    checkpoint: Annotated[
        str | None,
        typer.Option("--checkpoint", metavar="NAME", help="The layers of a checkpoint, not the latest ones."),
    ] = None,
) -> None:
    """Write a job's layers to a file: moving statistics, grids and versions, to the bit.

    `bnlayer state export mine mine.safetensors --state-dir /var/lib/bnlayer`

    `bnlayer state export mine epoch-3.safetensors --checkpoint epoch-3 --state-dir /var/lib/bnlayer`

    `bnlayer.interchange.load` reads it, as layers without gamma and beta, which the service does not know; so does
    `bnlayer state import`. The service may be running. Exit code 2: there is no such job, or the file's name has
    another ending; 1: the job's file is damaged, or the file can't be written.
    """
    from bnserver.state_editing import EditError, export_layers
    from bnserver.state_survey import look

    directory = _existing(state_dir)
    with _errors("export"):
        if checkpoint is not None:
            layers = _checkpoint("export", directory, job, checkpoint).layers
        else:
            entry = look(directory, job)
            if entry is None:
                raise CommandError(f"state export: {_unknown(directory, job)}")
            if entry.fault:
                raise CommandError(f"state export: {entry.fault}", 1)
            layers = entry.layers
        if not layers:
            raise CommandError(f"state export: Job {job!r} has no layers.")
        try:
            export_layers(layers, file)
        except EditError as error:
            raise CommandError(f"state export: {error}") from None
    typer.echo(f"{file}: {len(layers)} layers of job {job!r}")


@state.command("checkpoints")
def checkpoints(
    job: _Job,
    state_dir: _Directory,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects, for programs.")] = False,
) -> None:
    """List the checkpoints of a job, the first one first: name, training step, layers, size; each is read and checked.

    `bnlayer state checkpoints mine --state-dir /var/lib/bnlayer`

    Ranks make them with `world.checkpoint(NAME, step=N)`. The service may be running. Exit code 1: one is damaged; 2:
    the job has none, or there is no such directory.
    """
    from bnserver.checkpoints import look

    with _errors("checkpoints"):
        stored = look(_existing(state_dir), job)
    if not stored:
        raise CommandError(f"state checkpoints: job {job!r} has no checkpoints in {state_dir}.")
    if as_json:
        typer.echo(json.dumps([each.as_json() for each in stored], indent=2))
    else:
        _print_checkpoints(stored)
    faults = [each.fault for each in stored if each.fault]
    for fault in faults:
        typer.echo(_shown(fault), err=True)
    raise typer.Exit(1 if faults else 0)


@state.command("restore")
def restore(
    job: _Job,
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Its name.")],
    state_dir: _Directory,
    to: Annotated[
        str | None, typer.Option("--to", metavar="JOB", help="Make another job of it, and leave this one as it is.")
    ] = None,
) -> None:
    """Take a job back to a checkpoint: its layers replace all that the job has; its ranks go on from them.

    `bnlayer state restore mine epoch-3 --state-dir /var/lib/bnlayer`

    `bnlayer state restore mine epoch-3 --to mine-again --state-dir /var/lib/bnlayer`

    To the bit, grids and versions included. The checkpoints stay. The service must not be running; a run that was not
    finished can't go on: its ranks are told. Exit code 1: the checkpoint is damaged; 2: there is none of this name, the
    directory is in use, or `--to` names a job that exists.
    """
    from bnserver.state_editing import EditError, replace_job

    with _errors("restore"), _held(state_dir, "restore") as store:
        stored = _checkpoint("restore", state_dir, job, checkpoint)
        try:
            replace_job(store, to or job, stored.layers, replace=to is None, flag="forget it first")
        except EditError as error:
            raise CommandError(f"state restore: {error}") from None
    typer.echo(f"job {to or job!r}: {len(stored.layers)} layers of checkpoint {checkpoint!r}, step {stored.step}")


@state.command("import")
def import_(
    job: _Job,
    file: _File,
    state_dir: _Directory,
    replace: Annotated[
        bool, typer.Option("--replace", help="Where there is such a job: these layers instead of all that it has.")
    ] = False,
) -> None:
    """Make a job of the layers in a file; its ranks go on from their statistics.

    `bnlayer state import mine mine.safetensors --state-dir /var/lib/bnlayer`

    `bnlayer export digits.safetensors layers.safetensors --names bnlayer`, then
    `bnlayer state import digits-2 layers.safetensors --state-dir state`

    It reads what `bnlayer state export` and `bnlayer.interchange.save` write; gamma and beta are left out. Layers are
    found by their names. The service must not be running. With `--replace` a run that was not finished can't go on:
    its ranks are told. Exit code 2: the file is refused, the directory is in use, or there is such a job already.
    """
    from bnserver.state_editing import EditError, imported_layers, replace_job

    with _errors("import"), _held(state_dir, "import") as store:
        try:
            states = imported_layers(file)
            replace_job(store, job, states, replace=replace)
        except EditError as error:
            raise CommandError(f"state import: {error}") from None
    typer.echo(f"job {job!r}: {len(states)} layers of {file}")


@state.command("forget")
def forget(job: _Job, state_dir: _Directory) -> None:
    """Delete a job for good, its checkpoints included; a job of this name begins anew.

    `bnlayer state forget mine --state-dir /var/lib/bnlayer`

    The service must not be running. To have it forget jobs by itself: `bnlayer serve --keep-jobs-days 30`. Exit code 2:
    there is no such job, or the directory is in use.
    """
    from bnserver.state_editing import forget_job

    with _errors("forget"), _held(state_dir, "forget") as store:
        if not forget_job(store, job):
            raise CommandError(f"state forget: {_unknown(state_dir, job)}")
    typer.echo(f"job {job!r} is forgotten")


# ---- what they share ----


def _existing(directory: Path) -> Path:
    if not directory.is_dir():
        raise CommandError(f"state: --state-dir {directory}: no such directory.")
    return directory


@contextmanager
def _held(directory: Path, command: str) -> Iterator[Store]:
    """The directory, taken from every service for so long."""
    from bnserver.state_directory import holder
    from bnserver.store import Store

    who = holder(_existing(directory))
    if who is not None:
        raise CommandError(
            f"state {command}: {directory} is in use by {who}. Stop that service first (kill -TERM, or systemctl stop "
            "bnlayer: it saves its jobs), and start it again afterwards."
        )
    store = Store(directory)
    try:
        yield store
    finally:
        store.close()


@contextmanager
def _errors(command: str) -> Iterator[None]:
    """What can go wrong with files, in one line."""
    from bnserver.job_file import StoreError

    try:
        yield
    except StoreError as error:
        raise CommandError(f"state {command}: {error}", 1) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise CommandError(f"state {command}: {where}{error.strerror}.", 1) from None


def _unknown(directory: Path, job: str) -> str:
    import difflib

    from bnserver.state_survey import survey

    names = [entry.job for entry in survey(directory) if entry.job is not None]
    near = difflib.get_close_matches(job, names, n=1)
    guess = f" Did you mean {near[0]!r}?" if near else f" There are {len(names)}: bnlayer state show lists them."
    return f"there is no job {job!r} in {directory}.{guess}"


def _checkpoint(command: str, directory: Path, job: str, name: str) -> StoredCheckpoint:
    """One checkpoint, whole."""
    from bnserver.checkpoints import look

    checkpoints = look(directory, job)
    one = next((each for each in checkpoints if each.name == name), None)
    if one is None:
        names = ", ".join(repr(each.name) for each in checkpoints[-_LISTED:]) or "none"
        raise CommandError(f"state {command}: job {job!r} has no checkpoint {name!r}; the latest are: {names}.")
    if one.fault:
        raise CommandError(f"state {command}: {one.fault}", 1)
    return one


def _print_checkpoints(checkpoints: list[StoredCheckpoint]) -> None:
    from datetime import UTC, datetime

    from rich.table import Table

    from bnworker.cli.console import console

    table = Table()
    for heading in ("checkpoint", "step", "layers", "bytes", "written"):
        right, is_name = heading in ("step", "layers", "bytes"), heading == "checkpoint"
        table.add_column(heading, justify="right" if right else "left", no_wrap=not is_name, overflow="fold")
    for each in checkpoints:
        written = datetime.fromtimestamp(each.written, UTC).strftime("%Y-%m-%d %H:%M:%SZ") if each.size else "damaged"
        numbers = (f"{number:,}" for number in (each.step, len(each.layers), each.size))
        table.add_row(_shown(each.name), *numbers, written)
    console().print(table)


def _print_jobs(files: list[Entry]) -> None:
    from datetime import UTC, datetime

    from rich.table import Table

    from bnworker.cli.console import console

    table = Table()
    for heading in ("job", "state", "generation", "layers", "bytes", "written"):
        right, is_name = heading in ("generation", "layers", "bytes"), heading == "job"
        table.add_column(heading, justify="right" if right else "left", no_wrap=not is_name, overflow="fold")
    for entry in files:
        written = datetime.fromtimestamp(entry.written, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        name = entry.path.name if entry.job is None else _shown(entry.job)
        numbers = (f"{number:,}" for number in (entry.generation, len(entry.layers), entry.size))
        table.add_row(name, entry.state, *numbers, written)
    console().print(table)


def _print_layers(entry: Entry) -> None:
    from rich.table import Table

    from bnserver.state_survey import ranges
    from bnworker.cli.console import console

    if entry.job is None:
        return
    which = f"snapshot {entry.snapshot}" if entry.snapshot else "snapshot"
    text = f": {_shown(entry.text)}" if entry.text else ""
    typer.echo(f"job {_shown(entry.job)}: {entry.state}, generation {entry.generation}{text}")
    typer.echo(f"{entry.path}: {which} and {entry.journal} records after it, {entry.size:,} bytes")
    table = Table()
    for heading in ("layer", "channels", "dtype", "version", "moving mean", "variance"):
        right, is_name = heading in ("channels", "version"), heading == "layer"
        table.add_column(heading, justify="right" if right else "left", no_wrap=not is_name, overflow="fold")
    for name, state in entry.layers.items():
        spans = [f"{low:.3g} … {high:.3g}" for low, high in list(ranges(state).values())[:2]]
        variables, renorm = state.moving.mean.dtype.name, ", renorm" if state.moving.stddev is not None else ""
        table.add_row(_shown(name), f"{state.channels:,}", f"{variables}{renorm}", f"{state.version:,}", *spans)
    console().print(table)


def _print_faults(files: list[Entry]) -> int:
    """Say what is wrong, each thing once; returns how many files that are."""
    faults = [entry.fault for entry in files if entry.fault]
    for fault in dict.fromkeys(faults):
        typer.echo(_shown(fault), err=True)
    return len(faults)


def _shown(text: str) -> str:
    """What ranks said, so that it can't do anything to a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
