"""The layer beside real Keras: forward, state and texts on its NumPy backend, gradients from JAX in float64."""

import jax
import keras
import pytest

_VERSION, _BACKEND = "3.15.1", "numpy"

jax.config.update("jax_enable_x64", True)


def pytest_configure(config: pytest.Config) -> None:
    """Keras's variables convert as NumPy 1 asked; what we are strict about is ours."""
    config.addinivalue_line("filterwarnings", "ignore:__array__ implementation doesn't accept:DeprecationWarning")


def pytest_report_header() -> str:
    """Name what is compared with."""
    return f"keras: {keras.__version__} ({keras.backend.backend()}), jax {jax.__version__}"


def pytest_sessionstart() -> None:
    """Another Keras is another oracle."""
    expected, installed = (_VERSION, _BACKEND), (keras.__version__, keras.backend.backend())
    if installed != expected:
        raise pytest.UsageError(f"Expected Keras {expected}, found {installed}. Run these tests with: make test-keras")
