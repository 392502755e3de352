"""A run that goes on from a checkpoint is the run that was cut off: in a world of one, from every step of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from bnlayer.collective import installed
from bnworker.train.checkpoint import Checkpoint, CheckpointError, decode, encode, labels_of
from bnworker.train.data import Dataset, LastBatch, from_arrays
from bnworker.train.events import Epoch, Event, Resumed, Saved
from bnworker.train.loop import Outcome, Saving, StoppedError, train
from bnworker.train.settings import Settings
from bnworker.transports.alone import AloneTransport
from bnworker.world import World

# All that a run can hold: velocities, decay, penalties, projections, a schedule, and the best epoch's model.
EVERYTHING = Settings(
    epochs=4,
    batch_size=8,
    hidden=(5, 4),
    learning_rate=0.5,
    schedule="cosine",
    warmup_steps=3,
    weight_decay=0.01,
    gamma_regularizer="l2=0.01",
    beta_constraint="max_norm=1",
    validation_split=0.25,
    early_stop=3,
)
PLAIN = Settings(epochs=3, batch_size=8, hidden=(5,), dtype="float64")


def data(
    settings: Settings, seed: int = 5, columns: int = 4, first_label: int = 0, labels: Iterable[int] | None = None
) -> Dataset:
    """Three classes, not easily told apart."""
    rng = np.random.default_rng(seed)
    y = np.arange(40) % 3
    x = rng.standard_normal((40, columns)) + np.eye(3, columns)[y]
    y += first_label
    options = {"dtype": settings.dtype, "validation_split": settings.validation_split, "labels": labels}
    return from_arrays("small", x, y, x[:6], y[:6], **options)  # type: ignore[arg-type]  # of several types


def run(
    settings: Settings,
    start: bytes | None = None,
    every: int | None = None,
    given: Dataset | None = None,
    stop: Callable[[], bool] = lambda: False,
    files: list[tuple[int, bytes]] | None = None,
) -> tuple[Outcome, list[tuple[int, bytes]], list[Event]]:
    """One run in a world of its own; its outcome, the files that it wrote by steps, and what it told."""
    files = [] if files is None else files
    events: list[Event] = []

    def write(checkpoint: Checkpoint) -> None:
        files.append((checkpoint.progress.steps, encode(checkpoint)))

    world = World(AloneTransport(), install=False)
    with installed(world):
        begun = None if start is None else decode(start, "run.safetensors")
        saving = Saving(write, every)
        used = given or data(settings)
        outcome = train(settings, used, world, watch=events.append, start=begun, saving=saving, stop=stop)
        return outcome, files, events


@pytest.mark.parametrize("settings", [EVERYTHING, PLAIN], ids=["everything", "plain"])
def test_from_every_step(settings: Settings) -> None:
    """Saved after each step, resumed from each: all later files, and the outcome, are the same bytes."""
    uninterrupted, files, _ = run(settings, every=1)
    steps = [number for number, _ in files]
    assert steps == list(range(1, uninterrupted.steps + 1))
    for at, (number, content) in enumerate(files):
        resumed, later, events = run(settings, content, every=1)
        assert later == files[at + 1 :], number
        assert isinstance(events[0], Resumed)
        assert events[0].steps == resumed.resumed_steps == number
        assert [epoch.record() for epoch in resumed.epochs] == [epoch.record() for epoch in uninterrupted.epochs]
        assert (resumed.kept, resumed.test_loss) == (uninterrupted.kept, uninterrupted.test_loss)
        mine, its = resumed.model.tensors(0), uninterrupted.model.tensors(0)
        assert all(mine[name].tobytes() == its[name].tobytes() for name in its)


def without_last_batch(content: bytes) -> bytes:
    """The file as it was written before there was this setting, when the last step took what was left."""
    saved = decode(content, "run.safetensors")
    assert saved.settings["last_batch"] == "keep"
    older = {name: value for name, value in saved.settings.items() if name != "last_batch"}
    return encode(replace(saved, settings=older))


# 43 rows in batches of 8: kept, spread and dropped rows make different steps.
UNEVEN = replace(PLAIN, batch_size=9)


def test_older_checkpoints_go_on_as_they_began() -> None:
    """Without the setting a run kept what was left of an epoch: from each step of it, the same bytes to its end."""
    _, files, _ = run(replace(UNEVEN, last_batch="keep"), every=1)
    for at, (_, content) in enumerate(files):
        assert run(UNEVEN, without_last_batch(content), every=1)[1] == files[at + 1 :]
    with pytest.raises(CheckpointError, match=r"other options: --last-batch was keep, now spread\. Give the same"):
        run(replace(UNEVEN, last_batch="spread"), without_last_batch(files[0][1]))


@pytest.mark.parametrize("settings", [EVERYTHING, PLAIN], ids=["everything", "plain"])
def test_stopped_after_every_step(settings: Settings) -> None:
    """What is saved is what the whole run saves after that step, evaluated where an epoch ends there."""
    uninterrupted, files, _ = run(settings, every=1)
    by_steps = dict(files)
    for last in range(1, uninterrupted.steps):
        asked = iter([*[False] * (last - 1), True])
        stopped: list[tuple[int, bytes]] = []
        with pytest.raises(StoppedError, match=rf"^The run was stopped after step {last}\.$"):
            run(settings, stop=partial(next, asked), files=stopped)
        assert stopped[-1] == (last, by_steps[last])
    asked = iter([*[False] * (uninterrupted.steps - 1), True])
    assert run(settings, stop=partial(next, asked))[1][-1] == files[-1], "its last step: nothing is left to stop"


def test_labels_are_saved_and_restored() -> None:
    """Output k stands for the k-th label: the file says which, so that other rows can be compared with the model."""
    _, files, _ = run(PLAIN, given=data(PLAIN, first_label=1))
    saved = decode(files[-1][1], "")
    assert (saved.data.classes, saved.data.labels, saved.data.numbered) == (3, (1, 2, 3), (1, 2, 3))
    plain = decode(run(PLAIN)[1][-1][1], "")
    assert (plain.data.labels, plain.data.numbered) == ((0, 1, 2), None)


def test_older_checkpoints_have_a_class_for_every_number() -> None:
    """Labels 1 to 3 were four classes: such a run goes on with four, and ends with the same bytes."""
    four = replace(PLAIN, classes=4)
    _, files, _ = run(four, given=data(four, first_label=1, labels=range(4)))
    written = decode(files[0][1], "run.safetensors")
    assert "labels" not in json.loads(_metadata(files[0][1]))["data"]
    start = replace(written, settings={name: value for name, value in written.settings.items() if name != "classes"})
    labels = labels_of(PLAIN, start)
    assert labels == (0, 1, 2, 3)
    resumed = run(PLAIN, encode(start), given=data(PLAIN, first_label=1, labels=labels))[1]
    mine, its = (decode(content, "").tensors for content in (resumed[-1][1], files[-1][1]))
    assert {name: tensor.tobytes() for name, tensor in mine.items()} == {
        name: tensor.tobytes() for name, tensor in its.items()
    }


def _metadata(content: bytes) -> str:
    size = int.from_bytes(content[:8], "little")
    return str(json.loads(content[8 : 8 + size])["__metadata__"]["bnlayer"])


@pytest.mark.parametrize("last_batch", ["spread", "keep", "drop"])
def test_a_run_goes_on_with_its_last_batch(last_batch: LastBatch) -> None:
    """Without the option as it began, in whatever way; with another one it is refused."""
    _, files, _ = run(replace(UNEVEN, last_batch=last_batch), every=1)
    assert run(UNEVEN, files[1][1], every=1)[1] == files[2:]
    assert decode(files[-1][1], "").settings["last_batch"] == last_batch
    other: LastBatch = "drop" if last_batch != "drop" else "keep"
    with pytest.raises(CheckpointError, match=rf"--last-batch was {last_batch}, now {other}\."):
        run(replace(UNEVEN, last_batch=other), files[1][1])


def test_what_is_saved_when() -> None:
    """After every epoch and at the end; in between every so many steps; no state twice."""
    assert [number for number, _ in run(PLAIN)[1]] == [5, 10, 15]
    assert [number for number, _ in run(PLAIN, every=4)[1]] == [4, 5, 8, 10, 12, 15]
    _, files, events = run(replace(PLAIN, steps=8), every=4)
    assert [number for number, _ in files] == [4, 5, 8]
    assert [one.steps for one in events if isinstance(one, Saved)] == [4, 5, 8]


def test_going_on_equals_longer_training() -> None:
    """--steps and --epochs end a run; a resumed one with more of them is the one that had them from the start."""
    uninterrupted = run(PLAIN)[1]
    for short in (replace(PLAIN, steps=7), replace(PLAIN, epochs=2)):
        ended = run(short)[1][-1][1]
        assert run(PLAIN, ended)[1][-1] == uninterrupted[-1]


def test_nothing_left_to_do() -> None:
    """A finished run that is resumed takes no step, writes nothing, and has the same result."""
    first, files, _ = run(EVERYTHING)
    resumed, none, events = run(EVERYTHING, files[-1][1])
    assert none == []
    assert [type(one) for one in events] == [Resumed]
    assert (resumed.steps, resumed.rows, resumed.seconds) == (first.steps, 0, 0.0)
    assert (resumed.test_loss, resumed.kept) == (first.test_loss, first.kept)


def test_nothing_left_to_do_within_an_epoch() -> None:
    """It is evaluated as it is."""
    first, files, _ = run(replace(PLAIN, steps=7))
    resumed, none, events = run(replace(PLAIN, steps=6), files[-1][1])
    assert none == []
    assert [type(one) for one in events] == [Resumed, Epoch]
    assert resumed.epochs[-1].record() == first.epochs[-1].record()


def test_the_best_epochs_model_is_in_the_file() -> None:
    """Beside the one that training goes on from; the result is the best one's."""
    outcome, files, _ = run(EVERYTHING)
    saved = decode(files[-1][1], "run.safetensors")
    assert outcome.kept < len(outcome.epochs)
    best = saved.best_weights()
    own = outcome.model.tensors(outcome.epochs[outcome.kept - 1].steps)
    assert best.keys() == own.keys()
    assert all(best[name].tobytes() == own[name].tobytes() for name in own)
    assert best["dense_1/kernel"].tobytes() != saved.tensors["dense_1/kernel"].tobytes()
    plain = decode(run(PLAIN)[1][-1][1], "run.safetensors")
    assert plain.best_weights()["dense_1/kernel"].tobytes() == plain.tensors["dense_1/kernel"].tobytes()


