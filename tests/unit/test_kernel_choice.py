"""Which kernels are chosen, and what is said when it is not those that one would want."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from bnlayer import BatchNormalization
from bnlayer.dtypes import dtype_named
from bnlayer.grid import Grid
from bnlayer.kernels import compiled, kernels, reference
from bnlayer.kernels.choice import VARIANTS
from bnlayer.kernels.choice import chosen as choose
from bnlayer.kernels.compiled import Compiled, all_variants, variants
from bnlayer.kernels.results import Record


def test_the_widest_variant_is_the_default(chosen: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Which one it is is said at debug level."""
    chosen.delenv("BNLAYER_KERNELS", raising=False)
    with caplog.at_level(logging.DEBUG, logger="bnlayer.kernels"):
        assert kernels().name == f"compiled ({variants()[0]})"
    assert caplog.messages == [f"kernels: {variants()[0]}"]


@pytest.mark.parametrize("name", [*variants(), "reference"])
def test_a_variable_forces_one(chosen: pytest.MonkeyPatch, name: str) -> None:
    """Each that this processor runs, and the reference."""
    chosen.setenv("BNLAYER_KERNELS", name)
    made = kernels()
    assert made is reference if name == "reference" else made.name == f"compiled ({name})"


def test_an_invalid_name(chosen: pytest.MonkeyPatch) -> None:
    """The error says what was expected."""
    chosen.setenv("BNLAYER_KERNELS", "fast")
    with pytest.raises(ValueError) as refused:
        kernels()
    assert str(refused.value) == (
        "BNLAYER_KERNELS: expected one of 'reference', 'avx512', 'avx2', 'neon', 'baseline', received 'fast'."
    )


def test_a_variant_that_this_processor_does_not_run(chosen: pytest.MonkeyPatch) -> None:
    """It would end with an illegal instruction; that of another kind of processor is not in the module at all."""
    chosen.setattr(compiled, "variants", lambda: ["baseline"])
    for name in VARIANTS[:-1]:
        chosen.setenv("BNLAYER_KERNELS", name)
        choose.cache_clear()
        why = "does not have it" if name in all_variants() else "is of another kind"
        with pytest.raises(ValueError) as refused:
            kernels()
        assert str(refused.value) == (
            f"BNLAYER_KERNELS={name}: this processor {why}; it runs baseline. Leave the variable unset for the widest "
            "of them."
        )


_WITHOUT_MODULE = """
import sys
sys.modules["bnlayer.kernels._native"] = None
import logging
logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
from bnlayer import BatchNormalization
from bnlayer.dtypes import dtype_named
from bnlayer.grid import Grid
import numpy as np
layers = [BatchNormalization() for _ in range(2)]
y = [layer(np.ones((4, 2)), training=True) for layer in layers]
from bnlayer.kernels import kernels
print(kernels().name)
"""


def _without_module(**environ: str) -> subprocess.CompletedProcess[str]:
    """A process that can't load the extension module."""
    inherited = {name: value for name, value in os.environ.items() if name != "BNLAYER_KERNELS"}
    command = [sys.executable, "-c", _WITHOUT_MODULE]
    return subprocess.run(command, capture_output=True, text=True, env=inherited | environ, timeout=200, check=False)


def test_without_the_module_the_reference_serves_with_one_warning() -> None:
    """A step is many times slower then: whoever waits for it is told why, once."""
    done = _without_module()
    assert done.stdout == "reference (NumPy)\n", done.stderr
    warning, nothing = done.stderr.split("\n")
    assert nothing == ""
    assert warning.startswith("WARNING the compiled kernels can't be loaded (")
    assert "pip install --no-binary bnlayer bnlayer" in warning
    wanted = _without_module(BNLAYER_KERNELS="reference")
    assert (wanted.stdout, wanted.stderr) == ("reference (NumPy)\n", "")


def test_without_the_module_a_variant_that_is_asked_for_is_an_error() -> None:
    """Nobody who asks for one wants to wait for another."""
    done = _without_module(BNLAYER_KERNELS="baseline")
    assert done.returncode == 1
    assert "ImportError: BNLAYER_KERNELS=baseline needs the extension module bnlayer.kernels._native (" in done.stderr


