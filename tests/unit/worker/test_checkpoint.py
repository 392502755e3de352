"""The checkpoint file: what is read is what was written, or an error that says what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from bnworker.train.checkpoint import (
    FORMAT,
    Checkpoint,
    CheckpointError,
    Origin,
    Progress,
    decode,
    encode,
    read,
    read_by_first,
)
from bnworker.train.elastic import Kept
from bnworker.train.events import Epoch
from bnworker.train.export import encoded, weights
from bnworker.train.settings import Settings
from bnworker.transports.alone import AloneTransport
from bnworker.world import World

EPOCH = Epoch(
    number=1,
    steps=3,
    rows=21,
    loss=0.1 + 0.2,
    accuracy=1 / 3,
    test_loss=5e-324,
    test_accuracy=1.0,
    validation_loss=0.7,
    validation_accuracy=0.5,
    learning_rate=0.1,
)


def made(tensors: Mapping[str, NDArray[Any]] | None = None, steps: int = 4) -> Checkpoint:
    """A checkpoint with an epoch behind it."""
    held = {"dense_1/kernel": np.arange(6.0).reshape(2, 3), "bn_1/state/flags": np.array([1, 0, steps])}
    progress = Progress(steps, (EPOCH,), loss_sum=1 / 3, correct=5, rows=8)
    return Checkpoint({**held, **(tensors or {})}, progress, Settings().as_json(), Origin("digits", "ab" * 16, 64, 10))


def test_a_checkpoint_round_trips() -> None:
    """Every bit of every tensor and number."""
    before = made({"f32": np.array([[1e-45], [-0.0]], np.float32)})
    after = decode(encode(before), "FILE")
    assert after.tensors.keys() == before.tensors.keys()
    for name, tensor in before.tensors.items():
        got = after.tensors[name]
        assert (got.dtype, got.shape, got.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes())
    assert (after.progress, after.settings, after.data) == (before.progress, before.settings, before.data)
    assert after.name == "FILE"


def test_the_best_epoch_is_the_first_of_equals() -> None:
    """So that more epochs with the same loss change neither the result nor when a run stops early."""
    losses = (0.9, 0.7, 0.7, None)
    epochs = [replace(EPOCH, number=number, validation_loss=loss) for number, loss in enumerate(losses, 1)]
    assert Progress(9, tuple(epochs)).best == epochs[1]
    assert Progress(9, (epochs[3],)).best is None


def test_equal_states_make_equal_bytes() -> None:
    """In whatever order and layout the tensors and settings come."""
    one = made({"a": np.ones((2, 3)), "b": np.zeros(2)})
    other = made({"b": np.zeros(2), "a": np.ones((3, 2)).T})
    assert encode(one) == encode(other)
    turned = dict(sorted(one.settings.items(), reverse=True))
    assert encode(replace(one, settings=turned)) == encode(one)
    assert encode(made(steps=5)) != encode(made(steps=4))


def with_facts(content: bytes, **changes: Any) -> bytes:
    """The same file with other metadata, and no care for the checksum."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    facts = json.loads(header["__metadata__"]["bnlayer"])
    facts |= changes
    header["__metadata__"]["bnlayer"] = json.dumps({name: fact for name, fact in facts.items() if fact is not None})
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


COMPLETE = encode(made())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "FILE is no complete safetensors file ("),
        (COMPLETE[:4], "FILE is no complete safetensors file ("),
        (COMPLETE[:100], "FILE is no complete safetensors file ("),
        (COMPLETE[:-1], "FILE is no complete safetensors file ("),
        (COMPLETE + b"x", "FILE is no complete safetensors file ("),
        (b"PK\3\4 is how a .npz begins", "FILE is no complete safetensors file ("),
        (COMPLETE[:-1] + b"x", "FILE does not match its checksum: it was changed, or is corrupt."),
        (with_facts(COMPLETE, settings={}), "FILE does not match its checksum: it was changed, or is corrupt."),
        (with_facts(COMPLETE, checksum=None), "FILE lacks what every checkpoint has ('checksum'): it is corrupt."),
        (
            with_facts(COMPLETE, format=FORMAT + 1),
            f"FILE has format {FORMAT + 1}, and this version of bnlayer reads up to {FORMAT}: use a newer one.",
        ),
        (
            save({"w": np.zeros(2)}, {"format": "pt"}),
            "FILE is a safetensors file, but not one that `bnlayer train --save` wrote.",
        ),
        (save({"w": np.zeros(2)}), "FILE is a safetensors file, but not one that `bnlayer train --save` wrote."),
        (
            save({"w": np.zeros(2)}, {"bnlayer": "no JSON"}),
            "FILE is a safetensors file, but not one that `bnlayer train --save` wrote.",
        ),
        (
            save({"w": np.zeros(2)}, {"bnlayer": "[1]"}),
            "FILE is a safetensors file, but not one that `bnlayer train --save` wrote.",
        ),
        (
            save({"w": np.zeros(2)}, {"bnlayer": '{"format": 1}'}),
            "FILE lacks what every checkpoint has ('checksum'): it is corrupt.",
        ),
    ],
)
def test_what_is_no_checkpoint(content: bytes, text: str) -> None:
    """Corrupt, cut off, foreign, newer: each has its line."""
    with pytest.raises(CheckpointError) as raised:
        decode(content, "FILE")
    assert str(raised.value).startswith(text)
    assert "\n" not in str(raised.value)


