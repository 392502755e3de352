"""The layer's configuration, names, weights and error texts: Keras's, or clearer ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bnlayer import Alone, BatchNormalization, CollectiveError, PeerLostError
from bnlayer.collective import Call, LayerSignature, Total, current
from bnlayer.constraints import MaxNorm, MinMaxNorm
from bnlayer.regularizers import L1L2
from bnlayer.state import LayerState

_BATCH = np.random.default_rng(4).normal(3, 2, (8, 3)).astype(np.float32)


def test_unknown_keywords_are_named() -> None:
    """Keras's text."""
    with pytest.raises(
        ValueError, match=r"Unrecognized keyword arguments passed to BatchNormalization: \{'fused': True\}"
    ):
        BatchNormalization(fused=True)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dtype": "float8"}, "Expected a dtype policy, one of float32, float64, .* received 'float8'"),
        ({"gamma_initializer": "orthogonal"}, "Unknown initializer: 'orthogonal'. Expected one of 'zeros'"),
        ({"gamma_initializer": None}, "Expected an initializer, received None."),
        ({"beta_regularizer": "orthogonal"}, "Unknown regularizer: 'orthogonal'"),
        ({"beta_constraint": "max_min"}, "Unknown constraint: 'max_min'. Expected one of 'non_neg', 'max_norm'"),
        ({"collective": Alone()}, "collective= was given, but synchronized=False"),
        ({"grad_reduction": "mean"}, "grad_reduction: expected 'global' or 'local', received 'mean'."),
        ({"beta_regularizer": dict}, "Unknown regularizer: {}"),
    ],
)
def test_what_is_not_supported_raises_an_error_that_names_it(arguments: dict[str, Any], text: str) -> None:
    """A clear error, never a silently wrong layer."""
    with pytest.raises(ValueError, match=text):
        BatchNormalization(**arguments)


def test_arguments_are_coerced_as_keras_does() -> None:
    """int(axis), float(momentum), float(epsilon)."""
    bn = BatchNormalization(axis=np.int64(1), momentum=np.float32(0.5), epsilon=1)  # type: ignore[arg-type]  # coerced
    assert (type(bn.axis), type(bn.momentum), type(bn.epsilon)) == (int, float, float)


def test_shapes_are_checked_with_both_sides_named() -> None:
    """Axis out of range, undefined channels, and inputs unlike the first."""
    with pytest.raises(ValueError, match=r"Axis 3 is out of bounds for input shape \(4, 2\). Received: axis=3"):
        BatchNormalization(axis=3)(np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"Axis 3 is out of bounds for input shape \(4, 2\). Received: axis=3"):
        BatchNormalization(axis=3).compute_output_shape((4, 2))
    with pytest.raises(ValueError, match="must have a defined dimension"):
        BatchNormalization().build((4, None))
    bn = BatchNormalization(name="bn")
    assert bn.compute_output_shape((None, 2)) == (None, 2)
    bn(np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"expected ndim=2 and 2 channels on axis -1, received shape \(4, 3\)"):
        bn(np.zeros((4, 3)))
    with pytest.raises(ValueError, match="ndim=3"):
        bn(np.zeros((4, 2, 2)))


def test_mask_rank_is_checked_also_at_inference() -> None:
    """Keras's text; a mask that cannot broadcast is named too."""
    bn = BatchNormalization()
    text = (
        r"The mask provided should be one dimension less than the inputs. "
        r"Received: mask.shape=\(4, 2\), inputs.shape=\(4, 2\)"
    )
    for training in (True, False):
        with pytest.raises(ValueError, match=text):
            bn(np.zeros((4, 2)), training=training, mask=np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"does not broadcast .* mask.shape=\(3,\), inputs.shape=\(4, 2\)"):
        bn(np.zeros((4, 2)), mask=np.ones(3))
    assert bn.compute_mask(None, "mask") == "mask"


