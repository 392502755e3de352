"""What users filed against other synchronized batch normalizations, and can't file against this one.

Some of it is tested where it belongs, and not again here:

| filed | what went wrong | tested in |
|---|---|---|
| pytorch #22192, #36382; flax #2417; Paddle #32464 | a mean of means, and dx wrong, for uneven shards | `test_same_bits`: uneven shards, any sharding, four worlds (as ChainerMN and Horovod test theirs) |
| pytorch #36530, #74944, #37198; detectron2 #366 | a rank without rows crashed or hung the others | `test_same_bits`: empty shards; `test_exchange`: all ranks empty |
| keras #18795; tf #3290, #18334 | E[x²] − E[x]² gave negative variances | `test_same_bits`: mean 1e4 with standard deviation 1e-2 |
| pytorch #57077, #62967; apex #1768 | wrong values for some layouts, or beyond 64 channels | `test_layer`: views, channel counts, every axis |
| tf-keras's parallel layers with a partial last batch | | `test_exchange`: two parallel layers |
| Keras's own suite: fully masked, ignored values, freezing, renorm, serialization | | `test_layer`, `test_renorm`, `test_layer_surface` |
"""  # noqa: E501 - a table's row is one line

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import BatchNormalization, StallError
from bnlayer.collective import Call, Operation, Total
from bnlayer.state import LayerState
from support.families import draw
from support.layers import gradients
from support.ranks import Meeting, SimulatedRank, run_all, run_ranks
from support.truth import evaluate

F32 = np.float32


def layer(rank: SimulatedRank | None = None, **arguments: Any) -> BatchNormalization:
    """A layer of the ranks' world; a local one without a rank."""
    shared = {} if rank is None else {"synchronized": True, "collective": rank}
    return BatchNormalization(**{"name": "bn", **shared, **arguments})


def test_a_skipped_call_hung_the_job_in_silence() -> None:
    """pytorch #44957, horovod #2241, tensorpack #1078: every rank is told who waits where, with layer and step."""

    def body(rank: SimulatedRank) -> None:
        first, second = layer(rank, name="first"), layer(rank, name="second")
        for step in range(4):
            if not (rank.rank == 1 and step == 2):
                first(np.ones((2, 2)), training=True)
            second(np.ones((2, 2)), training=True)

    errors = run_ranks(Meeting(3), body)
    for rank, error in enumerate(errors):
        assert isinstance(error, StallError)
        assert str(error) == (
            "The ranks wait for each other: ranks 0, 2 wait in layer 'first' (forward, step 2); "
            "rank 1 waits in layer 'second' (forward, step 2). Every rank must call the same layers in the same order, "
            "in the same mode; look for a skipped layer, or one in evaluation or frozen on some ranks."
        )
        assert (error.ranks, error.layer, error.step) == ((1,), "second" if rank == 1 else "first", 2)


def test_a_skipped_backward_hung_the_job_in_silence() -> None:
    """The same for a rank whose loss did not reach a layer: it goes on to the next step."""

    def body(rank: SimulatedRank) -> None:
        bn = layer(rank)
        for step in range(3):
            bn(np.ones((2, 2)), training=True)
            if not (rank.rank == 0 and step == 1):
                bn.backward(np.ones((2, 2)))

    for error in run_ranks(Meeting(2), body):
        assert isinstance(error, StallError)
        assert "rank 0 waits in layer 'bn' (forward, step 2); rank 1 waits in layer 'bn' (backward, step 1)" in str(
            error
        )


@pytest.mark.parametrize("how", ["frozen", "evaluated"])
def test_a_layer_frozen_on_one_rank_ended_in_a_time_out(how: str) -> None:
    """mmengine #1624: the others are told at the frozen rank's next exchange, by name."""

    def body(rank: SimulatedRank) -> None:
        first, second = layer(rank, name="first"), layer(rank, name="second")
        odd = rank.rank == 2
        first.trainable = not (odd and how == "frozen")
        first(np.ones((2, 2)), training=not (odd and how == "evaluated"))
        second(np.ones((2, 2)), training=True)

    for error in run_ranks(Meeting(3), body):
        assert isinstance(error, StallError)
        assert error.ranks == (2,)
        assert (
            "ranks 0, 1 wait in the enrolment of layer 'first'; rank 2 waits in the enrolment of layer 'second'"
            in str(error)
        )
        assert "frozen on some ranks" in str(error)


