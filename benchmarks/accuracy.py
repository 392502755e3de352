"""How far the variance and the output of a batch lie from the truth: this layer beside NumPy, torch and Keras.

    python benchmarks/accuracy.py [--json FILE] [--seeds N]

Data is float32, normal with standard deviation 1 about some mean; the truth is evaluated in extended precision, in
two passes. Two errors, each the worst over channels, as a range over shapes and seeds:

    variance   |v − truth| / truth
    output     max |y − truth| / (1 + |truth|)

torch and Keras take part where they are installed; Keras with the backend that `KERAS_BACKEND` names.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnlayer import BatchNormalization

MEANS = (0.0, 1e4, 1e6)
SHAPES = ((32, 64), (4096, 64), (32, 14, 14, 64))  # a small batch, a large one, images
EPSILON = 1e-3

Array = NDArray[Any]
Method = Callable[[Array], tuple[Array, Array | None]]  # x (N, …, C) → variance (C,), output or None


def np_var(x: Array) -> tuple[Array, Array | None]:
    """NumPy's two passes in float32."""
    axes = tuple(range(x.ndim - 1))
    return x.var(axes), None


def difference_of_squares(x: Array) -> tuple[Array, Array | None]:
    """E[x²] − E[x]² in float32, as one pass over the data gives it."""
    axes = tuple(range(x.ndim - 1))
    return (x * x).mean(axes) - x.mean(axes) ** 2, None


def this_layer(x: Array) -> tuple[Array, Array]:
    """The layer: its moving variance after one step that forgets the past."""
    bn = BatchNormalization(momentum=0.0, epsilon=EPSILON)
    y = bn(x, training=True)
    return bn.moving_variance.value, y


def this_layer_before_rounding(x: Array) -> tuple[Array, Array | None]:
    """The layer's statistics as they are, in float64, before the moving variance is rounded to float32."""
    seen: list[Array] = []
    bn = BatchNormalization(momentum=0.0, epsilon=EPSILON)
    bn.observe(lambda moments: seen.append(moments.mean_variance[1]))
    bn(x, training=True)
    return seen[0], None


def torch_layer(x: Array) -> tuple[Array, Array]:
    """`torch.nn.functional.batch_norm` on the CPU; its running variance is the unbiased one."""
    import torch

    channels, rows = x.shape[-1], x.size // x.shape[-1]
    mean, variance = torch.zeros(channels), torch.ones(channels)
    given = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    y = torch.nn.functional.batch_norm(given, mean, variance, training=True, momentum=1.0, eps=EPSILON)
    return variance.numpy().astype(np.float64) * (rows - 1) / rows, np.moveaxis(y.numpy(), 1, -1)


def keras_layer(x: Array) -> tuple[Array, Array]:
    """`keras.layers.BatchNormalization` with the backend in force."""
    import keras

    layer = keras.layers.BatchNormalization(momentum=0.0, epsilon=EPSILON)
    with np.errstate(invalid="ignore"):  # a negative variance has no root
        y = keras.ops.convert_to_numpy(layer(x, training=True))
    return np.asarray(keras.ops.convert_to_numpy(layer.moving_variance)), np.asarray(y)


def methods() -> dict[str, Method]:
    """What is compared, by name; frameworks only where they are installed."""
    methods_by_name: dict[str, Method] = {
        "bnlayer": this_layer,
        "bnlayer, before rounding": this_layer_before_rounding,
        "np.var, float32": np_var,
        "E[x²] − E[x]², float32": difference_of_squares,
    }
    if importlib.util.find_spec("torch") is not None:
        methods_by_name["torch"] = torch_layer
    if importlib.util.find_spec("keras") is not None:
        import keras

        methods_by_name[f"Keras {keras.__version__}, {keras.backend.backend()}"] = keras_layer
    return methods_by_name


def truth(x: Array) -> tuple[Array, Array]:
    """Variance and output in extended precision."""
    wide, axes = x.astype(np.longdouble), tuple(range(x.ndim - 1))
    centered = wide - wide.mean(axes)
    variance = (centered**2).mean(axes)
    return variance, centered / np.sqrt(variance + np.longdouble(EPSILON))


def errors(method: Method, x: Array) -> dict[str, float]:
    """The worst errors of a method on one batch; NaN counts as infinite."""
    variance, y = method(x)
    want_variance, want_y = truth(x)
    worst = {"variance": float(np.max(np.abs(variance - want_variance) / want_variance))}
    if y is not None:
        worst["output"] = float(np.max(np.abs(y - want_y) / (1 + np.abs(want_y))))
    return {name: np.inf if np.isnan(error) else error for name, error in worst.items()}


def measure(seeds: int) -> list[dict[str, Any]]:
    """One row per method and mean: the smallest and the largest error over shapes and seeds."""
    rows = []
    for name, method in methods().items():
        for mean in MEANS:
            measured = [
                errors(method, (np.random.default_rng(seed).standard_normal(shape) + mean).astype(np.float32))
                for shape in SHAPES
                for seed in range(seeds)
            ]
            ranges = {key: [min(f[key] for f in measured), max(f[key] for f in measured)] for key in measured[0]}
            rows.append({"method": name, "mean": mean, **ranges})
    return rows


def shown(spread: list[float] | None) -> str:
    """A range of errors; whatever reaches the size of the truth is no result."""
    if spread is None:
        return ""
    low, high = ("garbage" if error >= 1 else f"{error:.0e}" if error else "0" for error in spread)
    return low if low == high else f"{low} to {high}"


def main() -> None:
    """Print the table, and write the numbers if asked to."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here too")
    parser.add_argument("--seeds", type=int, default=3, help="batches per shape (default: %(default)s)")
    arguments = parser.parse_args()
    rows = measure(arguments.seeds)
    table = Table("method", *(f"{what}, mean {mean:g}" for what in ("variance", "output") for mean in MEANS))
    for name in dict.fromkeys(row["method"] for row in rows):
        of_method = [row for row in rows if row["method"] == name]
        table.add_row(escape(name), *(shown(row.get(what)) for what in ("variance", "output") for row in of_method))
    Console().print(table)
    if arguments.json:
        document = {"numpy": np.__version__, "shapes": SHAPES, "seeds": arguments.seeds, "rows": rows}
        # Infinity is no JSON: a method without a result has null.
        text = json.dumps(document, indent=1, default=str).replace("Infinity", "null")
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
