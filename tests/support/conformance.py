"""The cases that are run beside Keras: every axis of ranks 2 to 5 × policy × center × scale × mask × renorm.

Each case is a function of its number alone. All have 24 values of 5 channels, so that one compiled derivative serves
all of them; other sizes are tested without Keras.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlayer import BatchNormalization
from bnlayer.dtypes import Policy
from support.textbook import Settings, Weights, Wide

CHANNELS = 5
OTHERS = {2: (24,), 3: (3, 8), 4: (2, 3, 4), 5: (2, 3, 2, 2)}
POLICIES = ("float32", "float64", "float16", "bfloat16", "mixed_float16", "mixed_bfloat16")
CLIPPINGS: tuple[dict[str, float] | None, ...] = (None, {}, {"rmax": 1.2, "rmin": 0.8, "dmax": 0.3})

# float32 is judged by 2e-6 and float64 by 1e-10, both of max |got − want| / (1 + |want|).
BOUNDS = {"float32": 2e-6, "float64": 1e-10}


@dataclass(frozen=True)
class Case:
    """One configuration and its data.

    Attributes:
        number: seeds everything that is drawn.
        clipping: None: no renorm.
    """

    number: int
    shape: tuple[int, ...]
    axis: int
    policy: str
    center: bool
    scale: bool
    masked: bool
    clipping: dict[str, float] | None

    def __str__(self) -> str:
        flags = [name for name in ("center", "scale", "masked") if getattr(self, name)]
        renorm = {None: [], 0: ["renorm"], 3: ["clipped"]}[None if self.clipping is None else len(self.clipping)]
        return "-".join([f"{len(self.shape)}d", f"axis{self.axis}", self.policy, *flags, *renorm])

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's, for either layer."""
        return {
            "axis": self.axis,
            "momentum": self.settings.momentum,
            "epsilon": self.settings.epsilon,
            "center": self.center,
            "scale": self.scale,
            "dtype": self.policy,
            "renorm": self.clipping is not None,
            "renorm_clipping": self.clipping,
            "renorm_momentum": self.settings.renorm_momentum,
        }

    @property
    def settings(self) -> Settings:
        """What the textbook needs of them."""
        rng = np.random.default_rng([20260103, self.number])
        return Settings(float(rng.choice([0.99, 0.75, 0.0])), float(rng.choice([1e-3, 1e-5])), 0.9, self.clipping)

    @property
    def rng(self) -> np.random.Generator:
        """A fresh generator of this case."""
        return np.random.default_rng([20260101, self.number])

    @property
    def data(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_] | None]:
        """x, dy and the mask. A third of the full-precision cases lies around 1e4, ten thousand deviations off."""
        rng, dtype = self.rng, "float64" if self.policy == "float64" else "float32"
        far = 1e4 if rng.random() < 1 / 3 and self.policy in BOUNDS else 1.0
        x = rng.standard_normal(self.shape) * rng.uniform(0.5, 2) + far
        dy = rng.standard_normal(self.shape)
        mask = rng.random(self.shape[:-1]) < 0.7 if self.masked else None
        return x.astype(dtype), dy.astype(dtype), mask

    def weights(self, bn: BatchNormalization) -> list[NDArray[Any]]:
        """Vectors for all its variables, in their dtype."""
        rng = np.random.default_rng([20260102, self.number])
        ranges = {"gamma": (0.5, 2.0), "moving_variance": (0.3, 3.0), "moving_stddev": (0.5, 2.0)}
        ranges |= {"renorm_stddev": (0.5, 2.0)}
        values = [rng.uniform(*ranges.get(variable.name, (-1.0, 1.0)), CHANNELS) for variable in bn.weights]
        return [value.astype(variable.dtype) for value, variable in zip(values, bn.weights, strict=True)]


def _all() -> list[Case]:
    shapes = [
        ((*others[:axis], CHANNELS, *others[axis:]), axis)
        for others in OTHERS.values()
        for axis in range(len(others) + 1)
    ]
    product = itertools.product(shapes, POLICIES, (True, False), (True, False), (False, True), CLIPPINGS)
    from_the_end = np.random.default_rng(20260104)
    cases = []
    for number, ((shape, axis), policy, center, scale, masked, clipping) in enumerate(product):
        # Half of the cases say where their channels are from the end.
        named = axis - len(shape) if from_the_end.random() < 0.5 else axis
        cases.append(Case(number, shape, named, policy, center, scale, masked, clipping))
    return cases


CASES = _all()


def in_compute_dtype(policy: str, x: NDArray[Any]) -> NDArray[Any]:
    """What a layer of the policy sees of its input."""
    return x.astype(Policy.of(policy).compute_dtype)


def error(got: NDArray[Any], want: Wide) -> float:
    """max |got − want| / (1 + |want|)."""
    return float(np.max(np.abs(got.astype(np.float64) - want) / (1 + np.abs(want)), initial=0))


def beyond_one_rounding(got: NDArray[Any], want: Wide) -> NDArray[np.bool_]:
    """Where a half is neither the nearest one to the truth nor that one's neighbour.

    The arithmetic is float32, so a result near 0, where halves lie closer than float32's error, gets float32's bound.
    """
    nearest = want.astype(got.dtype)
    with np.errstate(over="ignore"):
        step = np.abs(np.nextafter(nearest, got.dtype.type(np.inf)).astype(np.float64) - nearest.astype(np.float64))
    off = np.abs(got.astype(np.float64) - nearest.astype(np.float64))
    return np.asarray(off > np.maximum(step, BOUNDS["float32"]))


def assert_close(got: NDArray[Any], want: Wide, what: str) -> None:
    """The bound of got's dtype holds."""
    if got.dtype.name in BOUNDS:
        worst, bound = error(got, want), BOUNDS[got.dtype.name]
        assert worst <= bound, f"{what}: error {worst:.2e}, bound {bound:.0e}"
    else:
        off = beyond_one_rounding(got, want)
        assert not off.any(), f"{what}: {got[off]} where the truth is {want[off]}"


def weights_of(bn: BatchNormalization) -> Weights:
    """A layer's vectors for the textbook."""
    return Weights.of([variable.name for variable in bn.weights], bn.get_weights())