@pytest.mark.parametrize(
    ("settings", "given", "text"),
    [
        (
            replace(PLAIN, seed=1),
            data(PLAIN),
            (
                "--resume: run.safetensors belongs to a run with other options: --seed was 0, now 1. Give the same "
                "ones, or --save to another file."
            ),
        ),
        (
            PLAIN,
            data(PLAIN, seed=6),
            (
                "--resume: run.safetensors belongs to a run on other data: it was small (fingerprint {old}), this is "
                "small ({new}). Give the same data, or --save to another file."
            ),
        ),
    ],
)
def test_another_run_is_refused(settings: Settings, given: Dataset, text: str) -> None:
    """By the option, or by the data's contents."""
    file = run(replace(PLAIN, steps=1))[1][0][1]
    with pytest.raises(CheckpointError) as raised:
        run(settings, file, given=given)
    old, new = data(PLAIN).fingerprint[:12], given.fingerprint[:12]
    assert str(raised.value) == text.format(old=old, new=new)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"dense_1/kernel": None}, "lacks the tensor 'dense_1/kernel', which this run needs."),
        (
            {"optimizer/bn_1/gamma": np.zeros(3)},
            ": tensor 'optimizer/bn_1/gamma' has shape (3,) and dtype float64, this run needs (5,) and float64.",
        ),
        (
            {"bn_1/state/flags": np.zeros(3)},
            ": tensor 'bn_1/state/flags' has shape (3,) and dtype float64, this run needs (3,) and int64.",
        ),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Any], text: str) -> None:
    """Named, with both shapes."""
    made = decode(run(replace(PLAIN, steps=1))[1][0][1], "run.safetensors")
    tensors = {name: tensor for name, tensor in {**made.tensors, **change}.items() if tensor is not None}
    with pytest.raises(CheckpointError) as raised:
        run(PLAIN, encode(replace(made, tensors=tensors)))
    assert text in str(raised.value)
    assert str(raised.value).startswith("--resume: run.safetensors")
