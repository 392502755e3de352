"""Which kernels a process has, and how it comes by them: chosen, missing, compiled, for this processor or another."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bnlayer
from bnlayer.grid import Grid
from bnlayer.kernels import kernels, reference
from bnlayer.kernels.compiled import forward
from bnlayer.kernels.compiled import kernels as compiled


def test_the_compiled_kernels_are_the_default(chosen: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where there is a Numba; which ones they are is said at debug level."""
    chosen.delenv("BNLAYER_KERNELS", raising=False)
    with caplog.at_level(logging.DEBUG, "bnlayer.kernels"):
        assert kernels() is compiled
    assert caplog.messages == ["kernels: compiled"]


@pytest.mark.parametrize(("name", "wanted"), [("reference", reference), ("compiled", compiled)])
def test_the_environment_chooses(chosen: pytest.MonkeyPatch, name: str, wanted: object) -> None:
    """By name."""
    chosen.setenv("BNLAYER_KERNELS", name)
    assert kernels() is wanted


def test_an_unknown_kernel_set_is_refused(chosen: pytest.MonkeyPatch) -> None:
    """With the names there are."""
    chosen.setenv("BNLAYER_KERNELS", "fast")
    with pytest.raises(ValueError, match="expected 'compiled' or 'reference', received 'fast'"):
        kernels()


WITHOUT_NUMBA = """
import logging, sys
sys.modules["numba"] = None
logging.basicConfig(level=logging.INFO)
from bnlayer.kernels import kernels
print(kernels().__name__)
"""


def without_numba(**environ: str) -> subprocess.CompletedProcess[str]:
    """Choose the kernels where there is no Numba."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_NUMBA], capture_output=True, text=True, env=environ, timeout=200, check=False
    )


def test_without_numba_the_reference_serves() -> None:
    """One line says how to get the fast ones."""
    done = without_numba()
    assert done.stdout == "bnlayer.kernels.reference\n", done.stderr
    assert done.stderr.count("\n") == 1
    assert "pip install 'bnlayer[fast]' brings those that are five times faster" in done.stderr


def test_asking_for_what_is_not_there_is_an_error() -> None:
    """Rather than something slower in silence."""
    done = without_numba(BNLAYER_KERNELS="compiled")
    assert done.returncode == 1
    assert "ImportError: BNLAYER_KERNELS=compiled needs Numba: pip install 'bnlayer[fast]'" in done.stderr


NO_CACHE = """
import logging
from numba.core import caching
caching.CacheImpl._locator_classes = []  # no folder can be written to
logging.basicConfig()
import numpy as np
from bnlayer.kernels.compiled import kernels as compiled
from bnlayer.layer import BatchNormalization
from bnlayer.precision import precision_of
from bnlayer.limbs import as_ints
x = np.ones((16, 8, 1), np.float32)
one = x[0, :, 0]
print(compiled.normalize(x, one, one, one, one < 0).sum())
"""


def test_without_a_folder_for_the_cache_the_kernels_are_compiled_anew() -> None:
    """A read-only home is no reason to fail."""
    done = subprocess.run([sys.executable, "-c", NO_CACHE], capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout == "128.0\n", done.stderr


def test_read_only_data_need_no_kernels_of_their_own() -> None:
    """A memory-mapped batch, or one from another framework, would else be waited for seconds."""
    x = np.arange(96, dtype=np.float32).reshape(6, 16, 1)
    grid = Grid.unknown("float32", 16).probed(compiled.probe(x, None, Grid.unknown("float32", 16)), np.ones(16, bool))
    compiled.moments(x, None, grid)
    before = len(forward.moments_of_rows.signatures)  # type: ignore[attr-defined]  # Numba's
    x.flags.writeable = False
    compiled.moments(x, None, grid)
    assert len(forward.moments_of_rows.signatures) == before  # type: ignore[attr-defined]  # Numba's


TWO_THREADS = """
import threading, numpy as np
from bnlayer import BatchNormalization
x = np.arange(4096, dtype=np.float32).reshape(64, 64)
made = [None, None]
start = threading.Barrier(2)
def step(number):
    start.wait()
    made[number] = BatchNormalization()(x, training=True).tobytes()
threads = [threading.Thread(target=step, args=(number,)) for number in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(made[0] is not None and made[0] == made[1])
"""


@pytest.mark.timeout(600)  # kernels are compiled
def test_two_threads_may_make_the_first_call_at_once(tmp_path: Path) -> None:
    """Both find the kernels not compiled yet; nothing is compiled wrongly, and nobody waits for ever."""
    done = subprocess.run(
        [sys.executable, "-c", TWO_THREADS],
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
        timeout=500,
        check=False,
    )
    assert done.stdout == "True\n", done.stderr
    # Said once, by whoever came first.
    assert done.stderr.count("compiling the kernels for this machine; it takes some seconds, once") == 1


# Of such deviations, 0.5 + n·2^-31, some have squares that rounded twice would be rounded to another side.
WITHOUT_FUSED = """
import numpy as np
from bnlayer.grid import Grid
from bnlayer.kernels import reference
from bnlayer.kernels.compiled import kernels as compiled
x = (np.arange(2**18).reshape(-1, 64, 1) * 2.0**-31).astype(np.float32)
grid = Grid("float32", np.full(64, -0.5), np.zeros(64, np.int64), True)
print((compiled.moments(x, None, grid).limbs == reference.moments(x, None, grid).limbs).all())
"""


@pytest.mark.timeout(600)  # kernels are compiled
def test_a_processor_without_fused_operations_gives_the_same_bits(tmp_path: Path) -> None:
    """The C library rounds once as well; a product and a sum would round twice."""
    target = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_FUSED],
        capture_output=True,
        text=True,
        env={**os.environ, **target},
        timeout=500,
        check=False,
    )
    assert done.stdout == "True\n", done.stderr


_COMPARED = """
import numpy as np
from bnlayer.grid import Grid
from bnlayer.kernels import reference
from bnlayer.kernels.compiled import kernels as compiled
x = np.random.default_rng(0).normal(size=(16, 64, 1)).astype(np.float32)
grid = Grid("float32", np.zeros(64), np.full(64, 8), True)
print((compiled.moments(x, None, grid).limbs == reference.moments(x, None, grid).limbs).all())
"""


@pytest.mark.timeout(600)  # kernels are compiled
def test_machine_code_of_another_release_is_not_used(tmp_path: Path) -> None:
    """Numba looks at a kernel's own file alone: after a change in another one it went on with the old machine code."""
    package = tmp_path / "bnlayer"
    shutil.copytree(Path(bnlayer.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def same() -> str:
        command = [sys.executable, "-B", "-c", _COMPARED]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=280)
        return done.stdout.strip()

    assert same() == "True"
    release = package / "precision.py"
    text = release.read_text(encoding="utf-8")
    changed = text.replace(" slack=5,", " slack=4,")
    assert changed != text
    release.write_text(changed, encoding="utf-8")
    assert same() == "True"
