"""The settings that, with its data, determine a training run.

Laws:
1. Two runs with equal settings and equal data make the same steps.
2. A step's learning rate depends on the settings and the step's number alone; a resumed run needs nothing else.
3. Errors name a setting as the user writes it: `--batch-size`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from bnworker.train.declaration import (
    Accepted,
    Setting,
    SettingsError,
    at_least,
    expected,
    finite,
    fraction,
    one_of,
    option,
    refuse,
    spelled,
)

__all__ = ["LAST_BATCHES", "NAMES", "LastBatch", "Settings", "SettingsError", "option"]

LastBatch = Literal["spread", "keep", "drop"]
LAST_BATCHES: tuple[LastBatch, ...] = get_args(LastBatch)

_EXTENDS = ("epochs", "steps")  # only the length of the run: a resumed run may change it
_WITHOUT_LAST_BATCH: LastBatch = "keep"  # the behaviour of runs whose checkpoints lack this setting

_MODEL, _TRAINING = "Model", "Training"


def _sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"expected positive integers with commas, e.g. 128,64; received {text!r}")
    return tuple(map(int, parts))


def _penalty(kind: str) -> Accepted:
    """Names of regularizers or constraints that `penalties` accepts."""

    def problem(text: str) -> str | None:
        from bnworker.train import penalties

        parse: Callable[[str | None], object] = getattr(penalties, kind)
        try:
            parse(text)
        except ValueError as error:
            return str(error)
        return None

    return Accepted(problem)


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a run. Each is declared here alone: see `declaration`.

    Attributes:
        hidden: outputs of each hidden layer.
        init_from: the file with the initial weights; None: they are drawn by the seed.
        classes: their number: labels are 0 to classes − 1, whether all occur or not; None: the labels that occur.
        dtype: "float32" or "float64".
        bn_momentum, epsilon: of the normalizations.
        gamma_regularizer, beta_regularizer, gamma_constraint, beta_constraint: of the normalizations, e.g. "l2=1e-4".
        epochs: passes over the training rows.
        steps: stop after so many steps, if that is sooner.
        batch_size: rows of a step, of all ranks together.
        last_batch: what becomes of the rows of an epoch that do not fill a batch, "spread", "keep" or "drop": see
            `EpochSteps`. None: not given; `completed` decides.
        learning_rate, momentum: of gradient descent; see `learning_rate_of` and `SGD`.
        schedule: "constant", "cosine" or "step".
        warmup_steps: over which the rate rises to `learning_rate`.
        decay, decay_epochs: schedule "step" multiplies the rate by `decay` after every `decay_epochs` epochs.
        weight_decay: of the kernels, decoupled from the gradient.
        validation_split: share of the training rows that is kept for validation.
        early_stop: end after so many epochs without a lower validation loss.
        seed: of the initial weights and the order of the rows.

    Raises:
        SettingsError: a setting is out of range.
    """

    hidden: Annotated[
        tuple[int, ...],
        Setting(
            "Outputs of each hidden layer.",
            _MODEL,
            expected("positive integers", lambda sizes: all(size > 0 for size in sizes)),
            "N,N,...",
            written=str,
            read=_sizes,
        ),
    ] = (128, 64)
    init_from: Annotated[
        str | None,
        Setting(
            "Begin with the weights of a Keras or torch model, an export or a checkpoint.",
            _MODEL,
            metavar="FILE",
            written=Path,
            read=str,
        ),
    ] = None
    classes: Annotated[
        int | None,
        Setting(
            "How many: labels from 0 to one less, whether all occur or not; those that occur if not given.",
            _MODEL,
            at_least(1),
        ),
    ] = None
    dtype: Annotated[str, Setting("Of weights and arithmetic.", _MODEL, one_of("float32", "float64"))] = "float32"
    bn_momentum: Annotated[float, Setting("Weight of the old moving statistics.", _MODEL, fraction())] = 0.99
    epsilon: Annotated[
        float,
        Setting("Added to the variance.", _MODEL, expected("a finite number > 0", lambda value: 0 < value < math.inf)),
    ] = 1e-3
    gamma_regularizer: Annotated[
        str | None, Setting("`l1`, `l2`, `l1_l2`; e.g. `l2=1e-4`.", _MODEL, _penalty("regularizer"), "NAME")
    ] = None
    beta_regularizer: Annotated[str | None, Setting("Likewise.", _MODEL, _penalty("regularizer"), "NAME")] = None
    gamma_constraint: Annotated[
        str | None,
        Setting("`non_neg`, `max_norm`, `unit_norm`; e.g. `max_norm=2`.", _MODEL, _penalty("constraint"), "NAME"),
    ] = None
    beta_constraint: Annotated[str | None, Setting("Likewise.", _MODEL, _penalty("constraint"), "NAME")] = None
    epochs: Annotated[int, Setting("Passes over the training rows.", _TRAINING, at_least(1))] = 20
    steps: Annotated[int | None, Setting("Stop after so many steps, if that is sooner.", _TRAINING, at_least(1))] = None
    batch_size: Annotated[int, Setting("Rows of a step, of all workers together.", _TRAINING, at_least(1))] = 64
    last_batch: Annotated[
        LastBatch | None,
        Setting(
            "Rows that do not fill a batch: `spread` over the steps of the epoch (the default), "
            "`keep` as a smaller last step, or `drop`. A resumed run goes on as it began.",
            _TRAINING,
            one_of(*LAST_BATCHES),
        ),
    ] = None
    learning_rate: Annotated[float, Setting("Of gradient descent.", _TRAINING, finite(shown=True))] = 0.1
    schedule: Annotated[
        str,
        Setting(
            "Of the learning rate; `cosine` falls to 0 over --epochs.", _TRAINING, one_of("constant", "cosine", "step")
        ),
    ] = "constant"
    warmup_steps: Annotated[
        int, Setting("Steps over which the learning rate rises.", _TRAINING, at_least(0, shown=False))
    ] = 0
    decay: Annotated[float, Setting("`--schedule step`: the factor.", _TRAINING, fraction())] = 0.1
    decay_epochs: Annotated[
        int, Setting("`--schedule step`: epochs between two decays.", _TRAINING, at_least(1, shown=False))
    ] = 10
    momentum: Annotated[float, Setting("Of gradient descent.", _TRAINING, fraction(shown=True))] = 0.9
    weight_decay: Annotated[
        float,
        Setting(
            "Decoupled (no L2 penalty): kernels shrink by this times the learning rate in each step.",
            _TRAINING,
            finite(),
        ),
    ] = 0.0
    validation_split: Annotated[
        float,
        Setting(
            "Share of the training rows to validate on instead.",
            _TRAINING,
            expected(">= 0 and below 1", lambda value: 0 <= value < 1),
        ),
    ] = 0.0
    early_stop: Annotated[
        int | None,
        Setting(
            "End after so many epochs without a lower validation loss; the result is the best epoch's model.",
            _TRAINING,
            at_least(1, shown=False),
            "PATIENCE",
        ),
    ] = None
    seed: Annotated[int, Setting("Of the initial weights and the order of the rows.", _TRAINING, at_least(0))] = 0

    def __post_init__(self) -> None:
        refuse(self)
        if self.early_stop is not None and not self.validation_split:
            raise SettingsError(
                "--early-stop watches the validation loss, and there are no validation rows: "
                "give --validation-split too, e.g. 0.1."
            )

    def completed(self, saved: Mapping[str, Any] | None) -> Settings:
        """The same settings with a value for `last_batch`: the given one, the resumed run's, or the default.

        Args:
            saved: `as_json()` of the run that is resumed; None: this is a new run. Runs that were saved before
                `last_batch` existed had a smaller last step ("keep").
        """
        otherwise = "spread" if saved is None else saved.get("last_batch") or _WITHOUT_LAST_BATCH
        return replace(self, last_batch=self.last_batch or otherwise)

    def total_steps(self, steps_per_epoch: int) -> int:
        """How many steps the run takes, unless it stops early."""
        planned = self.epochs * steps_per_epoch
        return planned if self.steps is None else min(planned, self.steps)

    def learning_rate_of(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step.

            t = step − 1, w = warmup_steps, E = steps per epoch, T = epochs·E, r = learning_rate

            t < w       r·(t + 1)/w
            constant    r
            cosine      r·½·(1 + cos(π·(t − w)/(T − w)))
            step        r·decay^⌊t/(E·decay_epochs)⌋

        Args:
            step: from 1.
            steps_per_epoch: E.

        Source of the cosine: Loshchilov and Hutter, "SGDR" (2017), one cycle.
        """
        t, warmup = step - 1, self.warmup_steps
        if t < warmup:
            return self.learning_rate * (t + 1) / warmup
        if self.schedule == "cosine":
            part = (t - warmup) / (self.epochs * steps_per_epoch - warmup)
            return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * part))
        if self.schedule == "step":
            return self.learning_rate * float(self.decay ** (t // (steps_per_epoch * self.decay_epochs)))
        return self.learning_rate

    def as_json(self) -> dict[str, Any]:
        """As plain JSON values; tuples become lists."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def differences(self, saved: Mapping[str, Any]) -> list[str]:
        """The differences because of which a run can't be resumed with these settings; empty: it can.

        `epochs` and `steps` may differ, as they only set the length of the run; with a cosine schedule `epochs` may
        not, because the learning rate depends on it.

        Args:
            saved: the other run's `as_json()`.
        """
        free = ("steps",) if self.schedule == "cosine" else _EXTENDS
        asked = self.completed(saved).as_json()
        was = {**Settings().as_json(), **saved, "last_batch": saved.get("last_batch") or _WITHOUT_LAST_BATCH}
        return [
            f"{option(name)} was {_shown(before)}, now {_shown(asked.get(name))}"
            for name, before in was.items()
            if name not in free and before != asked.get(name)
        ]


NAMES = tuple(field.name for field in fields(Settings))


def _shown(value: object) -> str:
    return "not given" if value is None else spelled(value)
