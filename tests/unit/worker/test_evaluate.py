"""`bnlayer evaluate`: the figures of a checkpoint's model, from rows of any data that fit it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlayer.collective import installed
from bnworker.train.checkpoint import Checkpoint, read
from bnworker.train.data import load
from bnworker.train.evaluation import evaluate, evaluate_splits
from bnworker.train.model import cross_entropy, perceptron
from bnworker.train.settings import Settings
from bnworker.transports.alone import AloneTransport
from bnworker.world import World
from support.command_line import Command

CLASSES = 3


def rows(number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three classes that overlap, with labels 1, 4 and 5."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, number)
    return rng.standard_normal((number, 4)) + 2 * np.eye(CLASSES, 4)[y], np.array([1, 4, 5])[y]


def archive(path: str, number: int, seed: int, **more: Any) -> str:
    """A file of such rows."""
    x, y = rows(number, seed)
    np.savez(path, allow_pickle=False, **{"x": x, "y": y, **more})
    return path


@pytest.fixture
def trained(command: Command) -> Checkpoint:
    """What a short run left in run.safetensors, of which a tenth of the rows validated."""
    archive("rows.npz", 200, 1)
    code, _, err = command(
        *("train", "--data", "rows.npz", "--transport", "none", "--epochs", "2", "--hidden", "6", "--batch-size", "20"),
        *("--save", "run.safetensors", "--summary", "summary.json", "--validation-split", "0.1"),
    )
    assert code == 0, err
    checkpoint = read(Path("run.safetensors"))
    assert checkpoint is not None
    return checkpoint


def test_the_figures_of_training_are_reproduced(command: Command, trained: Checkpoint) -> None:
    """Without options: the rows that the run tested by, the same accuracy and loss."""
    code, out, err = command("evaluate", "run.safetensors", "--json", "--summary", "out/found.json")
    assert (code, err) == (0, "")
    figures, summary = json.loads(out), json.loads(Path("summary.json").read_text())
    assert json.loads(Path("out/found.json").read_text()) == figures
    assert (figures["accuracy"], figures["loss"]) == (summary["test_accuracy"], summary["test_loss"])
    assert (figures["split"], figures["rows"], figures["steps"], figures["data"]) == ("test", 40, 16, "rows.npz")
    assert (figures["checkpoint"], figures["transport"], figures["world_size"]) == ("run.safetensors", "alone", 1)
    code, out, err = command("evaluate", "run.safetensors", "--split", "validation", "--json")
    last = summary["history"][-1]
    validation = json.loads(out)
    assert (validation["accuracy"], validation["loss"]) == (last["validation_accuracy"], last["validation_loss"])
    counts = {split: json.loads(command("evaluate", "run.safetensors", "--split", split, "--json")[1])["rows"]
              for split in ("train", "validation", "test", "all")}  # fmt: skip
    assert counts == {"train": 144, "validation": 16, "test": 40, "all": 200}


def test_other_data_are_evaluated_in_all_and_class_by_class(command: Command, trained: Checkpoint) -> None:
    """Of rows that the model has never seen none is held back; each figure is what its definition says."""
    x, y = rows(57, 2)
    x, y = x[y != 4], y[y != 4]  # one of the three classes does not occur
    np.savez("new.npz", x=x, y=y)
    code, out, err = command("evaluate", "run.safetensors", "--data", "new.npz", "--json")
    assert (code, err) == (0, "")
    figures = json.loads(out)
    model = perceptron(Settings(hidden=(6,)), 4, CLASSES)
    model.load(trained.best_weights())
    logits, truth = model(x.astype(np.float32)), np.searchsorted([1, 4, 5], y)
    predicted = logits.argmax(axis=1)
    confusion = [[int(((truth == i) & (predicted == j)).sum()) for j in range(CLASSES)] for i in range(CLASSES)]
    assert (figures["split"], figures["rows"], figures["confusion"]) == ("all", len(y), confusion)
    assert figures["accuracy"] == float((predicted == truth).mean())
    assert figures["loss"] == pytest.approx(cross_entropy(logits, truth)[0] / len(y), rel=1e-6)
    assert [entry["label"] for entry in figures["classes"]] == [1, 4, 5]
    for k, entry in enumerate(figures["classes"]):
        right = int(((truth == k) & (predicted == k)).sum())
        of, taken = int((truth == k).sum()), int((predicted == k).sum())
        assert entry["rows"] == of
        assert entry["recall"] == (right / of if of else None)
        assert entry["precision"] == (right / taken if taken else None)
    archive("one.npz", 1, 3)
    assert json.loads(command("evaluate", "run.safetensors", "--data", "one.npz", "--json")[1])["rows"] == 1


def test_the_tables(command: Command, trained: Checkpoint) -> None:
    """For people: what was evaluated, the figures, and each class under the label that the data has."""
    code, out, err = command("evaluate", "run.safetensors")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "run.safetensors, step 16: rows.npz, test rows"
    assert any("accuracy" in line and "%" in line for line in lines)
    assert [line.split()[1] for line in lines if line.startswith("│")][-3:] == ["1", "4", "5"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("none.safetensors",), "none.safetensors: there is no such file."),
        (("rows.npz",), "rows.npz is no complete safetensors file"),
        (("run.safetensors", "--data", "none.npz"), "none.npz: cannot be read: No such file or directory."),
        (
            ("run.safetensors", "--data", "wide.npz"),
            "run.safetensors takes 4 features, those of rows.npz; wide.npz has 5.",
        ),
        (
            ("run.safetensors", "--data", "labels.npz"),
            "labels.npz: row 0 of y: label 2; expected 1, 4, 5, the labels of the model.",
        ),
        (("run.safetensors", "--summary", "."), "--summary: . is a folder: expected the name of a file."),
        (("run.safetensors", "--workers", "2", "--transport", "none"), "--transport none is for one worker"),
    ],
)
def test_what_does_not_fit_is_one_line(
    arguments: tuple[str, ...], text: str, command: Command, trained: Checkpoint
) -> None:
    """Exit code 2; nothing is printed or written."""
    np.savez("wide.npz", x=np.zeros((4, 5)), y=[1, 4, 5, 1])
    np.savez("labels.npz", x=np.zeros((2, 4)), y=[2, 1])
    code, out, err = command("evaluate", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("bnlayer: evaluate: ") and text in err


def test_a_run_without_validation_rows_and_one_with_many_classes(command: Command) -> None:
    """The checkpoint's run kept none; and many classes have no matrix of confusions."""
    archive("rows.npz", 30, 1)
    command("train", "--data", "rows.npz", "--transport", "none", "--epochs", "1", "--save", "run.safetensors")
    code, _, err = command("evaluate", "run.safetensors", "--split", "validation")
    assert (code, err) == (2, "bnlayer: evaluate: rows.npz has no such rows: validation.\n")
    alone = World(AloneTransport(), install=False)
    labels = range(300)
    np.savez("many.npz", x=np.ones((300, 4)), y=list(labels))
    data = load("many.npz", world=alone)
    with installed(alone):
        model = perceptron(Settings(hidden=(6,)), 4, 300)
        figures = evaluate_splits(model, data, alone, ["test"])
        assert figures.confusion_KK is None
        assert figures.accuracy == evaluate(model, data, alone).test_accuracy
        assert int(figures.rows_K.sum()) == figures.rows == data.test_rows == int(figures.predicted_K.sum())
