"""Checkpoints: all that is needed to resume a run, bit for bit, in one safetensors file.

Laws:
1. Equal states make equal bytes: a checkpoint holds no time, no number of ranks, and no path except the names of the
   data and of the initial weights.
2. Reading returns what was written, or raises an error that says what is wrong with the file.
3. Only rank 0 reads and writes files; the other ranks receive what it read.

Tensors: "dense_1/kernel", "bn_1/gamma", …: the weights; "bn_1/state/moving_mean", …: each layer's state with its
grids; "optimizer/dense_1/kernel", …: the velocities; "best/dense_1/kernel", "best/bn_1/state/…", …: weights and
states of the best epoch, where the run may stop early. Metadata: one entry, "bnlayer", a JSON object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from bnworker.train.data import Dataset, are_numbers
from bnworker.train.events import Epoch
from bnworker.train.settings import Settings
from bnworker.world import World

FORMAT = 1  # increased when readers of the previous format could not resume from a file
BEST = "best/"
VELOCITY = "optimizer/"

_METADATA = "bnlayer"
_HEADER_BYTES = 8  # a safetensors file begins with the length of its JSON header, little-endian


class CheckpointError(ValueError):
    """The run can't be resumed from this file; the text names it, and says what to do."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        steps: made so far.
        epochs: the complete ones.
        loss_sum, correct, rows: of the current epoch so far: summed loss, correctly classified rows, and rows.
    """

    steps: int = 0
    epochs: tuple[Epoch, ...] = ()
    loss_sum: float = 0.0
    correct: int = 0
    rows: int = 0

    @property
    def best(self) -> Epoch | None:
        """The complete epoch with the lowest validation loss, the first of equals; None without validation rows."""
        evaluated = [(epoch.validation_loss, epoch) for epoch in self.epochs if epoch.validation_loss is not None]
        return min(evaluated, key=lambda pair: pair[0], default=(0.0, None))[1]

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values; floats keep every bit."""
        return {
            "steps": self.steps,
            "epochs": [epoch.record() for epoch in self.epochs],
            "loss_sum": self.loss_sum,
            "correct": self.correct,
            "rows": self.rows,
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Progress:
        """The inverse of `as_json`."""
        return cls(**{**plain, "epochs": tuple(Epoch(**record) for record in plain["epochs"])})


@dataclass(frozen=True, slots=True)
class Origin:
    """The data that a run was trained on.

    Attributes:
        name: as given to `--data`.
        fingerprint: of the contents.
        features, classes: their numbers.
        numbered: the labels of the classes, ascending; None: they are 0 to classes − 1. Files without this entry
            belong to models whose output k stands for label k, whether it occurs or not.
    """

    name: str
    fingerprint: str
    features: int
    classes: int
    numbered: tuple[int, ...] | None = None

    @classmethod
    def of(cls, data: Dataset) -> Origin:
        """The origin that describes a data set."""
        numbered = None if are_numbers(data.labels) else data.labels
        return cls(data.name, data.fingerprint, data.features, data.classes, numbered)

    @property
    def labels(self) -> tuple[int, ...]:
        """The labels of the classes: output k of the model stands for `labels[k]`."""
        return tuple(range(self.classes)) if self.numbered is None else self.numbered


@dataclass(frozen=True, eq=False, repr=False)
class Checkpoint:
    """The state of a run after a step.

    Attributes:
        tensors: by name; see the top of the module.
        progress: of the run.
        settings: `Settings.as_json()` of the run.
        data: what the run was trained on.
        name: the file that it was read from, for error messages.
    """

    tensors: Mapping[str, NDArray[Any]]
    progress: Progress
    settings: Mapping[str, Any]
    data: Origin
    name: str = field(default="the checkpoint")

    def __repr__(self) -> str:
        return f"<Checkpoint {self.name}: step {self.progress.steps}, {len(self.tensors)} tensors, {self.data.name}>"

    def best_weights(self) -> dict[str, NDArray[Any]]:
        """Weights and layer states of the result: with early stopping the best epoch's, otherwise the last."""
        best = {name.removeprefix(BEST): tensor for name, tensor in self.tensors.items() if name.startswith(BEST)}
        return best or {name: tensor for name, tensor in self.tensors.items() if not name.startswith(VELOCITY)}

    def refuse_other_settings(self, settings: Settings) -> None:
        """Refuse to resume a run with other settings.

        Raises:
            CheckpointError: a setting differs.
        """
        differences = settings.differences(self.settings)
        if differences:
            raise CheckpointError(
                f"--resume: {self.name} belongs to a run with other options: {'; '.join(differences)}. "
                "Give the same ones, or --save to another file."
            )

    def refuse_other_data(self, data: Origin) -> None:
        """Refuse to resume a run on other data.

        Raises:
            CheckpointError: the contents differ. The name may differ.
        """
        if data.fingerprint != self.data.fingerprint:
            raise CheckpointError(
                f"--resume: {self.name} belongs to a run on other data: it was {self.data.name} (fingerprint "
                f"{self.data.fingerprint[:12]}), this is {data.name} ({data.fingerprint[:12]}). "
                "Give the same data, or --save to another file."
            )

    def refuse_other_tensors(self, wanted: Mapping[str, NDArray[Any]]) -> None:
        """Refuse a checkpoint whose tensors do not fit.

        Args:
            wanted: arrays with the names, shapes and dtypes that the run needs.

        Raises:
            CheckpointError: one is missing, or has another shape or dtype.
        """
        for name, want in wanted.items():
            got = self.tensors.get(name)
            if got is None:
                raise CheckpointError(f"--resume: {self.name} lacks the tensor {name!r}, which this run needs.")
            if (got.shape, got.dtype) != (want.shape, want.dtype):
                raise CheckpointError(
                    f"--resume: {self.name}: tensor {name!r} has shape {got.shape} and dtype {got.dtype}, "
                    f"this run needs {want.shape} and {want.dtype}."
                )


def labels_of(settings: Settings, start: Checkpoint | None) -> tuple[int, ...] | None:
    """The labels that a run's data must have; None: the labels that occur in the data.

    Args:
        settings: of the run.
        start: the checkpoint that it is resumed from; None: it is a new run.
    """
    if start is not None:
        return start.data.labels
    return None if settings.classes is None else tuple(range(settings.classes))


def encode(checkpoint: Checkpoint) -> bytes:
    """The contents of a checkpoint's file."""
    from safetensors.numpy import save

    data = checkpoint.data
    facts = {
        "format": FORMAT,
        "settings": dict(checkpoint.settings),
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "features": data.features,
            "classes": data.classes,
            **({} if data.numbered is None else {"labels": list(data.numbered)}),
        },
        "progress": checkpoint.progress.as_json(),
    }
    facts["checksum"] = _checksum(facts, checkpoint.tensors)
    # One entry: safetensors writes several in any order.
    return save(dict(checkpoint.tensors), {_METADATA: _canonical(facts)})


