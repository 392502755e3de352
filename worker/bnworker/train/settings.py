"""What determines a training run, besides its data.

Laws:
1. Two runs with equal settings and equal data take the same steps: nothing else is asked anywhere.
2. A step's learning rate depends on the settings and the step's number alone, so that a resumed run needs no more.
3. What the user calls wrong is named as the user wrote it: `--batch-size`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bnworker.train.data import LAST_BATCHES, LastBatch

SCHEDULES = ("constant", "cosine", "step")
DTYPES = ("float32", "float64")

_EXTENDS = ("epochs", "steps")  # more of the same steps: a resumed run may ask for another number of them
_WITHOUT_LAST_BATCH: LastBatch = "keep"  # what runs did whose checkpoints do not name it


class SettingsError(ValueError):
    """A setting is out of range, or contradicts another one."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The options of a run.

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows of a step, of all ranks together.
        learning_rate, momentum: of gradient descent; see `learning_rate_of` and `SGD`.
        hidden: outputs of each hidden layer.
        seed: of the initial weights and the order of the rows.
        dtype: "float32" or "float64".
        steps: stop after so many steps, if that is sooner.
        schedule: "constant", "cosine" or "step".
        warmup_steps: over which the rate rises to `learning_rate`.
        decay, decay_epochs: schedule "step" multiplies the rate by `decay` after every `decay_epochs` epochs.
        weight_decay: of the kernels, decoupled from the gradient.
        gamma_regularizer, beta_regularizer, gamma_constraint, beta_constraint: of the normalizations, e.g. "l2=1e-4".
        bn_momentum, epsilon: of the normalizations.
        validation_split: share of the training rows that is kept for validation.
        early_stop: end after so many epochs without a lower validation loss.
        classes: how many: labels are 0 to classes − 1, whether all of them occur or not. None: those that occur.
        last_batch: what becomes of the rows of an epoch that do not fill a batch, "spread", "keep" or "drop": see
            `EpochSteps`. None: not asked for; `completed` decides.
        init_from: the file of the weights that it begins with; None: they are drawn by the seed.

    Raises:
        SettingsError: one is out of range.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    hidden: tuple[int, ...] = (128, 64)
    seed: int = 0
    dtype: str = "float32"
    steps: int | None = None
    schedule: str = "constant"
    warmup_steps: int = 0
    decay: float = 0.1
    decay_epochs: int = 10
    weight_decay: float = 0.0
    gamma_regularizer: str | None = None
    beta_regularizer: str | None = None
    gamma_constraint: str | None = None
    beta_constraint: str | None = None
    bn_momentum: float = 0.99
    epsilon: float = 1e-3
    validation_split: float = 0.0
    early_stop: int | None = None
    classes: int | None = None
    last_batch: LastBatch | None = None
    init_from: str | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "decay_epochs", "steps", "early_stop", "classes"):
            self._refuse_unless(name, ">= 1", getattr(self, name) is None or getattr(self, name) >= 1)
        for name in ("seed", "warmup_steps"):
            self._refuse_unless(name, ">= 0", getattr(self, name) >= 0)
        for name in ("learning_rate", "weight_decay"):
            self._refuse_unless(name, "a finite number >= 0", 0 <= getattr(self, name) < math.inf)
        for name in ("momentum", "bn_momentum", "decay"):
            self._refuse_unless(name, "from 0 to 1", 0 <= getattr(self, name) <= 1)
        self._refuse_unless("epsilon", "a finite number > 0", 0 < self.epsilon < math.inf)
        self._refuse_unless("validation_split", ">= 0 and below 1", 0 <= self.validation_split < 1)
        self._refuse_unless("hidden", "positive integers", all(size > 0 for size in self.hidden))
        self._refuse_unless("schedule", f"one of {', '.join(SCHEDULES)}", self.schedule in SCHEDULES)
        self._refuse_unless("dtype", f"one of {', '.join(DTYPES)}", self.dtype in DTYPES)
        accepted = (None, *LAST_BATCHES)
        self._refuse_unless("last_batch", f"one of {', '.join(LAST_BATCHES)}", self.last_batch in accepted)
        if self.early_stop is not None and not self.validation_split:
            raise SettingsError(
                "--early-stop watches the validation loss, and there are no validation rows: "
                "give --validation-split too, e.g. 0.1."
            )

    def _refuse_unless(self, name: str, wanted: str, holds: bool) -> None:
        if not holds:
            raise SettingsError(f"{option(name)}: expected {wanted}, received {getattr(self, name)!r}.")

    def completed(self, saved: Mapping[str, Any] | None) -> Settings:
        """The same, with a value for what was not asked for: as it was in a run that goes on.

        Args:
            saved: `as_json()` of the run that it goes on from; None: it begins. One without `last_batch` is older
                than this setting, and kept what was left of an epoch as its last step.
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
        """Why a run with these settings can't go on from one with others; empty: it can.

        Other `epochs` and `steps` only say how far to go; but a cosine's rate depends on the epochs that it spans.

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


def option(name: str) -> str:
    """A setting's name on the command line."""
    return "--" + name.replace("_", "-")


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return "not given" if value is None else str(value)
