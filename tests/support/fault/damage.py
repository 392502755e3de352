"""Files that are damaged: every byte of a snapshot flipped, a journal cut at every byte.

What is read back is then either refused, by an error that names the file, or a state that the service held before:
one from the job's timeline, and the later the more of the file is left.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bnserver.core.service import Service
from bnserver.job_file import StoreError
from bnserver.store import Store
from support.fault.daemons import daemon
from support.fault.history import Record, statistics
from support.fault.jobs import Job
from support.fault.model import Owned, timeline
from support.fault.ranks import ranks
from support.fault.report import Report

_JOB = "kept"
_SNAPSHOT_STEPS, _JOURNAL_STEPS = 2, 2
_TELL_EVERY = 200

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LayerSnapshot:
    """What a service left behind that was killed.

    Attributes:
        name: the file's.
        data: its bytes: a snapshot, and the journal after it.
        snapshot: how many of them are the snapshot's.
        states: all that the service ever held, in order.
    """

    name: str
    data: bytes
    snapshot: int
    states: list[dict[str, Owned]]


def layer_snapshot(folder: Path, seed: int) -> LayerSnapshot:
    """Let a job end in order, begin it again, and kill the service in the middle."""
    runs: list[list[list[Record]]] = []
    snapshot = 0
    with daemon(folder / "service") as service, ranks(1, folder / "ranks") as team:
        for run, steps in enumerate((_SNAPSHOT_STEPS, _JOURNAL_STEPS)):
            job = Job(_JOB, team, [service.address], folder / str(run), seed=seed + run, until=steps)
            job.expect("joined")
            job.expect("reached")
            runs.append(job.histories())
            if run == 0:
                job.leave()
                (path,) = _files(service.state)
                snapshot = path.stat().st_size
        service.kill()
        (path,) = _files(service.state)
    return LayerSnapshot(path.name, path.read_bytes(), snapshot, timeline(*runs))


def flipped(folder: Path, seed: int, share: float, progress: Progress, before: LayerSnapshot | None = None) -> Report:
    """Flip one bit in each byte of what a service left behind, or in a share of them."""
    report = Report(f"a flipped byte, seed {seed}")
    rng = np.random.default_rng(seed)
    before = before or layer_snapshot(folder, seed)
    scratch = _Scratch(folder / "scratch", before)
    _check_undamaged(scratch, before, report)
    chosen = _chosen(rng, range(len(before.data)), share)
    for count, index in enumerate(chosen):
        data = bytearray(before.data)
        data[index] ^= 1 << int(rng.integers(8))
        read = scratch.read(bytes(data))
        if isinstance(read, StoreError):
            report.same(f"byte {index}: the error names the file", scratch.named(read), True)
        else:
            report.add([f"byte {index} of {len(data)}: nothing was noticed"])
        if count % _TELL_EVERY == 0:
            progress(f"{count} of {len(chosen)} bytes")
    report.done = f"{len(chosen)} of the {len(before.data)} bytes of a snapshot ({before.snapshot}) and its journal"
    return report


def cut(folder: Path, seed: int, share: float, progress: Progress, before: LayerSnapshot | None = None) -> Report:
    """Cut the file after each of its bytes, or after a share of them."""
    report = Report(f"a cut journal, seed {seed}")
    rng = np.random.default_rng(seed)
    before = before or layer_snapshot(folder, seed)
    scratch = _Scratch(folder / "scratch", before)
    _check_undamaged(scratch, before, report)
    chosen = _chosen(rng, range(len(before.data)), share)
    position = refused = 0
    for count, length in enumerate(chosen):
        read = scratch.read(before.data[:length])
        if isinstance(read, StoreError):
            refused += 1
            report.same(f"cut after {length}: the error names the file", scratch.named(read), True)
            if length >= before.snapshot:
                report.add([f"cut after {length}, within the journal: {read}"])
        elif length < before.snapshot:
            report.add([f"cut after {length}, within the snapshot: nothing was noticed"])
        elif read not in before.states[position:]:
            report.add([f"cut after {length}: no state that the service held at this point or later"])
        else:
            position = before.states.index(read)
        if count % _TELL_EVERY == 0:
            progress(f"{count} of {len(chosen)} bytes")
    report.done = f"{len(chosen)} of {len(before.data)} lengths, {refused} refused, the others a state of before"
    return report


class _Scratch:
    """A state directory to be damaged, read within this process."""

    def __init__(self, folder: Path, before: LayerSnapshot) -> None:
        self._folder = folder
        folder.mkdir()
        self._path = folder / before.name

    def read(self, data: bytes) -> dict[str, Owned] | StoreError:
        """What a service would begin with, or why it would not begin."""
        self._path.write_bytes(data)
        store = None
        logging.getLogger("bnserver").setLevel(logging.ERROR)  # it tells of each journal that it cuts
        try:
            store = Store(self._folder)
            service = Service(store.load())
        except StoreError as error:
            return error
        finally:
            logging.getLogger("bnserver").setLevel(logging.NOTSET)
            if store is not None:
                store.close()
        states = service.states(_JOB) if _JOB in service.jobs else {}
        return {name: (statistics(state), state.version) for name, state in states.items()}

    def named(self, error: StoreError) -> bool:
        """Whether an error says which file it is about."""
        return str(self._path) in str(error)


def _check_undamaged(scratch: _Scratch, before: LayerSnapshot, report: Report) -> None:
    report.same("the undamaged file", scratch.read(before.data), before.states[-1])
    report.same("there is a journal behind the snapshot", 0 < before.snapshot < len(before.data), True)


def _chosen(rng: np.random.Generator, indices: range, share: float) -> list[int]:
    return [index for index in indices if share >= 1.0 or rng.random() < share]


def _files(state: Path) -> list[Path]:
    return [path for path in state.iterdir() if path.name not in ("lock", "directory-id")]