def decode(content: bytes, name: str) -> Checkpoint:
    """Decode a checkpoint.

    Args:
        content: the bytes of the file.
        name: the file's name, for error messages.

    Raises:
        CheckpointError: the file is corrupt, truncated, not a checkpoint, or of a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    tensors: dict[str, NDArray[Any]] = {}
    try:
        with suppress(KeyError):  # a dtype that NumPy lacks: not ours, and reported below
            tensors = load(content)
    except SafetensorError as error:
        _refuse(name, f"is no complete safetensors file ({error}): it is corrupt, was cut off, or is something else")
    size = int.from_bytes(content[:_HEADER_BYTES], "little")
    header = json.loads(content[_HEADER_BYTES : _HEADER_BYTES + size])
    try:
        facts = json.loads(header["__metadata__"][_METADATA])
        version = int(facts["format"])
    except (KeyError, TypeError, ValueError):
        _refuse(name, "is a safetensors file, but not one that `bnlayer train --save` wrote")
    if version > FORMAT:
        _refuse(name, f"has format {version}, and this version of bnlayer reads up to {FORMAT}: use a newer one")
    try:
        expected = facts.pop("checksum")
        if _checksum(facts, tensors) != expected:
            _refuse(name, "does not match its checksum: it was changed, or is corrupt")
        progress = Progress.from_json(facts["progress"])
        labels = facts["data"].pop("labels", None)
        data = Origin(**facts["data"], numbered=None if labels is None else tuple(labels))
        return Checkpoint(tensors, progress, facts["settings"], data, name)
    except (KeyError, TypeError) as error:
        _refuse(name, f"lacks what every checkpoint has ({error}): it is corrupt")


def read(path: Path) -> Checkpoint | None:
    """Read the checkpoint in a file; None if there is no such file.

    Raises:
        CheckpointError: the file can't be read, or is not a checkpoint.
    """
    content = _content(path)
    return None if content is None else decode(content, str(path))


def read_by_first(world: World, path: Path) -> Checkpoint | None:
    """Have rank 0 read a checkpoint and broadcast it; None if there is no such file. Every rank calls it.

    Raises:
        CheckpointError: on every rank, with the same text.
        CollectiveError: another rank is lost.
    """
    parts: list[bytes] = []
    if world.rank == 0:
        try:
            content = _content(path)
            parts = [] if content is None else [content]
        except CheckpointError as error:
            parts = [b"", str(error).encode()]
    parts = [part.tobytes() for part in world.broadcast([np.frombuffer(part, np.uint8) for part in parts])]
    if len(parts) == 2:
        raise CheckpointError(parts[1].decode())
    return decode(parts[0], str(path)) if parts else None


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _refuse(str(path), f"cannot be read ({error.strerror})")


def _checksum(facts: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.blake2b(_canonical(facts).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype.name} {tensor.shape}\n".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def _canonical(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, allow_nan=False)


def _refuse(name: str, why: str) -> NoReturn:
    raise CheckpointError(f"{name} {why}.")
