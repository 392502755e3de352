"""What a run can be asked for, and what a resumed one must not change."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from bnlayer.constraints import MaxNorm, NonNeg, UnitNorm
from bnlayer.regularizers import L1, L1L2, L2
from bnworker.cli import configuration
from bnworker.cli.options import given, with_options
from bnworker.train import penalties
from bnworker.train.declaration import Setting, at_least, one_of, refuse
from bnworker.train.settings import Settings, SettingsError


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"epochs": 0}, "--epochs: expected >= 1, received 0."),
        ({"batch_size": 0}, "--batch-size: expected >= 1, received 0."),
        ({"steps": 0}, "--steps: expected >= 1, received 0."),
        ({"warmup_steps": -1}, "--warmup-steps: expected >= 0, received -1."),
        ({"learning_rate": math.inf}, "--learning-rate: expected a finite number >= 0, received inf."),
        ({"weight_decay": math.nan}, "--weight-decay: expected a finite number >= 0, received nan."),
        ({"bn_momentum": 1.5}, "--bn-momentum: expected from 0 to 1, received 1.5."),
        ({"epsilon": 0.0}, "--epsilon: expected a finite number > 0, received 0.0."),
        ({"validation_split": 1.0}, "--validation-split: expected >= 0 and below 1, received 1.0."),
        ({"hidden": (4, 0)}, "--hidden: expected positive integers, received (4, 0)."),
        ({"schedule": "cyclic"}, "--schedule: expected one of constant, cosine, step, received 'cyclic'."),
        ({"last_batch": "pad"}, "--last-batch: expected one of spread, keep, drop, received 'pad'."),
        ({"dtype": "int8"}, "--dtype: expected one of float32, float64, received 'int8'."),
        (
            {"early_stop": 3},
            (
                "--early-stop watches the validation loss, and there are no validation rows: give "
                "--validation-split too, e.g. 0.1."
            ),
        ),
    ],
)
def test_what_is_refused(changed: dict[str, Any], text: str) -> None:
    """By the option's name, with what is accepted and what came."""
    with pytest.raises(SettingsError) as raised:
        replace(Settings(), **changed)
    assert str(raised.value) == text


@dataclass(frozen=True)
class Baking:
    """A declaration."""

    loaves: Annotated[int, Setting("How many.", accepted=at_least(1, shown=False))] = 2
    oven_shape: Annotated[str | None, Setting("Its form.", "Oven", one_of("round", "square"))] = None
    sizes: Annotated[
        tuple[int, ...], Setting("Of each.", written=str, read=lambda text: tuple(map(int, text.split(","))))
    ] = (3, 4)
    steam: Annotated[bool, Setting("Whether.")] = False

    def __post_init__(self) -> None:
        refuse(self)


def test_a_field_is_an_option_a_key_and_a_check(
    tmp_path: Path,
) -> None:
    """One declaration: what is written, in a file or on the command line, arrives as the field, or is refused."""
    baked: list[Baking] = []

    def bake(
        context: typer.Context,
        config: Annotated[Path | None, typer.Option(is_eager=True, callback=configuration.read)] = None,
    ) -> None:
        del config
        baked.append(given(context, Baking))

    app = typer.Typer()
    app.command()(with_options(Baking)(bake))
    (tmp_path / "bread.toml").write_text("oven-shape = 'square'\nsizes = [5, 6]\nsteam = true\n", encoding="utf-8")

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})

    assert run().exit_code == 0
    assert run("--config", str(tmp_path / "bread.toml"), "--loaves=7", "--no-steam").exit_code == 0
    assert baked == [Baking(), Baking(7, "square", (5, 6), steam=False)]
    assert str(run("--loaves=0").exception) == "bake: --loaves: expected >= 1, received 0."
    assert "'oval' is not one of 'round', 'square'" in run("--oven-shape=oval").output
    with pytest.raises(SettingsError, match=r"^--oven-shape: expected one of round, square, received 'oval'\.$"):
        Baking(oven_shape="oval")


def rates(settings: Settings, steps: int, per_epoch: int) -> list[float]:
    """Of every step."""
    return [settings.learning_rate_of(step, per_epoch) for step in range(1, steps + 1)]


