"""The flag that rewrites the expected part of the scenarios; review what it wrote as a diff."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the flag: it is known where this folder is named, as in `pytest tests/scenarios`."""
    parser.addoption(
        "--rewrite-scenarios", action="store_true", help="write what happens into the scenarios, instead of comparing"
    )