@pytest.mark.parametrize("variant", variants())
def test_passes_of_several_threads_at_once(variant: str) -> None:
    """Each has its own workspace; who finds the pool busy goes alone."""
    x = np.random.default_rng(0).normal(size=(4, 5000, 24, 1)).astype(np.float32)
    grid = reference_grid(x[0])
    wanted = [reference.moments(part, None, grid).tobytes() for part in x]
    made: list[list[bytes]] = [[] for _ in x]
    start = threading.Barrier(len(x))

    def work(number: int) -> None:
        kernel_set = Compiled(variant, threads=3, worth=1000)
        start.wait()
        made[number] = [kernel_set.moments(x[number], None, grid).tobytes() for _ in range(20)]

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(x))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert made == [[limbs] * 20 for limbs in wanted]


def reference_grid(x: np.ndarray) -> Grid:
    """A grid that a batch fits."""
    unknown = Grid.unknown("float32", x.shape[1])
    return unknown.probed(reference.probe(x, None, unknown), np.ones(x.shape[1], bool))


def test_arrays_that_a_kernel_does_not_take_are_refused() -> None:
    """By the module itself, before anything is read or written: of another size, dtype or form."""
    from bnlayer.kernels import _native

    x, vector = np.zeros((8, 4, 1), np.float32), np.zeros(4)
    exponent, limbs = np.zeros(4, np.int64), np.zeros((6, 4), np.int64)
    sound = (0, 1, 1, x, None, vector, exponent, limbs)
    _native.moments(*sound)
    for at, wrong, error in (
        (0, 9, ValueError),
        (1, "one", TypeError),
        (3, x[:, :, 0], ValueError),
        (3, x.astype(np.int32), TypeError),
        (3, np.asfortranarray(np.zeros((8, 4, 2), np.float32)), (ValueError, BufferError)),
        (4, np.ones((8, 3, 1), bool), ValueError),
        (4, np.ones((8, 1, 2), bool), ValueError),
        (5, vector[:3], ValueError),
        (5, vector.astype(np.float32), TypeError),
        (6, exponent.astype(np.int32), TypeError),
        (7, limbs[:5], ValueError),
        (7, np.frombuffer(limbs.tobytes(), np.int64).reshape(6, 4), (ValueError, BufferError)),
    ):
        arguments: list[Any] = [*sound]
        arguments[at] = wrong
        with pytest.raises(error):
            _native.moments(*arguments)
    between = np.frombuffer(b"." + bytes(32), np.uint8)[1:].view(np.float64)
    pivots: list[tuple[Any, str]] = [(vector.astype(np.float32), "'f'"), (between, "'d' that is not aligned")]
    for pivot, received in pivots:
        with pytest.raises(
            TypeError, match=f"pivot: expected an aligned array of float64, received one of format {received}"
        ):
            _native.moments(*sound[:5], pivot, *sound[6:])
    with pytest.raises(TypeError, match="expected 8 arguments, received 1"):
        _native.moments(0)  # type: ignore[call-arg]  # on purpose


def test_a_call_by_addresses_takes_no_null_and_no_wrong_size() -> None:
    """Nothing is read or written where an address is null, an array short, or the moving statistics are others."""
    native: Any = sys.modules["bnlayer.kernels._native"]

    x, vectors = np.ones((8, 4), np.float32), np.ones((4, 4), np.float32)
    y, dx = np.full((2, 8, 4), 7, np.float32)
    before, record = Record.of_moving(vectors[2], vectors[3]).memory, Record.empty(4).memory
    calls = np.zeros(1, np.int64)
    addresses = [vector.ctypes.data for vector in (*vectors, calls)]
    exponents = np.full(4, 3, np.int64)
    sound: list[Any] = [
        0,
        1,
        1,
        8,
        4,
        1,
        x.ctypes.data,
        y.ctypes.data,
        True,
        *addresses,
        np.zeros(4),
        exponents,
        1e-3,
        0.9,
        False,
    ]
    sound += [before, record]
    back: list[Any] = [
        0,
        1,
        1,
        8,
        4,
        1,
        x.ctypes.data,
        x.ctypes.data,
        dx.ctypes.data,
        *addresses[:2],
        record,
        exponents,
        exponents,
    ]
    back += [-148, 130]
    nothing: set[int] = set()
    for function, arguments, optional in ((native.forward_at, sound, nothing), (native.backward_at, back, {9, 10})):
        for at, value in enumerate(arguments):
            wrong = [*arguments]
            if isinstance(value, int) and value > 2**16 and at not in optional:
                wrong[at] = 0
                assert function(*wrong) is False, at
                wrong[at] = None
                with pytest.raises(TypeError):
                    function(*wrong)
            elif isinstance(value, np.ndarray):
                for other in (value[:-1], value.astype(np.float16)):
                    wrong[at] = other
                    with pytest.raises((TypeError, ValueError)):
                        function(*wrong)
        with pytest.raises(TypeError, match=f"expected {len(arguments)} arguments, received 1"):
            function(0)
    wrong = [*sound]
    wrong[-2] = Record.of_moving(vectors[2], vectors[3] * 2).memory
    assert native.forward_at(*wrong) is False
    assert set(y.ravel()) | set(dx.ravel()) == {7}, "something was written"
    assert vectors.tolist() == np.ones((4, 4)).tolist()
    assert native.forward_at(*sound) is True
    assert native.backward_at(*back) is True
    assert y.tolist() == np.ones((8, 4)).tolist()  # (1 − 1)·γs + β
    assert calls.tolist() == [1]
    assert vectors[2:].tolist() == [[1.0] * 4, [np.float32(0.9)] * 4]


