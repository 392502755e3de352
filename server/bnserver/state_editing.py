"""What an operator does with the jobs of a state directory: export, import, forget.

A job's layers travel as `bnlayer.interchange` writes them, without gamma and beta, which the service does not know:
such a file holds moving statistics, grids and versions, to the bit. From a file with gamma and beta they are left out.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bnlayer import BatchNormalization, interchange
from bnlayer.agreement import Peer
from bnlayer.state import LayerState
from bnserver.checkpoints import headers
from bnserver.core.events import Join, Malformed, Push
from bnserver.core.journal_records import Ended, JournalRecord, LayerSnapshot
from bnserver.core.members import LivenessTimeouts
from bnserver.core.reasons import Reason
from bnserver.core.recovery import RecoveryError, recovered
from bnserver.core.validation import validated
from bnserver.job_file import StoreError, file_name
from bnserver.store import Store

_MOST_BYTES = 2**30  # of a file that is imported: four times what the layers of one job may take
_SHOWN = 200  # characters of a name in an error
_REPLACED = "The job's statistics were replaced by bnlayer state import or restore. Start the job again."


class EditError(ValueError):
    """It can't be done; the text says why, and what to do."""


def export_layers(states: Mapping[str, LayerState], path: Path) -> None:
    """Write layers to a file for `bnlayer.interchange.load`.

    Args:
        states: by the names of the layers.
        path: ends in `.safetensors` or `.npz`.

    Raises:
        EditError: a layer has no form in such a file.
        OSError: it can't be written.
    """
    try:
        interchange.save(path, {name: _layer(name, state) for name, state in states.items()})
    except ValueError as error:
        raise EditError(str(error)) from error


def imported_layers(path: Path) -> dict[str, LayerState]:
    """The states of the layers in a file that `bnlayer.interchange.save` or `export_layers` wrote.

    Raises:
        EditError: it is another program's or damaged, or a layer has no state that the service would take.
        OSError: it can't be read.
    """
    _check_file(path)
    try:
        layers = interchange.load(path)
    except ValueError as error:
        raise EditError(str(error)) from error
    states = {}
    for name, layer in layers.items():
        if not layer.built:
            raise EditError(f"{path}: layer {name!r} was not built, so it has no statistics.")
        states[name] = layer.state
        refused = validated(Push(0, name, layer.state))
        if isinstance(refused, Malformed):
            raise EditError(f"{path}: layer {name[:_SHOWN]!r}: {refused.text}.")
    if not states:
        raise EditError(f"{path}: it holds no layers.")
    return states


def replace_job(
    store: Store, job: str, states: Mapping[str, LayerState], *, replace: bool, flag: str = "--replace"
) -> None:
    """Give a job these layers, and no others. A run that was not finished can't go on.

    Args:
        store: of the directory, which is locked.
        job: the job's name.
        states: by the names of the layers.
        replace: whether there may be such a job already.
        flag: what else the command could be told, where there is one.

    Raises:
        EditError: there is one, or none can have this name.
        StoreError: its file is corrupt, or can't be written.
    """
    refused = validated(Join(0, job, Peer(0), 1, 1.0, 1.0))
    if isinstance(refused, Malformed):
        raise EditError(f"{refused.text}.")
    ended = Ended(0)
    if store.holds(job):
        if not replace:
            raise EditError(f"There is a job {job!r} already: give another name, or {flag}.")
        try:
            before = recovered(job, store.read(job), LivenessTimeouts(), 0.0)
        except RecoveryError as error:
            raise StoreError(f"{store.path(job)} makes no sense: {error}.") from error
        ended = Ended(before.number, Reason.STALE, _REPLACED)
    records: list[JournalRecord] = [ended, *(LayerSnapshot(name, state) for name, state in states.items())]
    asyncio.run(store.save(job, lambda: records))


def forget_job(store: Store, job: str) -> bool:
    """Delete a job's file and its checkpoints; returns whether there was any.

    Raises:
        OSError: one can't be deleted.
    """
    there = store.holds(job) or bool(headers(store.directory, job))
    store.delete(file_name(job))
    return there


def _check_file(path: Path) -> None:
    """Make sure that a file can be read to its end, and that it fits in memory: it may come from anybody.

    Raises:
        EditError: it is a pipe or a device, or too large; or it is an archive that says so of what is in it.
        OSError: it can't be read.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise EditError(f"{path}: expected a regular file, received a pipe, a socket or a device.")
    size = status.st_size
    with suppress(zipfile.BadZipFile, NotImplementedError, ValueError), zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())  # of each no more than that is read
    if size > _MOST_BYTES:
        raise EditError(f"{path}: expected a file of up to {_MOST_BYTES:,} bytes of layers, received {size:,}.")


def _layer(name: str, state: LayerState) -> BatchNormalization:
    """A layer that has a state and no weights."""
    dtype, renorm = state.moving.mean.dtype.name, state.moving.stddev is not None
    layer = BatchNormalization(name=name, center=False, scale=False, renorm=renorm, dtype=dtype, synchronized=True)
    layer.build((None, state.channels))
    if layer.state.kind != state.kind:
        raise EditError(f"layer {name!r}: expected {layer.state.kind}, which a file holds, received {state.kind}.")
    layer.restore(state)
    return layer
