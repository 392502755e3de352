"""What a state directory holds, for operators: it is read, and never changed, so a service may use it meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bnlayer.state import LayerState
from bnserver import state_directory
from bnserver.core.members import LivenessTimeouts
from bnserver.core.recovery import RecoveryError, recovered
from bnserver.job_file import Scan, StoreError, file_name, scan

OVER, FAILED, UNFINISHED, DAMAGED = "over", "failed", "unfinished", "damaged"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file.

    Attributes:
        path: where.
        fault: why the service would not start with it; "" if it would.
        job: the job's name; None: it can't be read.
        state: over, failed, unfinished (its ranks may come back), or damaged.
        text: how its latest generation ended, or who may come back.
        torn: what a service would cut off at its start; "" if nothing.
        generation: the number of its latest generation.
        directory: names the state directory in which it was written; "" if that had no name.
        snapshot: which of the job's snapshots it is; 0: none yet, or not counted.
        journal: records after the snapshot.
        size: in bytes.
        written: seconds since 1970.
        layers: the owner's state of each layer.
    """

    path: Path
    fault: str = ""
    job: str | None = None
    state: str = DAMAGED
    text: str = ""
    torn: str = ""
    generation: int = 0
    directory: str = ""
    snapshot: int = 0
    journal: int = 0
    size: int = 0
    written: float = 0.0
    layers: Mapping[str, LayerState] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "job": self.job,
            "file": self.path.name,
            "state": self.state,
            "text": self.text,
            "fault": self.fault or None,
            "torn": self.torn or None,
            "generation": self.generation,
            "directory": self.directory or None,
            "snapshot": self.snapshot,
            "journal_records": self.journal,
            "bytes": self.size,
            "written": self.written,
            "layers": {name: layer_as_json(state) for name, state in self.layers.items()},
        }


def survey(directory: Path) -> list[Entry]:
    """Every job's file, in the order of the files' names.

    Raises:
        OSError: the directory can't be read.
    """
    scans: dict[Path, Scan | StoreError] = {}
    for path in state_directory.job_files(directory):
        try:
            scans[path] = scan(path)
        except StoreError as error:
            scans[path] = error
    faults = _misplaced(scanned for scanned in scans.values() if isinstance(scanned, Scan))
    return [_entry(path, scanned, faults.get(path, "")) for path, scanned in scans.items()]


def look(directory: Path, job: str) -> Entry | None:
    """One job's file; None if there is none.

    Raises:
        OSError: the directory can't be read.
    """
    path = directory / file_name(job)
    if not path.exists():
        return None
    try:
        scanned = scan(path)
    except StoreError as error:
        return _entry(path, error, "")
    return _entry(path, scanned, _misplaced([scanned]).get(path, ""))


def layer_as_json(state: LayerState) -> dict[str, Any]:
    """What there is to say of a layer, for programs."""
    return {
        "channels": state.channels,
        "dtype": state.forward.dtype,
        "variables": state.moving.mean.dtype.name,
        "renorm": state.moving.stddev is not None,
        "version": state.version,
        **{name: {"min": low, "max": high} for name, (low, high) in ranges(state).items()},
    }


def ranges(state: LayerState) -> dict[str, tuple[float, float]]:
    """The smallest and the largest number of each moving statistic."""
    return {name: (float(vector.min()), float(vector.max())) for name, vector in state.moving.vectors.items()}


def _misplaced(scans: Iterable[Scan]) -> dict[Path, str]:
    """Why files are not where they belong, by file."""
    by_job: dict[str, list[Scan]] = {}
    for scanned in scans:
        by_job.setdefault(scanned.job, []).append(scanned)
    faults = {}
    for each in by_job.values():
        try:
            state_directory.refuse_copies(each)
        except StoreError as error:
            faults.update({scanned.path: str(error) for scanned in each})
    return faults


def _entry(path: Path, scanned: Scan | StoreError, fault: str) -> Entry:
    try:
        status = path.stat()
        entry = Entry(path, fault, size=status.st_size, written=status.st_mtime)
    except OSError:  # a link to nowhere
        entry = Entry(path, fault)
    if isinstance(scanned, StoreError):
        return replace(entry, fault=str(scanned))
    head = scanned.header
    entry = replace(entry, job=scanned.job, directory=head.directory, snapshot=head.number, journal=scanned.journal)
    try:
        job = recovered(scanned.job, scanned.records(), LivenessTimeouts(), 0.0)
    except (RecoveryError, StoreError) as error:
        return replace(entry, fault=f"{path} makes no sense: {error}")
    state, text = OVER if job.ended.reason is None else FAILED, job.ended.text
    if job.generations:
        latest = job.generations[-1]
        state, text = UNFINISHED, f"{len(latest.members.here)} of {latest.world_size} ranks may come back"
    return replace(entry, state=state, text=text, torn=scanned.torn, generation=job.number, layers=job.layers.states)
