"""The ten layers of `steps_tensorflow` as layers of the Keras adapter, on TensorFlow: two ranks over the service.

    python -m benchmarks.steps_keras                                both, one after the other, three times: a table
    python -m benchmarks.steps_keras RESULT.json STEPS THREADS      as one of the ranks; THREADS 0: TensorFlow's choice

The interpreter needs TensorFlow, Keras and this project. The step is the same on both sides: one `tf.function`, ten
layers forward, the gradients of the input, the gammas and the betas back. Figures: step/keras, in seconds, the better
of one thread a process and TensorFlow's own choice; step/keras, CPU, the processor time of a rank's threads, which a
busy machine hardly changes.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from benchmarks import steps_tensorflow
from benchmarks.processes import over_service, write
from benchmarks.steps_tensorflow import LAYERS, SHAPE

_WARM = 5
_REPETITIONS, _STEPS = 3, 15


def measure(steps: int) -> dict[str, float]:
    """Two ranks, with one thread each and with TensorFlow's choice; the better one counts."""
    runs = [over_service(2, "benchmarks.steps_keras", str(steps), str(threads), limit_s=400) for threads in (1, 0)]
    return {name: min(each[name] for each in runs) for name in runs[0]}


def rank(result: str, steps: int, threads: int) -> None:
    """Run as one of the ranks; rank 0 writes."""
    import os

    os.environ |= {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    import tensorflow as tf

    import bnworker
    from bnlayer.adapters.keras import BatchNormalization

    if threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    with bnworker.join() as world:
        x, dy = (tf.random.stateless_normal(SHAPE, [world.rank, number]) for number in range(2))
        layers = [BatchNormalization(synchronized=True, name=f"bn{number}") for number in range(LAYERS)]
        for layer in layers:
            layer.build(SHAPE)

        @tf.function
        def step(x: Any, dy: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = x
                for layer in layers:
                    y = layer(y, training=True)
            weights = [weight.value for layer in layers for weight in layer.trainable_weights]
            return tape.gradient(y, [x, *weights], output_gradients=dy)

        seconds, processor = [], 0.0
        for number in range(_WARM + steps):
            if number == _WARM:
                processor = time.process_time()
            start = time.perf_counter()
            step(x, dy)[0].numpy()
            seconds.append(time.perf_counter() - start)
        if world.rank == 0:
            figures = {"step/keras": sorted(seconds[_WARM:])[steps // 4]}
            write(result, figures | {"step/keras, CPU": (time.process_time() - processor) / steps})


def table() -> None:
    """Both, in turn, so that the machine's load falls on both alike."""
    print("| round | figure | MultiWorkerMirroredStrategy | adapter | ratio |\n|---|---|---|---|---|")
    for number in range(_REPETITIONS):
        theirs, ours = steps_tensorflow.measure(sys.executable, _STEPS), measure(_STEPS)
        for figure, suffix in (("a step", ""), ("processor time of a rank", ", CPU")):
            a, b = theirs[f"step/tensorflow{suffix}"], ours[f"step/keras{suffix}"]
            print(f"| {number + 1} | {figure} | {1e3 * a:.0f} ms | {1e3 * b:.0f} ms | {a / b:.1f} |", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        table()
    else:
        rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
