"""The benchmark's judgement: a missed "must" fails a quiet run, whatever the figures of the others."""

from __future__ import annotations

import math

import pytest

from benchmarks.bars import BARS, Bar, Judgement, Verdict, exit_code, judge

BELOW = Bar("time", ("kernels/a", "kernels/b"), must=2.0, aim=1.5)
ABOVE = Bar("speed", ("step/ratio",), must=3.0, aim=6.0, at_least=True, peer="tensorflow")


def judged(
    bar: Bar, *, ran: tuple[str, ...] = ("kernels", "step"), missing: tuple[str, ...] = (), **figures: float
) -> Judgement:
    """The judgement of one bar; figures by the last part of their names."""
    named = {name: figures[name.rpartition("/")[2]] for name in bar.figures if name.rpartition("/")[2] in figures}
    (found,) = judge([bar], named, ran=ran, missing=missing)
    return found


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
    assert judged(BELOW, a=a, b=b).verdict is verdict


@pytest.mark.parametrize(("ratio", "verdict"), [(6.0, "aim reached"), (3.0, "must reached"), (2.99, "MISSED")])
def test_a_lower_bound(ratio: float, verdict: str) -> None:
    """Where more is better, the bounds turn round."""
    assert judged(ABOVE, ratio=ratio).verdict == verdict


def test_what_was_not_measured_is_missed() -> None:
    """A kernel that vanished from the run is no pass."""
    found = judged(BELOW, a=1.0)
    assert found.verdict is Verdict.MISSED
    assert found.worst == "not measured: kernels/b"


def test_a_peer_that_is_not_installed_fails_nothing() -> None:
    """It is listed as such."""
    assert judged(ABOVE, missing=("tensorflow",)).verdict is Verdict.NO_PEER
    assert judged(ABOVE).verdict is Verdict.MISSED


def test_a_section_that_did_not_run_is_not_judged() -> None:
    """`--only` judges what it ran."""
    assert judged(BELOW, ran=("step",)).verdict is Verdict.NOT_RUN


@pytest.mark.parametrize(("judging", "code"), [(True, 1), (False, 0)])
def test_only_a_quiet_machine_fails(judging: bool, code: int) -> None:
    """A missed bar fails a run, beside any number of good ones; on a busy machine it is only shown."""
    verdicts = [judged(BELOW, a=1.0, b=1.0), judged(BELOW, a=1.0, b=9.0), judged(BELOW, a=1.0, b=1.0)]
    assert exit_code(verdicts, judged=judging) == code
    assert exit_code(verdicts[:1], judged=judging) == 0


def test_every_bar_of_the_table_can_be_met_and_missed() -> None:
    """An aim is beyond its must, and a bar's figures are of one section."""
    for bar in BARS:
        assert len({name.partition("/")[0] for name in bar.figures}) == 1
        assert bar.aim is None or (bar.aim > bar.must if bar.at_least else bar.aim < bar.must)
        for scale in (0.5, 2.0):
            figures = dict.fromkeys(bar.figures, bar.must * scale)
            (found,) = judge([bar], figures, ran=[bar.section], missing=[])
            assert (found.verdict is Verdict.MISSED) == ((scale < 1) if bar.at_least else (scale > 1))
