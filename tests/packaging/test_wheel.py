"""The wheel as a user gets it: built, and installed in an environment that has nothing of ours.

Bare `server` or `worker` in site-packages would overwrite, and on removal delete, other people's files, so
the top-level names are counted.
"""

import json
import os
import re
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

_ROOT = Path(__file__).parents[2]
_PACKAGES = {"bnlayer", "bnserver", "bnworker", "bnproto"}


@dataclass(frozen=True)
class Installed:
    """What an environment knows of the distribution in it."""

    files: list[str]
    scripts: dict[str, str]
    license: str
    python: str


# The fields of `Installed`, as the fresh environment gives them.
_INSPECT = """
import importlib.metadata as metadata, json
distribution = metadata.distribution("bnlayer")
print(json.dumps({
    "files": [str(path) for path in distribution.files],
    "scripts": {entry.name: entry.value for entry in distribution.entry_points.select(group="console_scripts")},
    "license": distribution.metadata["License-Expression"],
    "python": distribution.metadata["Requires-Python"],
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout's source distribution: which then holds all that building takes."""
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-c", f"import scikit_build_core.build as b; b.build_sdist({str(folder)!r})", cwd=_ROOT)
    (source,) = folder.glob("*.tar.gz")
    # Unoptimized, in a fifth of the time: what is in it is looked at, not how fast it is.
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0\n', encoding="utf-8")
    compiler.chmod(0o755)
    options = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    # Beside tests that look at the clock: in the time that they leave.
    _run("nice", "-n10", *_PIP, "wheel", *options, source, CXX=str(compiler))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """A fresh environment that holds the wheel, without its dependencies."""
    environment = wheel.parent / "bare"
    venv.create(environment, with_pip=False)
    _run(*_PIP, "--python", environment / "bin/python", "install", "--no-deps", wheel)
    return environment


@pytest.fixture(scope="module")
def installed(site: Path) -> Installed:
    """What that environment knows of the distribution."""
    return Installed(**json.loads(_run(site / "bin/python", "-c", _INSPECT)))


def test_exactly_four_top_level_names(installed: Installed) -> None:
    """Nothing else of ours is importable: no tests, no bare `server` or `worker`."""
    tops = {Path(name).parts[0] for name in installed.files if not name.startswith("..")}
    assert {top for top in tops if not top.endswith(".dist-info")} == _PACKAGES


def test_the_packages_are_imported_from_where_they_were_installed(site: Path) -> None:
    """The fresh environment imports the wheel's files, not this checkout's."""
    code = f"import importlib.util as u; print([u.find_spec(n).origin for n in {sorted(_PACKAGES)}])"
    origins = _run(site / "bin/python", "-c", code)
    assert origins.count(str(site)) == len(_PACKAGES), origins


def test_each_package_is_typed(installed: Installed) -> None:
    """Users' type checkers read our annotations."""
    assert {name for name in installed.files if name.endswith("py.typed")} == {
        f"{package}/py.typed" for package in _PACKAGES
    }


def test_the_protocol_travels_with_its_stubs(installed: Installed) -> None:
    """The .proto file, its code and its types are in the wheel: other languages need the first."""
    endings = {name.split("/v1/")[1] for name in installed.files if name.startswith("bnproto/v1/")}
    assert {
        "statistics.proto",
        "statistics_pb2.py",
        "statistics_pb2.pyi",
        "statistics_pb2_grpc.py",
    } <= endings


def test_the_command_line_is_installed(site: Path, installed: Installed) -> None:
    """`bnlayer` is on the user's PATH."""
    assert installed.scripts == {"bnlayer": "bnworker.cli:main"}
    assert os.access(site / "bin/bnlayer", os.X_OK)


def test_the_metadata_names_license_and_python(installed: Installed) -> None:
    """What an installer and a lawyer read first."""
    assert (installed.license, installed.python) == ("Apache-2.0", ">=3.11")
    assert any(name.endswith("licenses/LICENSE") for name in installed.files)


def test_one_wheel_for_every_python(wheel: Path, installed: Installed) -> None:
    """The stable ABI: the one binary is named after it, and no source of it is installed."""
    assert "-cp311-abi3-" in wheel.name
    assert [name for name in installed.files if name.endswith(".so")] == ["bnlayer/kernels/_native.abi3.so"]
    assert not [name for name in installed.files if name.endswith((".cpp", ".hpp", "CMakeLists.txt"))]


def test_the_variants_share_no_function() -> None:
    """A function that the linker merges between variants may run AVX-512 on a processor that has none."""
    objects = sorted((_ROOT / "build/native/CMakeFiles").glob("kernels_*.dir/**/*.o"))
    assert objects, "make setup builds them"
    for object_file in objects:
        variant = next(part for part in object_file.parts if part.startswith("kernels_"))[8:-4]
        symbols = _run("nm", "--demangle", "--defined-only", object_file).splitlines()
        shared = [
            symbol for symbol in symbols if re.match(r"\S+ [WVu] ", symbol) and f"bnlayer::{variant}::" not in symbol
        ]
        assert shared == [], object_file


def test_it_runs_on_the_locked_dependencies_alone(wheel: Path) -> None:
    """What locks/runtime.lock brings, and the container image installs, is all that is needed."""
    environment = wheel.parent / "runtime"
    venv.create(environment, with_pip=False)
    python = environment / "bin/python"
    locked = ("install", "--require-hashes", "-r", _ROOT / "locks/runtime.lock")
    uv = (
        Path(sys.executable).with_name("uv"),
        "pip",
        *locked,
        "--quiet",
        "--offline",
        "--no-config",
        "--python",
        python,
    )
    if subprocess.run(uv, capture_output=True, check=False).returncode:  # what `make setup` downloaded is not kept here
        _run(*_PIP, "--python", python, *locked)
    _run(*_PIP, "--python", python, "install", "--no-deps", wheel)
    assert "train" in _run(environment / "bin/bnlayer", "--help")
    assert "--state-dir" in _run(python, "-m", "bnserver", "--help")


_PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def _run(*command: str | Path, cwd: str | Path = "/", **variables: str) -> str:
    """A command's stdout; its whole output if it fails."""
    # The checkout must not be found through the working directory or PYTHONPATH.
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | variables
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
