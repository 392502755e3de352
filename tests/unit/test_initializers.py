"""The vocabulary of initial values: Keras's numbers from Keras's seeds, under every way to name them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormalization, initializers
from bnlayer.dtypes import dtype_named

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden", "initializers.json").read_text(encoding="utf-8"))
SEED = GOLDEN["origin"]["seed"]
F32 = np.dtype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", GOLDEN["drawn"])
def test_a_seed_draws_what_keras_draws(name: str, dtype: str) -> None:
    """Equal numbers, drawn in float64 and rounded once; and the same ones each time."""
    golden = GOLDEN["drawn"][name]
    made = initializers.get({"class_name": name, "config": {**golden["arguments"], "seed": SEED}})
    drawn = made((6,), dtype_named(dtype))
    assert drawn.dtype == dtype_named(dtype)
    assert drawn.astype(np.float64).tolist() == golden["values"][dtype]
    assert made((6,), dtype_named(dtype)).tobytes() == drawn.tobytes()


def test_the_golden_numbers_name_their_origin() -> None:
    """Real Keras, on the backend whose draws these are."""
    assert (GOLDEN["origin"]["keras"], GOLDEN["origin"]["backend"]) == ("3.15.1", "numpy")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("zeros", "zero", "Zeros"), "Zeros"),
        (("ones", "one", "Ones"), "Ones"),
        (("constant", "Constant"), "Constant"),
        (("random_normal", "normal", "RandomNormal"), "RandomNormal"),
        (("truncated_normal", "TruncatedNormal"), "TruncatedNormal"),
        (("random_uniform", "uniform", "RandomUniform"), "RandomUniform"),
        (("variance_scaling", "VarianceScaling"), "VarianceScaling"),
        (("glorot_uniform", "GlorotUniform"), "GlorotUniform"),
        (("he_normal", "HeNormal"), "HeNormal"),
        (("lecun_uniform", "LecunUniform"), "LecunUniform"),
    ],
)
def test_names_aliases_classes_and_instances(names: tuple[str, ...], kind: str) -> None:
    """Keras's spellings, the class itself, an instance, and a configuration of it."""
    cls = getattr(initializers, kind)
    instance = cls()
    for value in (*names, cls, instance, {"class_name": kind, "config": instance.get_config()}):
        initializer = initializers.get(value)
        assert type(initializer) is cls
        config: dict[str, Any] = initializer.get_config()  # type: ignore[attr-defined]  # every one of ours has it
        assert config == instance.get_config()
    assert initializers.get(instance) is instance


@pytest.mark.parametrize(
    ("preset", "scale", "mode", "distribution"),
    [
        ("GlorotUniform", 1.0, "fan_avg", "uniform"),
        ("GlorotNormal", 1.0, "fan_avg", "truncated_normal"),
        ("HeUniform", 2.0, "fan_in", "uniform"),
        ("HeNormal", 2.0, "fan_in", "truncated_normal"),
        ("LecunUniform", 1.0, "fan_in", "uniform"),
        ("LecunNormal", 1.0, "fan_in", "truncated_normal"),
    ],
)
def test_presets_are_variance_scalings(preset: str, scale: float, mode: str, distribution: str) -> None:
    """The same numbers; uniform ones stay below √(3·scale/C), cut ones below two deviations."""
    named = getattr(initializers, preset)(seed=5)((1000,), F32)
    general = initializers.VarianceScaling(scale, mode, distribution, seed=5)((1000,), F32)
    assert named.tobytes() == general.tobytes()
    variance = scale / 1000
    limit = np.sqrt(3 * variance) if distribution == "uniform" else 2 * np.sqrt(variance) / 0.87962566
    assert np.abs(named).max() <= limit * (1 + 1e-6)
    assert named.var() == pytest.approx(variance, rel=0.1)


def test_fans_follow_the_axes() -> None:
    """A vector's fans are its length, unless axes say otherwise; what has no fan counts as one."""
    wide: dict[str, Any] = {"scale": 4.0, "distribution": "uniform", "seed": 1}
    assert np.abs(initializers.VarianceScaling(**wide)((400,), F32)).max() <= np.sqrt(3 * 4 / 400)
    inner = initializers.VarianceScaling(**wide, mode="fan_in", input_axes=[], output_axes=[0])((400,), F32)
    assert 3 < np.abs(inner).max() <= np.sqrt(3 * 4)
    assert initializers.VarianceScaling(**wide)((0,), F32).shape == (0,)