def test_the_schedules_by_hand() -> None:
    """Powers of two keep the numbers exact, cosine's middle aside."""
    base = Settings(epochs=4, learning_rate=1.0)
    assert rates(base, 8, 2) == [1.0] * 8
    assert rates(replace(base, schedule="step", decay=0.5, decay_epochs=1), 8, 2) == [
        1,
        1,
        0.5,
        0.5,
        0.25,
        0.25,
        0.125,
        0.125,
    ]
    assert rates(replace(base, schedule="step", decay=0.5, decay_epochs=3), 8, 2) == [1] * 6 + [0.5] * 2
    cosine = rates(replace(base, schedule="cosine"), 8, 2)
    assert cosine[0] == 1.0
    assert cosine[4] == pytest.approx(0.5)
    assert cosine[7] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    warm = rates(replace(base, schedule="cosine", warmup_steps=4), 8, 2)
    assert warm[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert warm[6] == pytest.approx(0.5)


def test_a_warm_up_may_outlast_the_run() -> None:
    """The cosine then never begins, and divides by nothing."""
    assert rates(Settings(epochs=1, learning_rate=1.0, schedule="cosine", warmup_steps=4), 2, 2) == [0.25, 0.5]


def test_differences_name_the_option() -> None:
    """Each with what it was and is; how far to go is no difference."""
    saved = json.loads(json.dumps(Settings().as_json()))
    assert replace(Settings(), epochs=30, steps=7).differences(saved) == []
    assert replace(Settings(), hidden=(8,), batch_size=32, early_stop=2, validation_split=0.1).differences(saved) == [
        "--hidden was 128,64, now 8",
        "--batch-size was 64, now 32",
        "--validation-split was 0.0, now 0.1",
        "--early-stop was not given, now 2",
    ]


def test_settings_that_were_not_given_get_their_defaults() -> None:
    """Of a run that begins, of one that goes on, and of one that goes on from before there was the setting."""
    asked = Settings(last_batch="drop")
    for saved, otherwise in ((None, "spread"), ({"last_batch": "drop"}, "drop"), ({}, "keep")):
        assert Settings().completed(saved).last_batch == otherwise
        assert asked.completed(saved).last_batch == "drop"
    assert asked.differences(Settings().completed(None).as_json()) == ["--last-batch was spread, now drop"]


def test_a_cosine_depends_on_its_epochs() -> None:
    """To go further would be another run: its rates were others from the first step on."""
    saved = Settings(schedule="cosine").as_json()
    assert Settings(schedule="cosine", steps=5).differences(saved) == []
    assert Settings(schedule="cosine", epochs=30).differences(saved) == ["--epochs was 20, now 30"]


def test_an_older_checkpoint_has_the_defaults() -> None:
    """Of settings that its version did not know."""
    saved = Settings().as_json()
    del saved["weight_decay"]
    assert Settings().differences(saved) == []
    assert Settings(weight_decay=0.5).differences(saved) == ["--weight-decay was 0.0, now 0.5"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("l2", L2()), ("l2=1e-4", L2(1e-4)), ("l1=0.5", L1(0.5)), ("l1_l2=1e-5,1e-4", L1L2(1e-5, 1e-4)), (None, None)],
)
def test_regularizers_by_name(text: str | None, expected: object) -> None:
    """Keras's names, factors and defaults."""
    assert penalties.regularizer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("non_neg", NonNeg()), ("max_norm=3", MaxNorm(3.0)), ("unit_norm", UnitNorm()), (None, None)],
)
def test_constraints_by_name(text: str | None, expected: object) -> None:
    """Keras's names, bounds and defaults."""
    assert penalties.constraint(text) == expected


@pytest.mark.parametrize("text", ["l3", "l2=x", "l2=-1", "l2=nan", "l2=1,2", "l2=", ""])
def test_unknown_regularizers(text: str) -> None:
    """What is accepted, with an example."""
    with pytest.raises(ValueError, match=r"^expected one of l1, l2, l1_l2, .* e\.g\. l2=1e-4; received "):
        penalties.regularizer(text)


@pytest.mark.parametrize("text", ["l2", "non_neg=1", "max_norm=-1"])
def test_unknown_constraints(text: str) -> None:
    """What is accepted, with an example."""
    with pytest.raises(
        ValueError, match=r"^expected one of non_neg, max_norm, unit_norm, .* e\.g\. max_norm=2; received "
    ):
        penalties.constraint(text)