def test_a_call_of_a_world_of_one_takes_no_wrong_array() -> None:
    """Of another size or dtype, or float64, which has two folds: before anything is read or written."""
    native: Any = sys.modules["bnlayer.kernels._native"]

    x, ones, exponents = np.ones((8, 4, 1), np.float32), np.ones(4, np.float32), np.full(4, 3, np.int64)
    y, dx = np.full((2, 8, 4), 7, np.float32)
    new, record = np.full((4, 4), 7, np.float32), Record.of_moving(ones, ones).memory
    sound: list[Any] = [0, 1, 1, x, np.zeros(4), exponents, 1e-3, ones, ones, ones, ones, 0.9, False, False]
    sound += [new[0], new[1], record, y]
    back: list[Any] = [0, 1, 1, x, y, None, native.sample(x), record, exponents, exponents, -148, 130]
    back += [new[2], new[3], dx]
    for function, arguments in ((native.train_alone, sound), (native.pull_alone, back)):
        for at, value in enumerate(arguments):
            if isinstance(value, np.ndarray):
                for other in (value[:-1], value.astype(np.float64 if value.dtype == np.float32 else np.float32)):
                    wrong = [*arguments]
                    wrong[at] = other
                    with pytest.raises((TypeError, ValueError)):
                        function(*wrong)
        with pytest.raises(TypeError, match=f"expected {len(arguments)} arguments, received 1"):
            function(0)
        wrong = [each.astype(float) if each is x or each is y or each is dx else each for each in arguments]
        with pytest.raises(TypeError, match="float64 batches have two folds"):
            function(*wrong)
    assert set(y.ravel()) | set(dx.ravel()) | set(new.ravel()) == {7}, "something was written"
    assert native.train_alone(*sound) == x.tobytes()
    assert y.tolist() == np.ones((8, 4)).tolist()  # (1 − 1)·γs + β
    written = [*back]
    written[6] = native.sample(x * 2)
    assert native.pull_alone(*written) is True
    assert set(dx.ravel()) == {7}, "something was written"
    assert native.pull_alone(*back) is False
    assert new[2:].tolist() == [[0.0] * 4, [8.0] * 4]
    with pytest.raises(TypeError, match="x: expected an aligned array"):
        native.sample(x.astype(np.int8))


@pytest.mark.parametrize("size", [0, 1, 63, 64, 65, 127, 128, 129, 1000, 4097])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_both_kernel_sets_take_the_same_sample(size: int, dtype: str) -> None:
    """Of an array in one piece or not."""
    x = np.arange(size).astype(dtype_named(dtype)).reshape(1, size, 1)
    wide = np.repeat(x, 2, axis=1)[:, ::2]
    samples = {set_of.sample(array) for set_of in (reference, Compiled(variants()[-1])) for array in (x, wide)}
    assert len(samples) == 1
    assert len(samples.pop()) // x.itemsize in range(min(size, 43), 128)


def test_a_batch_that_is_not_aligned_or_not_in_one_piece_is_taken() -> None:
    """As a user's memory-mapped file or slice may have it; read-only too."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 9)).astype(np.float32)
    room = np.zeros(x.nbytes + 1, np.uint8)
    shifted = room[1:].view(np.float32).reshape(x.shape)
    shifted[:] = x
    wide = np.zeros((40, 18), np.float32)
    wide[:, ::2] = x
    fixed = x.copy()
    fixed.flags.writeable = False
    wanted = BatchNormalization()(x, training=True).tobytes()
    for other in (shifted, wide[:, ::2], fixed, x.astype(">f4"), np.asfortranarray(x)):
        assert BatchNormalization()(other, training=True).tobytes() == wanted
