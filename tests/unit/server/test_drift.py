"""When moving statistics leave the band in which they have been."""

from __future__ import annotations

import numpy as np
import pytest

from bnserver.core.drift import Band, Drift, Vector, followed


def _after(samples: list[tuple[Vector, Vector]]) -> tuple[Band, list[tuple[Drift, ...]]]:
    band, alarms = Band.around(*samples[0]), []
    for mean, variance in samples[1:]:
        band, drifts = followed(band, mean, variance)
        alarms.append(drifts)
    return band, alarms


def _noisy(count: int, mean: float = 3.0, variance: float = 4.0, noise: float = 0.02) -> list[tuple[Vector, Vector]]:
    random = np.random.default_rng(1)
    return [
        (mean + noise * random.standard_normal(8), variance * np.exp(noise * random.standard_normal(8)))
        for _ in range(count)
    ]


def test_what_stays_in_its_band_is_no_drift() -> None:
    """Noise of any size that has been there all along, and statistics that do not move at all."""
    for noise in (0.0, 0.02, 1.0):
        assert not any(_after(_noisy(400, noise=noise))[1])


@pytest.mark.parametrize(
    ("what", "factor", "shift", "now"),
    [("mean", 1.0, 0.6, 3.6), ("variance", 0.7, 0.0, 2.8), ("variance", 1.4, 0.0, 5.6)],
)
def test_one_channel_that_leaves_is_named(what: str, factor: float, shift: float, now: float) -> None:
    """A third of a standard deviation, or of the variance: at once, with the channel and both values."""
    band, before = _after(_noisy(100))
    assert not any(before)
    mean, variance = np.full(8, 3.0), np.full(8, 4.0)
    mean[5] += shift
    variance[5] *= factor
    _, (drift,) = followed(band, mean, variance)
    assert (drift.what, drift.channels, drift.channel) == (what, 1, 5)
    assert drift.before == pytest.approx(3.0 if what == "mean" else 4.0, rel=0.05)
    assert drift.now == pytest.approx(now)


def test_what_moves_by_less_than_a_quarter_is_no_alarm() -> None:
    """However still it was."""
    band, _ = _after([(np.zeros(2), np.ones(2))] * 100)
    assert followed(band, np.full(2, 0.24), np.full(2, 1.27))[1] == ()
    assert [drift.what for drift in followed(band, np.full(2, 0.26), np.full(2, 1.29))[1]] == ["mean", "variance"]


def test_a_band_says_something_from_the_twentieth_sample_on() -> None:
    """Not from the nineteenth, and not later."""
    still = [(np.zeros(2), np.ones(2))]
    outlier = [(np.full(2, 9.0), np.ones(2))]
    assert [bool(_after(still * number + outlier)[1][-1]) for number in (19, 20)] == [False, True]


def test_a_band_follows_as_its_formula_says() -> None:
    """Each sample counts alike at first, so that the first one says no more than others; then the last twenty or so."""
    samples = [(np.array([float(step)]), np.array([np.exp(2.0 * step)])) for step in range(60)]
    band, _ = _after(samples)
    centre = width = 0.0
    for number, (mean, _variance) in enumerate(samples[1:], start=2):
        away = abs(mean[0] - centre)
        centre += (mean[0] - centre) / min(number, 20)
        width += (away - width) / min(number, 20)
    assert (band.mean_C[0], band.mean_width_C[0]) == (pytest.approx(centre), pytest.approx(width))
    assert (band.log_C[0], band.log_width_C[0]) == (pytest.approx(2 * centre), pytest.approx(2 * width))


def test_the_channel_that_is_furthest_outside_is_named() -> None:
    """In widths of its own band: a channel that always moves much may go further."""
    random = np.random.default_rng(2)
    noise = np.array([0.01, 1.0])
    band, _ = _after([(noise * random.standard_normal(2), np.full(2, 1e-4)) for _ in range(200)])
    _, (drift,) = followed(band, np.array([4.0, 8.0]), np.full(2, 1e-4))
    assert (drift.channels, drift.channel) == (2, 0)


def test_an_alarm_ends_when_the_statistics_stay_where_they_are() -> None:
    """The band is a recent one."""
    _, alarms = _after(_noisy(100) + _noisy(200, mean=9.0))
    assert alarms[99]
    assert not any(alarms[99 + 100 :])


def test_a_band_of_few_samples_says_nothing() -> None:
    """Training begins with statistics that are nobody's."""
    _, alarms = _after([(np.full(2, float(step)), np.full(2, 2.0**step)) for step in range(20)])
    assert not any(alarms)


def test_a_variance_of_zero_is_a_number() -> None:
    """A channel that was constant, and is not any more."""
    band, _ = _after([(np.zeros(1), np.zeros(1))] * 50)
    (_, drift) = followed(band, np.ones(1), np.ones(1))[1]
    assert drift.what == "variance"
    assert [drift.before, drift.now] == pytest.approx([0.0, 1.0])
