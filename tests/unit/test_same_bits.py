"""The promise: any number of ranks, any sharding, gives one process's bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bnlayer import BatchNormalization, tiling
from bnlayer.collective import Alone, Direction
from bnlayer.exchange_driver import ExchangeDriver
from bnlayer.kernels.compiled import Compiled, variants
from bnlayer.tiling import Passes
from support.families import FAMILIES, draw
from support.layers import ByExchange, gradients
from support.ranks import Meeting, SimulatedRank, run_all
from support.truth import error, evaluate

STEPS, CHANNELS = 5, 3


def train(
    family: str, dtype: str, masked: bool, cuts: Sequence[Sequence[int]], rows: int, seed: int = 0
) -> list[list[bytes]]:
    """Train STEPS steps on len(cuts[0]) + 1 ranks; the bytes of everything that must not depend on that.

    Args:
        cuts: per step, where the batch is cut into shards.
    """
    world_size = len(cuts[0]) + 1
    batches = [draw(family, seed, step, (rows, CHANNELS), dtype) for step in range(STEPS)]
    dys = [draw("cauchy" if seed % 2 else "jump", seed + 1, step, (rows, CHANNELS), dtype) for step in range(STEPS)]
    masks = [np.random.default_rng([seed, 2, step]).random(rows) < (0.0, 0.7, 1.0)[step % 3] for step in range(STEPS)]

    def body(rank: SimulatedRank) -> list[list[NDArray[Any]]]:
        bn = BatchNormalization(synchronized=True, name="bn", dtype=dtype, collective=rank)
        seen = []
        for step in range(STEPS):
            shard = [np.split(a, cuts[step])[rank.rank] for a in (batches[step], dys[step], masks[step])]
            y = bn(shard[0], training=True, mask=shard[2] if masked else None)
            dx = bn.backward(shard[1])
            common = [*gradients(bn), *bn.state.arrays().values()]
            seen.append([y, dx, *(array.copy() for array in common)])
        return seen

    ranks = run_all(Meeting(world_size, seed), body)
    out = []
    for step in range(STEPS):
        per_rank = [rank[step] for rank in ranks]
        for other in per_rank[1:]:
            assert [a.tobytes() for a in other[2:]] == [a.tobytes() for a in per_rank[0][2:]], "ranks differ"
        joined = [np.concatenate([arrays[i] for arrays in per_rank]) for i in (0, 1)]
        out.append([a.tobytes() for a in (*joined, *per_rank[0][2:])])
    return out


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_and_empty_shards_give_one_process_bits(family: str, dtype: str, masked: bool) -> None:
    """1, 2, 3 and 4 ranks, one of them without a row, on every family of data: the union's bits."""
    one = train(family, dtype, masked, [[]] * STEPS, 32)
    for cuts in ([13], [7, 7], [0, 5, 31]):
        assert train(family, dtype, masked, [cuts] * STEPS, 32) == one


@pytest.mark.parametrize("variant", variants())
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_short_way_of_a_world_of_one_has_the_bits_of_an_exchange(
    monkeypatch: pytest.MonkeyPatch, variant: str, dtype: str, family: str
) -> None:
    """In one crossing, or step by step: on data that leave the grid, that are not finite, of one row and of none."""
    before = tiling.install(Passes(Compiled(variant)))
    short = []
    called, pulled = ExchangeDriver.called_alone, ExchangeDriver.pulled_alone

    def count_call(driver: ExchangeDriver) -> int:
        short.append(Direction.FORWARD)
        return called(driver)

    def count_pull(driver: ExchangeDriver) -> None:
        short.append(Direction.BACKWARD)
        pulled(driver)

    monkeypatch.setattr(ExchangeDriver, "called_alone", count_call)
    monkeypatch.setattr(ExchangeDriver, "pulled_alone", count_pull)
    try:
        seen = [_trained(family, dtype, world) for world in (Alone, ByExchange)]
    finally:
        tiling.install(before)
    assert seen[0] == seen[1]
    if family == "normal":
        assert short.count(Direction.FORWARD) == 3 * STEPS, "all but the first, which finds the grid"
        assert short.count(Direction.BACKWARD) == 3 * (STEPS - 1)


def _trained(family: str, dtype: str, world: type[Alone]) -> list[list[bytes]]:
    """Steps of layers whose moving variance is biased or not, with gamma and beta or not: all that they leave."""
    seen = []
    kinds: list[dict[str, Any]] = [{}, {"center": False}, {"scale": False}]
    for settings_of in kinds:
        bn = BatchNormalization(synchronized=True, name="bn", dtype=dtype, collective=world(), **settings_of)
        bn.unbiased = "scale" in settings_of
        for step in range(STEPS):
            rows = (32, 1, 32, 32, 32)[step] if family != "normal" else 32
            x = draw(family, 0, step, (rows, 5), "float32")
            if family == "sparse" and step == 3:
                x[2, 1] = np.nan
            y, pull = bn.vjp(x, training=True, update_moving=step != 2)
            back = pull(draw("normal" if family == "normal" else "jump", 1, step, (rows, 5), "float32"))
            state = bn.state.arrays().values()
            seen.append([array.tobytes() for array in (y, *back, *state) if array is not None])
        y, pull = bn.vjp(np.zeros((0, 5), np.float32), training=True)
        seen.append([array.tobytes() for array in (y, *bn.state.arrays().values())])
    return seen