def test_any_changed_byte_is_detected() -> None:
    """Wherever it is: in the header, in the metadata, in a tensor."""
    for at in range(0, len(COMPLETE), 7):
        changed = bytearray(COMPLETE)
        changed[at] ^= 0x10
        try:
            got = decode(bytes(changed), "FILE")
        except CheckpointError:
            continue
        assert encode(got) == COMPLETE, at  # only what safetensors pads with may change


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """No error: a run that may be killed at any moment may have been killed before its first checkpoint."""
    assert read(tmp_path / "none") is None
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory\)\.$"):
        read(tmp_path)


def test_every_rank_gets_what_the_first_one_read(tmp_path: Path) -> None:
    """In a world of one: the file, nothing, or the error."""
    world = World(AloneTransport(), install=False)
    path = tmp_path / "run.safetensors"
    assert read_by_first(world, path) is None
    path.write_bytes(COMPLETE)
    got = read_by_first(world, path)
    assert got is not None
    assert encode(got) == COMPLETE
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is no complete safetensors file"):
        read_by_first(world, path)
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_by_first(world, tmp_path)


def test_drafts_of_killed_processes_are_removed(tmp_path: Path) -> None:
    """When the next run begins; other files stay."""
    from bnworker.train.files import prepare

    for name in (".run.safetensors.k3j4.draft", ".other.safetensors.k3j4.draft", "run.safetensors"):
        (tmp_path / name).touch()
    prepare(tmp_path / "run.safetensors")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".other.safetensors.k3j4.draft", "run.safetensors"]


STATE: dict[str, NDArray[Any]] = {
    "bn_1/gamma": np.ones(3),
    "bn_1/beta": np.zeros(3),
    "bn_1/state/moving_mean": np.full(3, 2.0),
    "bn_1/state/moving_variance": np.full(3, 4.0),
    "bn_1/state/forward.pivot": np.zeros(3),
    "optimizer/dense_1/kernel": np.zeros((2, 3)),
}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("keras", ["bn_1/beta", "bn_1/gamma", "bn_1/moving_mean", "bn_1/moving_variance", "dense_1/kernel"]),
        ("torch", ["bn_1.bias", "bn_1.running_mean", "bn_1.running_var", "bn_1.weight", "dense_1.weight"]),
    ],
)
def test_export_in_the_frameworks_names(names: str, expected: list[str]) -> None:
    """Weights and statistics alone; torch keeps its kernels the other way round."""
    checkpoint = made(STATE)
    named = weights(checkpoint, names)
    assert sorted(named) == expected
    kernel = checkpoint.tensors["dense_1/kernel"]
    assert np.array_equal(named[expected[-1]], kernel if names == "keras" else kernel.T)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_exported_files(suffix: str, tmp_path: Path) -> None:
    """Both can be read back without pickles."""
    path = tmp_path / f"out{suffix}"
    path.write_bytes(encoded(made(STATE), "keras", suffix))
    read_back: Mapping[str, Any]
    if suffix == ".npz":
        read_back = dict(np.load(path, allow_pickle=False))
    else:
        from safetensors.numpy import load_file

        read_back = load_file(path)
    assert np.array_equal(read_back["dense_1/kernel"], np.arange(6.0).reshape(2, 3))
    assert len(read_back) == 5


def test_an_elastic_run_keeps_copies() -> None:
    """What the run writes after a step is not in the state of that step; another rank takes over every bit of it."""
    before, kept, other = made(), Kept(), Kept()
    assert kept.packed() == []
    kept.keep(before)
    before.tensors["dense_1/kernel"][...] = 9
    world = World(AloneTransport(), install=False)
    other.take(world, kept.saves, kept.packed())
    assert other.saves == 1
    for each in (kept, other):
        assert each.checkpoint is not None
        assert np.array_equal(each.checkpoint.tensors["dense_1/kernel"], np.arange(6.0).reshape(2, 3))


def test_the_best_epochs_weights_are_exported() -> None:
    """Of a run that may stop early."""
    best = {f"best/{name}": np.full_like(value, 7) for name, value in STATE.items() if not name.startswith("optimizer")}
    named = weights(made({**STATE, **best}), "keras")
    assert np.array_equal(named["bn_1/gamma"], np.full(3, 7.0))


def test_the_folder_is_synchronized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the name was changed, so that a loss of power cannot bring the old file back."""
    from bnworker.train.files import write_atomically

    happened: list[str] = []
    real_sync, real_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        happened.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path.resolve() else "file")
        real_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        happened.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomically(tmp_path / "run.safetensors", b"content")
    assert happened == ["file", "rename", "folder"]
