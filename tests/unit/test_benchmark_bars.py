"""The benchmark's judgement: a missed "must" fails a quiet run, whatever the figures of the others."""

from __future__ import annotations

import math

import pytest

from benchmarks.bars import BARS, Bar, Judgement, Verdict, compare, exit_code
from benchmarks.remeasure import measured, merged, missed
from benchmarks.sections import Figures, Settings

BELOW = Bar("time", ("kernels/a", "kernels/b"), must=2.0, aim=1.5)
ABOVE = Bar("speed", ("step/ratio",), must=3.0, aim=6.0, at_least=True, peer="tensorflow")


def enforced(
    bar: Bar, *, ran: tuple[str, ...] = ("kernels", "step"), missing: tuple[str, ...] = (), **figures: float
) -> Judgement:
    """The judgement of one bar; figures by the last part of their names."""
    named = {name: figures[name.rpartition("/")[2]] for name in bar.figures if name.rpartition("/")[2] in figures}
    (judgement,) = compare([bar], named, ran=ran, missing=missing)
    return judgement


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (1.0, 1.5, Verdict.AIM),
        (1.0, 1.51, Verdict.MUST),
        (2.0, 1.0, Verdict.MUST),
        (1.0, 2.01, Verdict.MISSED),
        (math.nan, 1.0, Verdict.MISSED),
    ],
)
def test_the_worst_figure_counts(a: float, b: float, verdict: Verdict) -> None:
    """One bad shape can't hide behind the others, and NaN is no good figure."""
    assert enforced(BELOW, a=a, b=b).verdict is verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(6.0, "aim reached"), (3.0, "must reached"), (2.99, "MISSED")])
def test_a_lower_bound(ratio: float, verdict: str) -> None:
    """Where more is better, the bounds turn round."""
    assert enforced(ABOVE, ratio=ratio).verdict == verdict


def test_what_was_not_measured_is_missed() -> None:
    """A kernel that vanished from the run is no pass."""
    judgement = enforced(BELOW, a=1.0)
    assert judgement.verdict is Verdict.MISSED
    assert judgement.worst == "not measured: kernels/b"


def test_a_peer_that_is_not_installed_fails_nothing() -> None:
    """It is listed as such."""
    assert enforced(ABOVE, missing=("tensorflow",)).verdict is Verdict.NO_PEER
    assert enforced(ABOVE).verdict is Verdict.MISSED


def test_a_section_that_did_not_run_has_no_verdict() -> None:
    """`--only` judges what it ran."""
    assert enforced(BELOW, ran=("step",)).verdict is Verdict.NOT_RUN


@pytest.mark.parametrize(("judging", "code"), [(True, 1), (False, 0)])
def test_only_a_quiet_machine_fails(judging: bool, code: int) -> None:
    """A missed bar fails a run, beside any number of good ones; on a busy machine it is only shown."""
    verdicts = [enforced(BELOW, a=1.0, b=1.0), enforced(BELOW, a=1.0, b=9.0), enforced(BELOW, a=1.0, b=1.0)]
    assert exit_code(verdicts, enforced=judging) == code
    assert exit_code(verdicts[:1], enforced=judging) == 0


def test_every_bar_of_the_table_can_be_met_and_missed() -> None:
    """An aim is beyond its must, and a bar's figures are of one section."""
    for bar in BARS:
        assert len({name.partition("/")[0] for name in bar.figures}) == 1
        assert bar.aim is None or (bar.aim > bar.must if bar.at_least else bar.aim < bar.must)
        for scale in (0.5, 2.0):
            figures = dict.fromkeys(bar.figures, bar.must * scale)
            (judgement,) = compare([bar], figures, ran=[bar.section], missing=[])
            assert (judgement.verdict is Verdict.MISSED) == ((scale < 1) if bar.at_least else (scale > 1))


SHAPES = Bar("forward", ("kernels/1,2/forward/limits", "kernels/3,4/forward/limits"), must=2.0)
STEPS = Bar("steps", ("step/ratio",), must=3.0, at_least=True)
FIRST = {
    "kernels/1,2/forward/limits": 2.5,
    "kernels/1,2/forward/seconds": 25.0,
    "kernels/3,4/forward/limits": 1.0,
    "step/ratio": 1.0,
}


def test_only_what_misses_a_bar_is_remeasured() -> None:
    """By the shape for kernels, whose section takes a minute."""
    judgements = compare([SHAPES, STEPS], FIRST, ran=("kernels", "step"), missing=())
    missed_sections = missed(judgements, FIRST)
    assert missed_sections == ["kernels/1,2/forward", "step"]
    asked: list[tuple[str, tuple[str, ...]]] = []

    def measure(section: str, settings: Settings) -> Figures:
        asked.append((section, settings.shapes))
        return {f"{section}/x": 1.0}

    settings = Settings(full=False, peers={}, tensorflow_python="", shapes=(), report=lambda what: None)
    assert measured(missed_sections, settings, measure) == {"kernels/x": 1.0, "step/x": 1.0}
    assert asked == [("kernels", ("1,2",)), ("step", ("1,2",))]


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (
            {"kernels/1,2/forward/limits": 1.5, "kernels/1,2/forward/seconds": 15.0},
            {"kernels/1,2/forward/limits": 1.5, "kernels/1,2/forward/seconds": 15.0},
        ),
        ({"kernels/1,2/forward/limits": 2.1, "kernels/1,2/forward/seconds": 15.0}, {}),
        ({"kernels/1,2/forward/limits": math.nan}, {}),
        ({}, {}),
        ({"kernels/3,4/forward/limits": 0.5, "step/ratio": 2.9}, {}),
        ({"step/ratio": 3.0, "step/ours": 1.0}, {"step/ratio": 3.0, "step/ours": 1.0}),
    ],
)
def test_a_bar_that_is_reached_once_is_reached(second: Figures, expected: Figures) -> None:
    """With all figures of that measurement; one that is missed twice stays as it was."""
    assert merged([SHAPES, STEPS], FIRST, second) == FIRST | expected