@settings(max_examples=60)
@given(
    data=st.data(),
    family=st.sampled_from(sorted(FAMILIES)),
    dtype=st.sampled_from(["float32", "float64"]),
    masked=st.booleans(),
    world_size=st.integers(1, 6),
    rows=st.integers(1, 50),
    seed=st.integers(0, 100),
)
def test_any_sharding_gives_one_process_bits(
    data: st.DataObject, family: str, dtype: str, masked: bool, world_size: int, rows: int, seed: int
) -> None:
    """Shardings drawn at random, another one in each step."""
    cut = st.lists(st.integers(0, rows), min_size=world_size - 1, max_size=world_size - 1).map(sorted)
    cuts = [data.draw(cut) for _ in range(STEPS)]
    assert train(family, dtype, masked, cuts, rows, seed) == train(family, dtype, masked, [[]] * STEPS, rows, seed)


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize(
    ("family", "dtype", "bound"),
    [
        *((family, "float64", 1e-10) for family in FAMILIES if family != "1e15"),
        *((family, "float32", 2e-6) for family in ("normal", "mean-1e4", "constant", "sparse", "1e-30", "jump")),
    ],
)
def test_error_stays_within_its_bound_also_after_a_jump(family: str, dtype: str, bound: float, masked: bool) -> None:
    """Outputs, gradients and statistics against an evaluation in extended precision, step by step."""
    bn = BatchNormalization(dtype=dtype, name="bn", momentum=0.0)
    rng = np.random.default_rng(5)
    for step in range(STEPS):
        x = draw(family, 3, step, (200, CHANNELS), dtype)
        dy = rng.standard_normal(x.shape).astype(dtype)
        mask = rng.random(200) < 0.8 if masked else None
        y = bn(x, training=True, mask=mask)
        dx = bn.backward(dy)
        want = evaluate(x, dy, None if mask is None else mask[:, None])
        gamma, beta = gradients(bn)
        assert error(y, want.y) <= bound
        assert float(np.abs(dx - want.dx).max() / np.abs(want.dx).max()) <= bound
        sums = np.abs(dy).astype(float).sum(0)
        assert float((np.abs(gamma - want.gamma) / (1 + np.abs(want.gamma) + sums)).max()) <= bound
        assert float((np.abs(beta - want.beta) / (1 + np.abs(want.beta) + sums)).max()) <= bound
        assert error(bn.moving_mean.value, want.mean) <= bound
        assert error(bn.moving_variance.value, want.variance) <= bound


def test_variance_at_mean_1e4_is_right_where_float32_sums_fail() -> None:
    """keras #18795, tf #3290: E[x²] − E[x]² gave negative variances and NaN at mean 1e4 with std 1e-2."""
    x = (np.random.default_rng(0).standard_normal((4096, 4)) * 1e-2 + 1e4).astype(np.float32)
    bn = BatchNormalization(momentum=0.0, epsilon=1e-8)
    y = bn(x, training=True)
    want = evaluate(x, np.zeros_like(x), epsilon=1e-8)
    assert error(y, want.y) <= 2e-6
    assert float(np.abs(bn.moving_variance.value / want.variance - 1).max()) <= 2e-6


def test_four_worlds_three_agree_and_one_differs() -> None:
    """One/many ranks × plain/synchronized on unlike shards: many-plain must differ, or the others prove nothing."""
    x = draw("mean-1e4", 0, 0, (24, 4), "float32")
    x[16:] += 500
    dy = draw("normal", 1, 0, (24, 4), "float32")

    def world(world_size: int, synchronized: bool) -> list[bytes]:
        def body(rank: SimulatedRank) -> tuple[NDArray[Any], NDArray[Any]]:
            own = {"collective": rank} if synchronized else {}
            bn = BatchNormalization(synchronized=synchronized, name="bn", **own)  # type: ignore[arg-type]  # one key
            cuts = [16, 17][: world_size - 1]
            y = bn(np.split(x, cuts)[rank.rank], training=True)
            return y, bn.backward(np.split(dy, cuts)[rank.rank])

        results = run_all(Meeting(world_size), body)
        return [np.concatenate([r[i] for r in results]).tobytes() for i in (0, 1)]

    one_plain = world(1, False)
    assert world(1, True) == one_plain
    assert world(3, True) == one_plain
    many_plain = world(3, False)
    assert many_plain[0] != one_plain[0]
    assert many_plain[1] != one_plain[1]
