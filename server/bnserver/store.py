"""Where jobs are kept between two runs of the service: a directory with one file per job.

Laws of this room:
1. A file is replaced as a whole or not at all: written aside, synced, renamed, and the directory synced.
2. What is loaded is what was saved: a digest covers every name, dtype, shape and byte. A file that fails it is
   reported, never skipped.
3. One daemon at a time: the directory is locked for as long as the daemon lives.

A file is in the safetensors format. Its arrays are named "<layer's number>/<name in LayerState.arrays()>".
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from bnlayer.state import LayerState
from bnserver.core.service import Snapshot

_FORMAT = "bnlayer-job-1"
_SUFFIX = ".safetensors"


class StoreError(RuntimeError):
    """The state directory can't be used; the text says why, and what to do."""


class Store:
    """A locked state directory.

    Args:
        directory: is made if it does not exist.

    Raises:
        StoreError: another daemon uses it, or it can't be written to.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writing = asyncio.Lock()
        self._lock = _locked(directory)

    def load(self) -> tuple[Snapshot, ...]:
        """Every job that was saved.

        Raises:
            StoreError: a file is corrupt.
        """
        return tuple(_loaded(path) for path in sorted(self._directory.glob(f"*{_SUFFIX}")))

    async def save(self, snapshot: Snapshot) -> None:
        """Keep a job; it is on disk when this returns.

        Raises:
            StoreError: it could not be written. What was saved before is still there.
        """
        async with self._writing:
            await asyncio.to_thread(_save, self._directory, snapshot)

    def close(self) -> None:
        """Let another daemon use the directory."""
        self._lock.close()


def _locked(directory: Path) -> IO[str]:
    path = directory / "lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StoreError(f"The state directory {directory} can't be used: {error}.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise StoreError(
            f"The state directory {directory} is in use by {holder}. Stop that daemon, or give this one another "
            "--state-dir: two owners of the same statistics would overwrite each other."
        ) from None
    lock.truncate(0)
    lock.write(f"pid {os.getpid()} on host {socket.gethostname()}\n")
    lock.flush()
    return lock


def _path(directory: Path, job: str) -> Path:
    """The file of a job: readable, without a character that a file name can't have, and never the same for two."""
    digest = blake2b(job.encode(), digest_size=8).hexdigest()
    return directory / f"{quote(job, safe='')[:80]}.{digest}{_SUFFIX}"


def _save(directory: Path, snapshot: Snapshot) -> None:
    arrays: dict[str, NDArray[Any]] = {}
    layers = []
    for number, (name, state) in enumerate(snapshot.states.items()):
        layers.append({"name": name, "dtype": state.forward.dtype})
        arrays |= {f"{number}/{key}": np.ascontiguousarray(array) for key, array in state.arrays().items()}
    about = json.dumps({"job": snapshot.job, "generation": snapshot.generation, "layers": layers})
    metadata = {"format": _FORMAT, "about": about, "digest": _digest(about, arrays)}
    path = _path(directory, snapshot.job)
    aside = path.with_suffix(".part")
    try:
        with aside.open("wb") as file:
            file.write(save(arrays, metadata))
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        _sync(directory)
    except OSError as error:
        raise StoreError(f"Job {snapshot.job!r} could not be saved to {path}: {error}.") from error


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _loaded(path: Path) -> Snapshot:
    try:
        with safe_open(path, "numpy") as file:
            metadata: dict[str, str] = file.metadata() or {}
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - a file is no mapping
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"expected the format {_FORMAT}, found {metadata.get('format')}")
        if metadata.get("digest") != _digest(metadata["about"], arrays):
            raise ValueError("its digest does not match its content")
        about = json.loads(metadata["about"])
        states = {layer["name"]: _state(number, layer, arrays) for number, layer in enumerate(about["layers"])}
        return Snapshot(about["job"], about["generation"], states)
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise StoreError(
            f"The snapshot {path} is corrupt: {error}. Put a good copy in its place; or move it away, and its job "
            "begins anew, without its moving statistics."
        ) from error


def _state(number: int, layer: Mapping[str, str], arrays: Mapping[str, NDArray[Any]]) -> LayerState:
    prefix = f"{number}/"
    own = {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
    return LayerState.from_arrays(own, layer["dtype"])


def _digest(about: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    digest = blake2b(about.encode(), digest_size=16)
    for chunk in _chunks(arrays):
        digest.update(chunk)
    return digest.hexdigest()


def _chunks(arrays: Mapping[str, NDArray[Any]]) -> Iterable[bytes]:
    for key, array in sorted(arrays.items()):
        yield f"{key} {array.dtype.name} {array.shape}".encode()
        yield array.tobytes()
