"""What follows from the sums in one compiled call, beside the formulas in NumPy: the same bits for any sums."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bnlayer import BatchNormalization, gradients, layer, moments, moving
from bnlayer.gradients import GradientSums
from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels.choice import quick_channels
from bnlayer.moments import Moments
from bnlayer.moving import Moving, Rule, update

C = 64
LOW = 2**32 - 1


@pytest.fixture(autouse=True)
def compiled(chosen: pytest.MonkeyPatch) -> None:
    """Whatever the environment says: with the reference kernels the formulas would be compared with themselves."""
    chosen.setenv("BNLAYER_KERNELS", "compiled")
    assert quick_channels() is not None


def limbs_of(rng: np.random.Generator, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Sums that data of such counts could give: deviations all over the window, squares about them."""
    fill = rng.choice([0.0, 1e-7, 1e-3, 0.3, 1.0], C)
    mean = rng.uniform(-1, 1, C) * fill
    spread = rng.choice([0.0, 1e-14, 1e-12, 1e-9, 1e-3], C)
    s = [int(n) * int(m * 2.0**51) for n, m in zip(counts, mean, strict=True)]
    t = [int(n) * int((m * m + v) * 2.0**52) for n, m, v in zip(counts, mean, spread, strict=True)]
    flags = rng.choice([0, 1, 3], C, p=[0.8, 0.1, 0.1]) | (rng.choice([0, 2], C, p=[0.9, 0.1]) << 32)
    halves = [[v >> 32 for v in s], [v & LOW for v in s], [v >> 32 for v in t], [v & LOW for v in t]]
    return np.array([*halves, counts, flags], np.int64)


def some_moments(seed: int) -> Moments:
    """Moments on a grid of all exponents, of few and of very many values."""
    rng = np.random.default_rng(seed)
    counts = rng.choice([0, 1, 2, 7, 1000, 2**21, 2**30, 2**39], C)
    pivot = rng.choice([0.0, 1.0, -3e7, 1e-30], C).astype(np.float32).astype(np.float64)
    exponent = rng.integers(-150, 127, C)
    exponent[rng.random(C) < 0.1] = -160
    return Moments(limbs_of(rng, counts), Grid("float32", pivot, exponent, True))


def same(got: object, wanted: object) -> None:
    """Every field, bit for bit."""
    for field in fields(got):  # type: ignore[arg-type]
        a, b = getattr(got, field.name), getattr(wanted, field.name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
        different = np.flatnonzero(a.view(np.uint8).reshape(C, -1) != b.view(np.uint8).reshape(C, -1))
        assert different.size == 0, (field.name, a[different[0] // a.itemsize], b[different[0] // a.itemsize])


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), epsilon=st.sampled_from([0.0, 1e-12, 1e-3]), masked=st.booleans())
def test_statistics_and_what_is_refused(seed: int, epsilon: float, masked: bool) -> None:
    """Of counts and flags of every kind, on windows of every size."""
    found = some_moments(seed)
    quick, again = found.check_window(epsilon, masked)
    refused = found.refused(epsilon)
    assert (again is not None) == refused.any()
    if again is not None:
        assert (again == refused).all()
    same(quick(), found.statistics(epsilon, masked))


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32 - 1), synchronized=st.booleans(), masked=st.booleans())
def test_the_moving_update(seed: int, synchronized: bool, masked: bool) -> None:
    """Channels without a value, nonfinite ones, and results that float32 can't hold."""
    statistics = some_moments(seed).statistics(1e-3, masked)
    rng = np.random.default_rng(seed)
    old = Moving(*rng.normal(size=(2, C)).astype(np.float32))
    rule = Rule(0.9, 1e-3, synchronized=synchronized, masked=masked)
    quick = update(old, statistics, rule)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moving, "quick_channels", lambda: None)
        slow = update(old, statistics, rule)
    for got, wanted in zip(quick.values, slow.values, strict=True):
        assert got.dtype == wanted.dtype
        nan = np.isnan(wanted)
        assert (np.isnan(got) == nan).all()
        assert np.where(nan, 0, got).tobytes() == np.where(nan, 0, wanted).tobytes()


@settings(max_examples=100)
@given(seed=st.integers(0, 2**32 - 1))
def test_gradients_and_what_is_refused(seed: int) -> None:
    """Of flags of every kind."""
    rng = np.random.default_rng(seed)
    statistics = some_moments(seed).statistics(1e-3, masked=bool(seed % 2))
    grid = BackwardGrid("float32", rng.integers(-160, 147, C), rng.integers(-148, 130, C), True)
    limbs = np.array([*rng.integers(-(2**30), 2**30, (4, C)), *rng.choice([0, 1, 2**32, 2**32 + 1], (2, C))])
    found = GradientSums(limbs, grid)
    quick, again = found.check_window(statistics)
    refused = found.refused()
    assert (again is not None) == refused.any()
    if again is not None:
        assert (again == refused).all()
    same(quick(), found.gradients(statistics))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_coefficients(monkeypatch: pytest.MonkeyPatch, center: bool, scale: bool) -> None:
    """With and without γ and β: what a layer makes of a batch is the same without the compiled calls."""

    def made() -> list[NDArray[Any]]:
        rng = np.random.default_rng(3)
        bn = BatchNormalization(center=center, scale=scale)
        x = (rng.normal(size=(40, C)) * 1e-3 + 1e4).astype(np.float32)
        bn.build(x.shape)
        if bn.gamma is not None:
            bn.gamma.assign(rng.normal(size=C))
        if bn.beta is not None:
            bn.beta.assign(rng.normal(size=C))
        return [bn(x, training=True), bn.backward(x), *bn.get_weights()[-2:]]

    quick = made()
    for module in (moments, gradients, moving, layer):
        monkeypatch.setattr(module, "quick_channels", lambda: None)
    for got, wanted in zip(quick, made(), strict=True):
        assert got.tobytes() == wanted.tobytes()
