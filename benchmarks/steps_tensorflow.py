"""The same ten layers in TensorFlow: MultiWorkerMirroredStrategy, two processes, Keras's synchronized layer.

    python -m benchmarks.steps_tensorflow RESULT.json STEPS THREADS        TF_CONFIG set; THREADS 0: TensorFlow's choice

The interpreter needs TensorFlow and NumPy, nothing of this project. A step is compiled by `tf.function`: ten layers
forward, the gradients of the input, the gammas and the betas back. Gradients of weights are not reduced, as in the
step that it is compared with. Figure: step/tensorflow, in seconds, the better of one thread a process and
TensorFlow's own choice; step/tensorflow, unsynchronized, beside it. With ", CPU" behind the name: the processor time
of all its threads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from benchmarks.processes import free_ports, side_by_side, write

LAYERS = 10
SHAPE = (32, 28, 28, 64)
_WARM = 5


def version(python: str) -> str | None:
    """The version of TensorFlow that an interpreter has; None without. Its distribution has several names."""
    program = (
        "import importlib.metadata as m, importlib.util as u\n"
        "found = [d.version for d in m.distributions() if d.metadata['Name'].startswith('tensorflow')]\n"
        "print(found[0] if found and u.find_spec('tensorflow') else '')"
    )
    ended = subprocess.run([python, "-c", program], capture_output=True, text=True, check=False)
    return ended.stdout.strip() or None


def measure(python: str, steps: int) -> dict[str, float]:
    """Two workers, with one thread each and with TensorFlow's choice; the better one counts."""
    figures: dict[str, float] = {}
    for threads in (1, 0):
        ports = free_ports(2)
        cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
        environments = [
            {
                "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}}),
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "CUDA_VISIBLE_DEVICES": "",
                "KERAS_BACKEND": "tensorflow",
            }
            for index in range(2)
        ]
        runs = side_by_side(
            environments, "benchmarks.steps_tensorflow", str(steps), str(threads), python=python, limit_s=240
        )
        for name, seconds in runs.items():
            figures[name] = min(seconds, figures.get(name, seconds))
    return figures


def rank(result: str, steps: int, threads: int) -> None:
    """Run as one of the workers; worker 0 writes."""
    import tensorflow as tf

    if threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
    figures = {}
    for name, synchronized in (("step/tensorflow", True), ("step/tensorflow, unsynchronized", False)):
        seconds, processor = _timed(tf, strategy, synchronized, steps, index)
        figures[name] = sorted(seconds)[len(seconds) // 4]
        figures[f"{name}, CPU"] = processor
    if index == 0:
        write(result, figures)


def _timed(tf: Any, strategy: Any, synchronized: bool, steps: int, seed: int) -> tuple[list[float], float]:
    x, dy = (tf.random.stateless_normal(SHAPE, [seed, number]) for number in range(2))
    with strategy.scope():
        layers = [tf.keras.layers.BatchNormalization(synchronized=synchronized) for _ in range(LAYERS)]
        for layer in layers:
            layer.build(SHAPE)

    def replica(x: Any, dy: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = x
            for layer in layers:
                y = layer(y, training=True)
        weights = [weight.value for layer in layers for weight in layer.trainable_weights]
        return tape.gradient(y, [x, *weights], output_gradients=dy)

    @tf.function
    def step() -> Any:
        return strategy.run(replica, (x, dy))

    seconds, processor = [], 0.0
    for number in range(_WARM + steps):
        if number == _WARM:
            processor = time.process_time()
        start = time.perf_counter()
        gradients = step()
        gradients[0].numpy()
        seconds.append(time.perf_counter() - start)
    return seconds[_WARM:], (time.process_time() - processor) / steps


if __name__ == "__main__":
    rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
