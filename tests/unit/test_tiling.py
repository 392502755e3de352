"""Passing over a batch in pieces: the same bits as in one, in little memory, by any number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import BatchNormalization, tiling
from bnlayer.grid import Grid
from bnlayer.kernels import reference
from bnlayer.kernels.choice import threads
from bnlayer.kernels.compiled import Compiled, variants
from bnlayer.tiling import Passes
from bnlayer.view import View

Array = NDArray[Any]

POLICIES = ("float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
SHAPES = (((64, 9, 9, 24), -1), ((64, 24, 9, 9), 1), ((7_001, 3), -1), ((7_001,), 0))


@pytest.fixture
def pieces() -> Iterator[Callable[[Passes], object]]:
    """Has every batch of a layer passed over in a way."""
    yield tiling.install
    tiling.install(None)


def ways() -> dict[str, Passes]:
    """The reference in small pieces; each variant with what it takes converted before it; and by three threads."""
    many = {f"pieces, {variant}": Passes(InPieces(variant, 1, 8), piece=1000) for variant in variants()}
    threads = {f"threads, {variant}": Passes(Compiled(variant, 3, 8)) for variant in variants()}
    return {"reference": Passes(reference, piece=1000)} | many | threads


class InPieces(Compiled):
    """Takes what the reference takes, and has the rest converted in pieces."""

    @staticmethod
    def takes(x: Array, mask: NDArray[np.bool_] | None) -> bool:
        """Whether the reference takes it."""
        return reference.takes(x, mask)


def steps(policy: str, shape: tuple[int, ...], axis: int, *, masked: bool, bad: bool) -> list[Array]:
    """Everything that two training steps and an inference make."""
    rng = np.random.default_rng(len(shape))
    kind = np.dtype(ml_dtypes.bfloat16) if "bfloat16" in policy else np.dtype(policy.removeprefix("mixed_"))
    bn = BatchNormalization(axis=axis, dtype=policy, synchronized=True)
    made: list[Array] = []
    for step in range(2):
        x = (rng.normal(size=shape) * 3 + 5).astype(kind)
        dy = rng.normal(size=shape).astype(kind)
        if bad and step:
            x.reshape(-1)[-1], dy.reshape(-1)[0] = np.nan, np.inf
        mask = rng.random(shape[:-1]) < 0.7 if masked else None
        y, dx = bn(x, training=True, mask=mask), bn.backward(dy)
        made += [y, dx, bn(x, mask=mask), *(np.asarray(v.gradient) for v in (bn.gamma, bn.beta) if v is not None)]
        bn.trainable = False
        bn(x, training=True)
        made.append(bn.backward(dy))
        bn.trainable = True
    return [*made, *bn.get_weights(), *bn.state.arrays().values()]


def without_nan(array: Array) -> Array:
    """The same with 7 for each NaN: one is as good as another."""
    return np.where(np.isnan(array), array.dtype.type(7), array) if array.dtype.kind in "fV" else array


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("bad", [False, True], ids=["", "not finite"])
def test_pieces_and_threads_leave_no_trace(
    pieces: Callable[[Passes], object], shape: tuple[int, ...], axis: int, policy: str, masked: bool, bad: bool
) -> None:
    """In one piece, in many, converted in the kernels or before them, and by three threads at once."""
    expected = steps(policy, shape, axis, masked=masked, bad=bad)
    for name, way in ways().items():
        pieces(way)
        for got, wanted in zip(steps(policy, shape, axis, masked=masked, bad=bad), expected, strict=True):
            assert got.dtype == wanted.dtype
            assert without_nan(got).tobytes() == without_nan(wanted).tobytes(), name


def test_a_user_who_wants_errors_raised_gets_none(pieces: Callable[[Passes], object]) -> None:
    """Infinity times a γ of zero is NaN, and no exception."""
    pieces(Passes(reference, piece=1000))
    bn = BatchNormalization(gamma_initializer="zeros", trainable=False)
    dy = np.full((5000, 8), np.inf, np.float32)
    with np.errstate(all="raise"):
        bn(np.ones_like(dy), training=True)
        assert np.isnan(bn.backward(dy)).all()


def test_the_limbs_of_pieces_are_carried() -> None:
    """Words travel as they are: those of many pieces are those of one, low halves below 2^32 included."""
    view = View.of(np.random.default_rng(2).normal(size=(5000, 8)).astype(np.float16), 1, None)
    unknown = Grid.unknown("float32", 8)
    grid = unknown.probed(Passes(reference).probe(view, unknown), np.ones(8, bool))
    expected = Passes(Compiled(variants()[0])).moments(view, grid)
    for name, way in ways().items():
        assert way.moments(view, grid).tobytes() == expected.tobytes(), name


def test_integers_in_a_half_layer_are_not_rounded_on_the_way(pieces: Callable[[Passes], object]) -> None:
    """They go to float32 straight; what comes out is half as the rest."""
    x = np.random.default_rng(0).integers(-70_000, 70_000, (300, 5))
    made = []
    for way in (Passes(reference, piece=100), *ways().values()):
        pieces(way)
        bn = BatchNormalization(dtype="mixed_bfloat16")
        made.append((bn(x, training=True), bn.backward(x.astype(np.float32))))
    for y, dx in made:
        assert y.dtype == dx.dtype == ml_dtypes.bfloat16
        assert (y.tobytes(), dx.tobytes()) == (made[0][0].tobytes(), made[0][1].tobytes())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("shape", "axis"), [((64, 56, 56, 32), -1), ((128, 16, 56, 56), 1)], ids=["last", "first"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_no_needless_temporaries(shape: tuple[int, ...], axis: int, policy: str, masked: bool) -> None:
    """A training call takes its output and a tenth of it; backward its input gradient and a tenth of it."""
    kind = np.dtype(ml_dtypes.bfloat16) if "bfloat16" in policy else np.dtype(policy.removeprefix("mixed_"))
    x = np.random.default_rng(1).normal(size=shape).astype(kind)
    mask = np.arange(np.prod(shape[:-1])).reshape(shape[:-1]) % 3 > 0 if masked else None
    bn = BatchNormalization(axis=axis, dtype=policy, synchronized=True)
    bn(x, training=True, mask=mask)  # the first step probes
    bn.backward(x)
    calls: tuple[Callable[[], Array], ...] = (
        lambda: bn(x, training=True, mask=mask),
        lambda: bn.backward(x),
    )
    for call in calls:
        tracemalloc.start()
        made = call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= 1.1 * made.nbytes


@pytest.mark.parametrize("wanted", ["0", "-1", "two"])
def test_an_invalid_number_of_threads(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    """The error says what was expected."""
    threads.cache_clear()
    monkeypatch.setenv("BNLAYER_THREADS", wanted)
    try:
        with pytest.raises(ValueError, match=f"BNLAYER_THREADS: expected a number .* received {wanted!r}"):
            threads()
    finally:
        threads.cache_clear()


FORKED = """
import multiprocessing, numpy as np
from bnlayer import BatchNormalization
x = np.arange(2**19, dtype=np.float32).reshape(-1, 64)
def step(_):
    return BatchNormalization()(x, training=True).tobytes()
here = step(0)
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(all(there == here for there in pool.map(step, range(4))))
"""


def test_a_fork_after_threads_were_used() -> None:
    """The child makes threads of its own: its parent's did not come along."""
    done = subprocess.run(
        [sys.executable, "-c", FORKED],
        capture_output=True,
        text=True,
        env={**os.environ, "BNLAYER_THREADS": "2"},
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