class _Unreachable:
    """A collective that must not be asked for anything."""

    rank, world_size = 0, 2

    def enroll(self, call: Call, state: LayerState) -> LayerState:
        """No."""
        raise AssertionError(call)

    def exchange(self, call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
        """No."""
        raise AssertionError(call)

    def pull(self, name: str) -> LayerState | None:
        """No."""
        raise AssertionError(name)


def test_evaluation_went_over_the_network() -> None:
    """pytorch #48988: inference, a frozen layer's training call, and the backward pass of either ask nobody."""
    x = draw("normal", 0, 0, (6, 3), "float32")
    bn = BatchNormalization(synchronized=True, collective=_Unreachable(), renorm=True)
    for mask in (None, np.array([1, 1, 0, 1, 1, 1])):
        for training in (False, None):
            bn(x, training=training, mask=mask)
    bn.backward(x)
    bn.trainable = False
    bn(x, training=True)
    bn.backward(x)
    bn.trainable = True
    with pytest.raises(AssertionError, match="ENROLL"):
        bn(x, training=True)


def test_evaluation_in_between_leaves_the_numbering_alone() -> None:
    """One rank may evaluate as often as it likes: the others' exchanges are not disturbed."""
    meeting = Meeting(2)

    def body(rank: SimulatedRank) -> None:
        bn = layer(rank)
        for step in range(3):
            bn(draw("normal", rank.rank, step, (4, 2), "float32"), training=True)
            for _ in range(rank.rank * 3):
                bn(np.ones((1, 2)))
            bn.backward(np.ones((4, 2)))

    run_all(meeting, body)
    sums = [call.key.step for call in meeting.calls if call.operation is Operation.SUMS]
    assert sums == [0, 0, 1, 1, 2, 2]


def test_a_local_batch_of_one_was_rejected() -> None:
    """pytorch #36865: only the global count matters, and a global batch of one is Keras's: variance 0."""
    x, dy = draw("normal", 0, 0, (3, 4), "float32"), draw("normal", 1, 0, (3, 4), "float32")

    def world(world_size: int) -> list[bytes]:
        def body(rank: SimulatedRank) -> tuple[NDArray[Any], NDArray[Any]]:
            bn = layer(rank)
            return (
                bn(np.array_split(x, world_size)[rank.rank], training=True),
                bn.backward(np.array_split(dy, world_size)[rank.rank]),
            )

        results = run_all(Meeting(world_size), body)
        return [np.concatenate([r[i] for r in results]).tobytes() for i in (0, 1)]

    assert world(3) == world(1)
    alone = layer(momentum=0.0)
    assert alone(x[:1], training=True).tolist() == [[0, 0, 0, 0]]
    assert alone.moving_variance.value.tolist() == [0, 0, 0, 0]
    assert alone.backward(dy[:1]).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize("far", [0.0, 1e4])
def test_masks_made_the_statistics_silently_local(far: float) -> None:
    """Keras on TensorFlow, two workers whose data differ by 10: with a mask each kept its own mean.

    At a mean of 1e4 even its unmasked variance was 16 and 24 where the truth was 27.7 and 25.6.
    """
    rng = np.random.default_rng(4)
    x = (rng.standard_normal((2, 32, 2)) + far + np.array([0.0, 10.0])[:, None, None]).astype(F32)
    masks = rng.random((2, 32)) < 0.8

    def world(synchronized: bool, masked: bool) -> list[tuple[bytes, bytes, list[float], list[float]]]:
        def body(rank: SimulatedRank) -> tuple[bytes, bytes, list[float], list[float]]:
            bn = layer(rank if synchronized else None, momentum=0.0)
            y = bn(x[rank.rank], training=True, mask=masks[rank.rank] if masked else None)
            return (
                y.tobytes(),
                bn.backward(y).tobytes(),
                bn.moving_mean.value.tolist(),
                bn.moving_variance.value.tolist(),
            )

        return run_all(Meeting(2), body)

    for masked in (False, True):
        one, other = world(True, masked)
        union = x.reshape(64, 2)[masks.reshape(64)] if masked else x.reshape(64, 2)
        truth = evaluate(union, union)
        assert one[2:] == other[2:]
        assert one[2] == pytest.approx(truth.mean.astype(float), abs=1e-3 if far else 1e-5)
        assert one[3] == pytest.approx(truth.variance.astype(float), rel=1e-5)
        local = world(False, masked)
        assert abs(local[0][2][0] - local[1][2][0]) > 9
        assert local[0][:2] != one[:2]


def test_the_gamma_gradient_lost_digits_in_its_last_product() -> None:
    """pytorch #57796: Σ(x − μ)·dy·s was less precise than Σ x̂·dy in float32; ours is no worse than either."""
    for far in (0.0, 1e3):
        x = (draw("normal", 0, 0, (4096, 8), "float64") + far).astype(F32)
        dy = draw("normal", 1, 0, (4096, 8), "float32")
        want = evaluate(x, dy)
        bn = BatchNormalization()
        bn(x, training=True)
        bn.backward(dy)
        mean, s = x.mean(0), 1 / np.sqrt(x.var(0) + F32(1e-3))
        formulas = [(((x - mean) * dy).sum(0) * s), (((x - mean) * s) * dy).sum(0)]
        scale = np.abs(dy).astype(float).sum(0)
        ours, *others = (
            float(np.max(np.abs(g.astype(np.longdouble) - want.gamma) / scale)) for g in (gradients(bn)[0], *formulas)
        )
        assert ours <= 2.0**-24
        assert ours <= min(others)


def test_the_gamma_gradient_was_reduced_twice() -> None:
    """nnabla #1120, apex #134: weights after five steps of gradient descent, under both conventions and the mistake."""
    xs = [draw("normal", 0, step, (12, 3), "float32") * 2 + 1 for step in range(5)]

    def weights(world_size: int, reduction: Literal["global", "local"], reduced: bool) -> NDArray[Any]:
        shares = [np.zeros((world_size, 2, 3)) for _ in xs]

        def body(rank: SimulatedRank) -> NDArray[Any]:
            bn = layer(rank, grad_reduction=reduction)
            for step, x in enumerate(xs):
                shard = np.split(x, [5, 6][: world_size - 1])[rank.rank]
                # The loss is Σ (y − 3x)²/2 over all ranks' rows.
                bn.backward(bn(shard, training=True) - 3 * shard)
                shares[step][rank.rank] = gradients(bn)
                layer(rank, name=f"barrier {step}")(np.ones((1, 1)), training=True)
                total = shares[step].sum(0) if reduced else shares[step][rank.rank]
                for variable, gradient in zip((bn.gamma, bn.beta), total, strict=True):
                    assert variable is not None
                    variable.assign(variable.value - 0.01 * gradient)
            return np.stack(bn.get_weights()[:2])

        ranks = run_all(Meeting(world_size), body)
        return ranks[0]

    one = weights(1, "global", reduced=False)
    assert weights(3, "global", reduced=False).tobytes() == one.tobytes()
    assert weights(3, "local", reduced=True) == pytest.approx(one, abs=1e-5)
    assert np.abs(weights(3, "global", reduced=True) - one).max() > 0.1
    assert np.abs(weights(3, "local", reduced=False) - one).max() > 0.1


@pytest.mark.parametrize("renorm", [False, True], ids=["plain", "renorm"])
def test_a_synchronized_model_would_not_load_as_a_plain_one(renorm: bool) -> None:
    """apex #1103, PaddleX #2553: the same weights and the same configuration, both ways, and the same inference."""
    x = draw("mean-1e4", 0, 0, (16, 3), "float32")

    def body(rank: SimulatedRank) -> tuple[list[bytes], dict[str, Any], list[NDArray[Any]]]:
        bn = layer(rank, momentum=0.5, renorm=renorm)
        for step in range(3):
            bn(np.array_split(draw("mean-1e4", 0, step, (16, 3), "float32"), 2)[rank.rank], training=True)
        return [bn(x).tobytes()], bn.get_config(), bn.get_weights()

    (inferred, config, weights), other = run_all(Meeting(2), body)
    assert other[0] == inferred
    plain = BatchNormalization.from_config({**config, "synchronized": False})
    plain.build((None, 3))
    plain.set_weights(weights)
    assert plain(x).tobytes() == inferred[0]
    back = BatchNormalization.from_config({**plain.get_config(), "synchronized": True})
    assert back.get_config() == config
    back.build((None, 3))
    back.set_weights(plain.get_weights())
    assert back(x).tobytes() == inferred[0]
    assert [v.name for v in back.weights] == [v.name for v in plain.weights]


def test_a_nonfinite_rank_destroyed_the_shared_statistics() -> None:
    """One rank's NaN makes that channel's outputs NaN everywhere, this step; the moving statistics survive it."""

    def body(rank: SimulatedRank) -> list[Any]:
        bn = layer(rank)
        x = draw("normal", rank.rank, 0, (8, 2), "float32")
        if rank.rank == 1:
            x[3, 0] = np.nan
        y = bn(x, training=True)
        first = bn.get_weights()
        later = bn(draw("normal", rank.rank, 1, (8, 2), "float32"), training=True)
        return [np.isnan(y).all(0).tolist(), np.isnan(y).any(0).tolist(), first[2:], np.isfinite(later).all()]

    for all_nan, any_nan, moving, finite in run_all(Meeting(2), body):
        assert all_nan == any_nan == [True, False]
        assert (moving[0][0], moving[1][0]) == (0, 1)
        assert moving[0][1] != 0
        assert finite
