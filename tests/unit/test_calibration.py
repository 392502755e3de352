"""Calibration: the exact statistics of a whole pass, for any number of ranks."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from bnlayer import BatchNormalization, calibrating
from support.families import draw
from support.ranks import Meeting, SimulatedRank, run_all


def calibrated(world_size: int, family: str, dtype: str, cuts: list[int]) -> list[bytes]:
    """The moving statistics after a pass of five batches, the same on every rank."""

    def body(rank: SimulatedRank) -> list[bytes]:
        bn = BatchNormalization(synchronized=True, name="bn", dtype=dtype, collective=rank)
        with calibrating([bn]):
            for step in range(5):
                bn(np.split(draw(family, 1, step, (32, 3), dtype), cuts)[rank.rank], training=True)
        return [bn.moving_mean.value.tobytes(), bn.moving_variance.value.tobytes()]

    results = run_all(Meeting(world_size), body)
    assert all(result == results[0] for result in results)
    return results[0]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", ["normal", "mean-1e4", "jump", "cauchy", "lognormal-3"])
def test_any_number_of_ranks_gives_the_population_of_one(family: str, dtype: str) -> None:
    """Bit for bit, with an empty shard and regrids on the way; and the value is that of all rows at once."""
    one = calibrated(1, family, dtype, [])
    assert calibrated(3, family, dtype, [7, 7]) == one
    rows = np.concatenate([draw(family, 1, step, (32, 3), dtype) for step in range(5)])
    for channel in range(3):
        exact = [Fraction(float(v)) for v in rows[:, channel]]
        mean = sum(exact) / len(exact)
        variance = sum((v - mean) ** 2 for v in exact) / len(exact)
        got = [np.frombuffer(b, dtype)[channel] for b in one]
        rel = 2e-6 if dtype == "float32" else 1e-10
        assert float(got[1]) == pytest.approx(float(variance), rel=rel, abs=0)
        assert abs(float(got[0]) - float(mean)) <= rel * (abs(float(mean)) + float(variance) ** 0.5)


def test_batches_normalize_as_in_training_and_weights_stay() -> None:
    """The outputs inside the block are those of training calls; afterwards inference uses the population."""
    x = draw("mean-1e4", 0, 0, (64, 2), "float32")
    bn, other = BatchNormalization(), BatchNormalization()
    with calibrating([bn]):
        y = bn(x, training=True)
    assert y.tobytes() == other(x, training=True).tobytes()
    assert bn(x) == pytest.approx(y, abs=2e-3)
    assert np.abs(other(x)).max() > 100


def test_renorm_layers_get_their_standard_deviation_too() -> None:
    """moving_variance = moving_stddev² − ε must hold afterwards as before."""
    x = draw("normal", 0, 0, (64, 2), "float32") * 3
    bn = BatchNormalization(renorm=True)
    with calibrating([bn]):
        bn(x, training=True)
    assert bn.moving_stddev.value**2 - bn.epsilon == pytest.approx(bn.moving_variance.value, rel=1e-6)
    assert bn.moving_variance.value == pytest.approx(x.var(0), rel=1e-5)


def test_a_failed_pass_leaves_everything_as_it_was() -> None:
    """An exception, a NaN, a channel without a value, a layer that saw nothing."""
    x = draw("normal", 0, 0, (8, 2), "float32")
    bn = BatchNormalization(name="bn")
    bn(x, training=True)
    before = [vector.tobytes() for vector in bn.get_weights()]
    spoiled = x.copy()
    spoiled[3, 1] = np.inf
    text = "expected ndim=2 and 2 channels"
    with pytest.raises(ValueError, match=text), calibrating([bn]):
        _ = bn(x * 2, training=True), bn(x[0], training=True)
    text = r"Layer 'bn' saw values that are not finite in channels 1\."
    with pytest.raises(ValueError, match=text), calibrating([bn]):
        bn(spoiled, training=True)
    for batches in ((spoiled, x), (x, spoiled)):
        with pytest.raises(ValueError, match=text), calibrating([bn]):
            _ = [bn(batch, training=True) for batch in batches]
    assert bn._observer is None, "later calls must not be pooled"
    with pytest.raises(ValueError, match="saw no value in channels 0, 1 while calibrating"), calibrating([bn]):
        bn(x, training=True, mask=np.zeros(8))
    text = "saw no batch while calibrating: call the model with training=True"
    with pytest.raises(ValueError, match=text), calibrating([bn]):
        bn(x)
    assert [vector.tobytes() for vector in bn.get_weights()] == before
    bn(x, training=True)
    assert [vector.tobytes() for vector in bn.get_weights()] != before