def test_truncated_numbers_are_redrawn_not_clipped() -> None:
    """None beyond two deviations, and none piled up there."""
    drawn = initializers.TruncatedNormal(1.0, 0.5, seed=0)((20_000,), np.dtype(np.float64))
    assert np.abs(drawn - 1).max() <= 1
    assert len(np.unique(drawn)) == 20_000


def test_without_a_seed_each_instance_draws_its_own() -> None:
    """But one instance always the same; its configuration says that no seed was given."""
    one, other = initializers.RandomNormal(), initializers.RandomNormal()
    assert one((8,), F32).tobytes() == one((8,), F32).tobytes()
    assert one((8,), F32).tobytes() != other((8,), F32).tobytes()
    assert one.get_config()["seed"] is None
    assert one != other
    assert initializers.RandomNormal(seed=1) == initializers.RandomNormal(seed=1)
    assert len({initializers.RandomNormal(seed=1), initializers.RandomNormal(seed=1)}) == 1


class _FromKeras:
    """What an instance of Keras's own looks like."""

    def get_config(self) -> dict[str, Any]:
        """Keras's arguments."""
        return {"seed": SEED, "minval": -1.0, "maxval": 3.0}


def test_instances_of_keras_are_taken_by_their_configuration() -> None:
    """By class name and module, without importing Keras."""
    theirs = type("RandomUniform", (_FromKeras,), {"__module__": "keras.src.initializers.random_initializers"})()
    initializer = initializers.get(theirs)
    assert type(initializer) is initializers.RandomUniform
    assert initializer((6,), F32).tolist() == GOLDEN["drawn"]["RandomUniform"]["values"]["float32"]


@pytest.mark.parametrize("name", ["orthogonal", "Orthogonal", "identity", "IdentityInitializer", "stft"])
def test_those_for_matrices_are_refused(name: str) -> None:
    """A vector has no orthogonal value; the text lists what there is."""
    accepted = (
        "'zeros', 'ones', 'constant', 'random_normal', 'truncated_normal', 'random_uniform', 'variance_scaling', "
        "'glorot_uniform', 'glorot_normal', 'he_uniform', 'he_normal', 'lecun_uniform', 'lecun_normal'"
    )
    with pytest.raises(ValueError) as caught:
        initializers.get(name)
    assert str(caught.value) == (
        f"Unknown initializer: {name!r}. Expected one of {accepted} by name, by Keras's configuration or by instance, "
        "or a callable."
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: initializers.RandomNormal(seed="x"),  # type: ignore[arg-type]  # what is tested
            "RandomNormal: expected an int from 0 to 2^32 - 1, or None, as seed; received 'x'.",
        ),
        (
            lambda: initializers.HeNormal(seed=True),
            "HeNormal: expected an int from 0 to 2^32 - 1, or None, as seed; received True.",
        ),
        (
            lambda: initializers.HeNormal(seed=2**32),
            "HeNormal: expected an int from 0 to 2^32 - 1, or None, as seed; received 4294967296.",
        ),
        (
            lambda: initializers.VarianceScaling(scale=0),
            "Argument `scale` must be positive float. Received: scale=0",
        ),
        (
            lambda: initializers.VarianceScaling(mode="fan"),
            "Invalid `mode` argument: fan. Please use one of fan_in, fan_out, fan_avg.",
        ),
        (
            lambda: initializers.VarianceScaling(distribution="cauchy"),
            "Invalid `distribution` argument: cauchy. Please use one of uniform, truncated_normal, untruncated_normal.",
        ),
    ],
)
def test_invalid_values_are_refused_with_what_was_received(make: Any, text: str) -> None:
    """When the initializer is made, not when the layer is built."""
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == text


def test_a_layer_draws_all_four_vectors() -> None:
    """In the variables' dtype, whatever the inputs'."""
    bn = BatchNormalization(
        gamma_initializer=initializers.RandomUniform(1, 2, seed=1),
        beta_initializer="random_normal",
        moving_mean_initializer={"class_name": "Constant", "config": {"value": 3.0}},
        moving_variance_initializer=initializers.Constant(4.0),
        renorm=True,
        dtype="float16",
    )
    bn(np.zeros((2, 3)))
    assert [variable.dtype.name for variable in bn.weights] == ["float16"] * 7
    assert bn.moving_mean.value.tolist() == bn.renorm_mean.value.tolist() == [3.0] * 3
    assert bn.moving_stddev.value.tolist() == bn.renorm_stddev.value.tolist() == [2.0] * 3
    assert bn.gamma is not None
    assert ((bn.gamma.value >= 1) & (bn.gamma.value <= 2)).all()
