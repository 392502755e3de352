"""What follows from the sums, compiled, beside the formulas in NumPy: the same bits for any sums."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer.grid import BackwardGrid, Grid
from bnlayer.kernels import formulas
from bnlayer.kernels.compiled import Compiled, variants

C = 64
LOW = 2**32 - 1


@pytest.fixture(params=variants())
def compiled(request: pytest.FixtureRequest) -> Compiled:
    """Every variant that this processor runs."""
    return Compiled(request.param)


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


def some_moments(seed: int) -> tuple[NDArray[np.int64], Grid]:
    """Moments on a grid of all exponents, of few and of very many values."""
    rng = np.random.default_rng(seed)
    counts = rng.choice([0, 1, 2, 7, 1000, 2**21, 2**30, 2**39], C)
    pivot = rng.choice([0.0, 1.0, -3e7, 1e-30], C).astype(np.float32).astype(np.float64)
    exponent = rng.integers(-150, 127, C)
    exponent[rng.random(C) < 0.1] = -160
    return limbs_of(rng, counts), Grid("float32", pivot, exponent, True)


def same(got: NDArray[Any], wanted: NDArray[Any]) -> None:
    """Bit for bit; but one NaN is as good as another."""
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    if got.dtype.kind == "f":
        nan = np.isnan(wanted)
        assert (np.isnan(got) == nan).all()
        got, wanted = np.where(nan, 0, got), np.where(nan, 0, wanted)
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(wanted).tobytes()


def all_same(got: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    """Every array, and which channels are refused."""
    (arrays, refused), (oracle, wanted_refused) = got, wanted
    assert (refused is None) == (wanted_refused is None)
    if refused is not None:
        same(refused, wanted_refused)
    for a, b in zip(arrays, oracle, strict=True):
        same(a, b)


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-3])
@pytest.mark.parametrize("masked", [False, True])
def test_statistics_and_what_is_refused(compiled: Compiled, epsilon: float, masked: bool) -> None:
    """Of counts and flags of every kind, on windows of every size; of as many channels as vectors hold, or not."""
    e = 1e-7 if masked else 0.0
    for seed in range(40):
        limbs, grid = some_moments(seed)
        all_same(compiled.statistics(limbs, grid, epsilon, e), formulas.statistics(limbs, grid, epsilon, e))
        few = 1 + seed % 23
        grid = Grid("float32", grid.pivot_C[:few].copy(), grid.exponent_C[:few].copy(), True)
        limbs = limbs[:, :few].copy()
        all_same(compiled.statistics(limbs, grid, epsilon, e), formulas.statistics(limbs, grid, epsilon, e))


@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("unbiased", [False, True])
def test_the_moving_update(compiled: Compiled, synchronized: bool, masked: bool, unbiased: bool) -> None:
    """Channels without a value or of a single one, nonfinite ones, and results that float32 can't hold."""
    for seed in range(40):
        batch, _ = formulas.statistics(*some_moments(seed), 1e-3, 1e-7 * masked)
        old = np.random.default_rng(seed).normal(size=(2, C)).astype(np.float32)
        arguments: tuple[Any, ...] = batch, old[0], old[1], 0.9
        got = compiled.moved(*arguments, synchronized=synchronized, masked=masked, unbiased=unbiased)
        wanted = formulas.moved(*arguments, synchronized=synchronized, masked=masked, unbiased=unbiased)
        for a, b in zip(got, wanted, strict=True):
            same(a, b)


def test_gradients_and_what_is_refused(compiled: Compiled) -> None:
    """Of flags of every kind."""
    for seed in range(80):
        rng = np.random.default_rng(seed)
        batch, _ = formulas.statistics(*some_moments(seed), 1e-3, 1e-7 * (seed % 2))
        grid = BackwardGrid("float32", rng.integers(-160, 147, C), rng.integers(-148, 130, C), True)
        limbs = np.array([*rng.integers(-(2**30), 2**30, (4, C)), *rng.choice([0, 1, 2**32, 2**32 + 1], (2, C))])
        all_same(compiled.gradients(limbs, grid, batch), formulas.gradients(limbs, grid, batch))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scale", [True, False])
def test_coefficients(compiled: Compiled, center: bool, scale: bool) -> None:
    """With and without γ and β."""
    single = np.dtype(np.float32)
    for seed in range(20):
        batch, _ = formulas.statistics(*some_moments(seed), 1e-3, 0.0)
        gamma, beta = np.random.default_rng(seed).normal(size=(2, C)).astype(np.float32)
        arguments = batch, gamma if scale else None, beta if center else None, single
        for a, b in zip(compiled.coefficients(*arguments), formulas.coefficients(*arguments), strict=True):
            same(a, b)


def test_limbs_as_they_come_from_a_message(compiled: Compiled) -> None:
    """Of a dtype that names its order of bytes, read-only, and wherever they lie in it."""
    limbs, grid = some_moments(0)
    backward = BackwardGrid("float32", np.full(C, 3), np.full(C, 3), True)
    message = np.frombuffer(b"." + limbs.astype("<i8").tobytes(), np.uint8)[1:].view("<i8").reshape(limbs.shape)
    assert not message.flags.aligned
    wanted = compiled.statistics(limbs, grid, 1e-3, 0.0)
    named = Grid("float32", grid.pivot_C.astype("<f8"), grid.exponent_C.astype("<i8"), True)
    all_same(compiled.statistics(message, named, 1e-3, 0.0), wanted)
    all_same(compiled.gradients(message, backward, wanted[0]), compiled.gradients(limbs, backward, wanted[0]))


def test_the_spread_that_a_window_is_too_coarse_for(compiled: Compiled) -> None:
    """V = 2^k units of squares, on both sides of 2^22 and of 2^42/N; the mean on the pivot, and far from it."""
    both = set()
    for count in (1, 1000, 2**20, 2**21, 2**30):
        for mean in (0, 2**40):
            k = np.arange(C) % 32
            t = [int(count) * ((1 << int(power)) + mean * mean * 2**12 // 2**52) for power in k]
            s = np.full(C, count * mean)
            limbs = np.array(
                [s >> 32, s & LOW, [v >> 32 for v in t], [v & LOW for v in t], np.full(C, count), np.zeros(C)]
            ).astype(np.int64)
            grid = Grid("float32", np.zeros(C), np.full(C, 7), True)
            got, wanted = (one.statistics(limbs, grid, 0.0, 0.0) for one in (compiled, formulas))
            all_same(got, wanted)
            both |= set([] if wanted[1] is None else wanted[1].tolist())
    assert both == {True, False}
