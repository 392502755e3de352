"""Draws the numbers of `initializers.json` with real Keras; run it with `KERAS_BACKEND=numpy`, in `.venv-adapters`.

KERAS_BACKEND=numpy .venv-adapters/bin/python tests/golden/make_initializers.py
"""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np

SEED, SHAPE = 1234, (6,)
ARGUMENTS: dict[str, dict[str, Any]] = {
    "RandomNormal": {"mean": 1.0, "stddev": 0.5},
    "TruncatedNormal": {"mean": 1.0, "stddev": 0.5},
    "RandomUniform": {"minval": -1.0, "maxval": 3.0},
    "VarianceScaling": {"scale": 2.0, "mode": "fan_out", "distribution": "untruncated_normal"},
    "GlorotUniform": {},
    "GlorotNormal": {},
    "HeUniform": {},
    "HeNormal": {},
    "LecunUniform": {},
    "LecunNormal": {},
}


def main() -> None:
    """Write the file."""
    drawn = {}
    for name, arguments in ARGUMENTS.items():
        initializer = getattr(keras.initializers, name)(**arguments, seed=SEED)
        values = {
            dtype: np.asarray(initializer(SHAPE, dtype=dtype)).astype(np.float64).tolist()
            for dtype in ("float32", "float64", "float16", "bfloat16")
        }
        drawn[name] = {"arguments": arguments, "values": values}
    origin = {"keras": keras.__version__, "backend": keras.backend.backend(), "numpy": np.__version__, "seed": SEED}
    Path(__file__).with_name("initializers.json").write_text(
        json.dumps({"origin": origin, "drawn": drawn}, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