@pytest.mark.parametrize("synchronized", [True, False])
def test_from_config_of_get_config_is_identity(synchronized: bool) -> None:
    """Also beside the live original: names collide at the first exchange, not before."""
    bn = BatchNormalization(
        axis=1,
        momentum=0.9,
        gamma_initializer={"class_name": "Constant", "config": {"value": 0.5}},
        beta_regularizer="l1_l2",
        gamma_constraint=MaxNorm(3.0),
        beta_constraint="non_neg",
        dtype="float64",
        synchronized=synchronized,
    )
    config = bn.get_config()
    copy = BatchNormalization.from_config(config)
    assert copy.get_config() == config
    assert list(config) == [
        "name", "trainable", "dtype", "axis", "momentum", "epsilon", "center", "scale",
        "beta_initializer", "gamma_initializer", "moving_mean_initializer", "moving_variance_initializer",
        "beta_regularizer", "gamma_regularizer", "beta_constraint", "gamma_constraint",
        "synchronized", "renorm", "renorm_clipping", "renorm_momentum",
    ]  # fmt: skip


def test_a_plain_callable_works_but_has_no_configuration() -> None:
    """It is called; get_config says why it can't say more."""
    bn = BatchNormalization(gamma_constraint=lambda w: w * 0, beta_regularizer=lambda w: 3.0)
    bn.build((None, 2))
    assert bn.losses == [3.0]
    with pytest.raises(ValueError, match=r"has no method gradient\(w\): it counts in `losses`"):
        bn.regularizer_gradients()
    with pytest.raises(ValueError, match="a plain callable can't be part of a layer's configuration"):
        bn.get_config()


def test_regularizers_and_constraints_compute_what_their_names_say() -> None:
    """Penalty, derivative and projection of each."""
    w = np.array([3.0, -4.0], np.float32)
    for name, loss, gradient in (
        ("l1", 0.07, [0.01, -0.01]),
        ("l2", 0.25, [0.06, -0.08]),
        ({"class_name": "L1L2", "config": {"l1": 0.1, "l2": 0.01}}, 0.95, [0.16, -0.18]),
    ):
        bn = BatchNormalization(gamma_regularizer=name, gamma_initializer=lambda s, d: np.array([3, -4], d))
        bn.build((None, 2))
        assert bn.losses == [pytest.approx(loss)]
        assert bn.regularizer_gradients()[0] == pytest.approx(gradient)
        assert bn.regularizer_gradients()[1].tolist() == [0, 0]
    for constraint, value in (
        ("non_neg", [3, 0]),
        ("unit_norm", [0.6, -0.8]),
        (MaxNorm(2.5), [1.5, -2.0]),
        ("min_max_norm", [0.6, -0.8]),
        (MinMaxNorm(6.0, 9.0, rate=0.5), [3.3, -4.4]),
    ):
        bn = BatchNormalization(gamma_constraint=constraint)
        assert bn.gamma_constraint is not None
        assert bn.gamma_constraint(w) == pytest.approx(value, rel=1e-6)
        assert bn.gamma_constraint(w).dtype == np.float32
    with pytest.raises(ValueError, match="expected a finite l2 >= 0, received -1"):
        L1L2(l2=-1)


