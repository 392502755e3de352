"""The programs of the Keras and JAX pages train on two ranks."""

import re
from pathlib import Path

import pytest

from support.framework_jobs import launch

pytestmark = [pytest.mark.rpc, pytest.mark.slow, pytest.mark.timeout(480)]

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(("program", "backend"), [("keras_digits.py", "torch"), ("jax_digits.py", "jax")])
def test_an_example_trains_on_two_ranks(program: str, backend: str) -> None:
    """Rank 0 says how many of the test rows it knows."""
    ended = launch(2, EXAMPLES / program, environ={"KERAS_BACKEND": backend})
    assert ended.code == 0, ended.err
    line = re.fullmatch(rf"\[0\] {backend}, 2 rank\(s\): ([0-9.]+)% of the test rows\n", ended.out)
    assert line is not None, ended.out
    assert float(line[1]) > 94
