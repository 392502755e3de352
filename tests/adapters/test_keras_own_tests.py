"""Keras's own tests of its layer, as its package ships them, with ours in its place and synchronized by default."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest

from support.adapters import run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

TESTS = "layers/normalization/batch_normalization_test.py"
CONFTEST = """
import pytest
from keras.src import layers
from bnlayer.adapters import keras

CALLS = []

class Counted(keras.HostLayer):
    def forward(self, *arguments):
        CALLS.append(self.name)
        return super().forward(*arguments)

keras.HostLayer = Counted
keras.BatchNormalization.__init__.__kwdefaults__["synchronized"] = True
layers.BatchNormalization = keras.BatchNormalization

def pytest_configure(config):
    config.addinivalue_line("markers", "requires_trainable_backend: of Keras")

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"synchronized calls: {len(CALLS)}")
"""


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_keras_own_tests_pass(backend: str, tmp_path: Path) -> None:
    """All 33, none skipped; and it is our layer that they call."""
    spec = importlib.util.find_spec("keras")
    assert spec is not None
    assert spec.origin is not None
    shutil.copy(Path(spec.origin).parent / "src" / TESTS, tmp_path / "test_of_keras.py")
    (tmp_path / "conftest.py").write_text(CONFTEST, encoding="utf-8")
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        tmp_path,
    ]
    ended = run(command, environ={"KERAS_BACKEND": backend}, limit_s=400)
    assert re.search(r"^33 passed(?!.*(skipped|failed|xfailed|deselected))", ended.out, re.MULTILINE), ended.out
    calls = re.search(r"synchronized calls: (\d+)", ended.out)
    assert calls is not None
    assert int(calls[1]) > 100