def test_a_regularizer_with_a_derivative_of_its_own() -> None:
    """A callable object that offers gradient(w) trains; one of a wrong shape is refused."""

    class Cube:
        def __call__(self, w: np.ndarray[Any, Any]) -> float:
            return float((w**3).sum())

        def gradient(self, w: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            return np.asarray(3 * w**2)[: self.keep]

        keep = 2

    bn = BatchNormalization(gamma_regularizer=Cube())
    bn.build((None, 2))
    assert bn.regularizer_gradients()[0].tolist() == [3, 3]
    Cube.keep = 1
    with pytest.raises(ValueError, match=r"expected a gradient of shape \(2,\), received \(1,\)"):
        bn.regularizer_gradients()


def test_callables_of_a_wrong_shape_are_refused() -> None:
    """An initializer or constraint must give a vector of the channels."""
    with pytest.raises(ValueError, match=r"expected shape \(2,\), received \(3,\)"):
        BatchNormalization(gamma_initializer=lambda s, d: np.zeros(3)).build((None, 2))
    bn = BatchNormalization(gamma_constraint=lambda w: np.zeros(3))
    assert bn.gamma_constraint is not None
    with pytest.raises(ValueError, match=r"expected shape \(2,\), received \(3,\)"):
        bn.gamma_constraint(np.zeros(2))


def test_weights_are_read_and_set_in_keras_order() -> None:
    """All or nothing, with the shapes in the text."""
    bn = BatchNormalization(name="bn")
    with pytest.raises(ValueError, match=r"expected 0 weights \(it is not built yet\), received 1"):
        bn.set_weights([np.zeros(2)])
    bn.build((None, 2))
    values = [np.full(2, float(i)) for i in range(4)]
    bn.set_weights(values)
    assert [w.tolist() for w in bn.get_weights()] == [v.tolist() for v in values]
    with pytest.raises(ValueError, match=r"expected 4 weights \(gamma\(2,\), .* received 4 of shapes"):
        bn.set_weights([*values[:3], np.zeros(3)])
    assert [w.tolist() for w in bn.get_weights()] == [v.tolist() for v in values]


def test_variables_behave_like_keras_variables() -> None:
    """value, assign, numpy, shape, dtype, and conversion by np.asarray."""
    bn = BatchNormalization()
    bn.build((None, 3))
    gamma = bn.gamma
    assert gamma is not None
    gamma.assign([1, 2, 3])
    assert np.asarray(gamma).tolist() == [1, 2, 3]
    assert np.asarray(gamma, np.float64).dtype == np.float64
    assert np.array(gamma) is not gamma.value
    copy = gamma.numpy()
    copy[0] = 9
    assert gamma.value[0] == 1
    assert repr(gamma) == "<Variable gamma, shape=(3,), dtype=float32>"
    with pytest.raises(ValueError, match=r"The shape of variable 'gamma' is \(3,\); received a value of shape \(2,\)"):
        gamma.assign([1, 2])
    with pytest.raises(ValueError, match="needs a copy, and copy=False"):
        gamma.__array__(np.dtype("float64"), copy=False)


def test_two_live_synchronized_layers_of_one_name_are_refused() -> None:
    """Their statistics would be mixed; a dead layer frees its name, even from a reference cycle."""
    collective = Alone()
    x = np.zeros((2, 2))
    first = BatchNormalization(synchronized=True, name="same", collective=collective)
    first(x, training=True)
    second = BatchNormalization(synchronized=True, name="same", collective=collective)
    second(x)
    with pytest.raises(ValueError, match="Two live synchronized layers are named 'same'"):
        second(x, training=True)
    first.itself = first  # type: ignore[attr-defined]  # a cycle
    del first
    second(x, training=True)


def test_unnamed_layers_get_names_in_the_order_of_their_making() -> None:
    """The same on every rank that builds the same model."""
    names = [BatchNormalization().name for _ in range(2)]
    stem, number = names[0].rsplit("_", 1) if names[0] != "batch_normalization" else ("batch_normalization", "0")
    assert names[1] == f"{stem}_{int(number) + 1}"


@pytest.mark.parametrize(
    ("variables", "source"),
    [
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI's mpiexec announces 2 ranks"),
        ({"RANK": "0", "WORLD_SIZE": "4"}, "torchrun announces 4 ranks"),
        ({"BNLAYER_RANK": "0", "BNLAYER_WORLD_SIZE": "3"}, "announces 3 ranks"),
    ],
)
def test_synchronized_without_a_world_is_refused_where_ranks_are_announced(
    variables: dict[str, str], source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silently unsynchronized training is what others are blamed for; inference needs no world."""
    for name, value in variables.items():
        monkeypatch.setitem(os.environ, name, value)
    bn = BatchNormalization(synchronized=True)
    bn(np.zeros((2, 2)))
    with pytest.raises(RuntimeError, match=f"{source}.*Call bnworker.join"):
        bn(np.zeros((2, 2)), training=True)
    BatchNormalization()(np.zeros((2, 2)), training=True)


def test_current_is_a_world_of_one_by_default() -> None:
    """And always the same one."""
    assert current() is current()
    assert (current().rank, current().world_size, current().pull("any")) == (0, 1, None)


def test_collective_errors_keep_their_attributes() -> None:
    """Ranks sorted; copies made by `again` and by pickling are whole."""
    import pickle

    error = PeerLostError("rank 2 is gone", ranks=(3, 2), layer="a", step=4)
    for copy in (error, error.copy_for_raise(), pickle.loads(pickle.dumps(error))):
        assert (type(copy), str(copy), copy.ranks, copy.layer, copy.step) == (
            PeerLostError,
            "rank 2 is gone",
            (2, 3),
            "a",
            4,
        )
    assert isinstance(error, CollectiveError)


def test_the_next_call_moves_from_what_was_assigned() -> None:
    """Whoever assigns to a moving statistic is believed; nothing that was kept stands against it."""
    x = _BATCH
    writes: tuple[Callable[[BatchNormalization], None], ...] = (
        lambda bn: bn.moving_mean.assign([5.0, 6.0, 7.0]),
        lambda bn: bn.set_weights(list(np.full((4, 3), 5.0))),
    )
    for write in writes:
        bn = BatchNormalization(synchronized=True, momentum=0.5)
        bn(x, training=True)
        write(bn)
        before = bn.moving_mean.numpy()
        bn(x, training=True)
        wanted = (before.astype(np.float64) * 0.5 + x.astype(np.float64).mean(0) * 0.5).astype(np.float32)
        np.testing.assert_allclose(bn.moving_mean.value, wanted, rtol=1e-6)


def test_a_changed_setting_is_reported_at_the_next_exchange() -> None:
    """The ranks compare what holds now, not what held at the first call."""

    class Listening(Alone):
        def __init__(self) -> None:
            self.heard: list[float] = []

        def exchange(self, call: Call, limbs: NDArray[np.int64], state: LayerState | None = None) -> Total:
            assert isinstance(call.signature, LayerSignature)
            self.heard.append(call.signature.momentum)
            return super().exchange(call, limbs, state)

    listening = Listening()
    bn = BatchNormalization(synchronized=True, collective=listening, momentum=0.9)
    bn(_BATCH, training=True)
    bn.momentum = 0.5
    bn(_BATCH, training=True)
    assert listening.heard == [0.9, 0.9, 0.5]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"momentum": "a"}, "momentum: expected a number, received 'a'."),
        ({"momentum": None}, "momentum: expected a number, received None."),
        ({"epsilon": [1]}, "epsilon: expected a number, received [1]."),
        ({"renorm_momentum": {}}, "renorm_momentum: expected a number, received {}."),
        ({"axis": "1"}, "axis: expected an integer, or a list of one, received '1'."),
        ({"axis": 1.5}, "axis: expected an integer, or a list of one, received 1.5."),
        (
            {"renorm": True, "renorm_clipping": {"rmax": "a"}},
            "renorm_clipping['rmax']: expected a number, received 'a'.",
        ),
        (
            {"gamma_regularizer": {"class_name": "L2", "config": {"l2": "a"}}},
            "Regularizer: l2: expected a number, received 'a'.",
        ),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(arguments: dict[str, Any], text: str) -> None:
    """Which one, what was expected, and what was received."""
    with pytest.raises(ValueError) as caught:
        BatchNormalization(**arguments)
    assert str(caught.value) == text


def test_reprs_tell_layers_apart() -> None:
    """The name, the channels, and what differs from the defaults; a state is one line, however many channels."""
    bn = BatchNormalization(name="bn1", axis=1, scale=False, synchronized=True, dtype="bfloat16")
    text = (
        "BatchNormalization(name='bn1', channels={}, axis=1, momentum=0.99, epsilon=0.001, dtype='bfloat16', "
        "scale=False, synchronized=True)"
    )
    assert repr(bn) == text.format(None)
    bn.build((None, 5000))
    assert repr(bn) == text.format(5000)
    assert repr(bn.state) == "<LayerState of 5000 channels in float32 with bfloat16 variables, version 0>"
    assert repr(BatchNormalization(name="a")) == (
        "BatchNormalization(name='a', channels=None, axis=-1, momentum=0.99, epsilon=0.001, dtype='float32')"
    )
