"""What holds for every test of this tree.

1. The header names the MPI whose `mpiexec` this environment brings: one suite passes under several.
2. A skipped test fails the run, unless `allowed-skips.txt` names it: a missing tool is no success.
3. Property tests draw the same examples in every run, and none of them looks at the clock.
4. Files that take long come first: side by side, the last one is not left alone.
"""

import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest

from support.fault.seed import SEED

_ALLOWED = Path(__file__).with_name("allowed-skips.txt")
# By how long each takes. A file that is not here comes after those that are.
_LONGEST = (
    "packaging/test_wheel.py",
    "rpc/test_outages.py",
    "rpc/test_launch_endings.py",
    "mpi/test_launch_endings.py",
    "rpc/test_resume.py",
    "rpc/test_elastic.py",
    "mpi/test_contract.py",
    "mpi/test_elastic.py",
    "rpc/test_elastic_hosts.py",
    "mpi/test_train_resume.py",
    "mpi/test_endings.py",
    "rpc/test_train.py",
    "rpc/test_train_data.py",
    "deploy/test_slurm.py",
    "rpc/test_contract.py",
    "rpc/test_daemon.py",
    "rpc/test_launch.py",
    "rpc/test_limits.py",
    "rpc/test_durability.py",
    "adapters/test_keras_ranks.py",
    "adapters/test_torch.py",
    "adapters/test_keras_own_tests.py",
    "adapters/test_torch_examples.py",
    "adapters/test_jax_ranks.py",
    "adapters/test_examples.py",
)
# What starts nothing is in folders of its own: runs of all else need not collect it.
_PURE = {Path(__file__).parent / "unit", Path(__file__).parent / "scenarios"}
_WIRED = ("rpc", "mpi", "fault", "slow", "soak")
_VENDORS = {"Open MPI": "Open MPI", "HYDRA": "MPICH"}

# An example may take as long as a busy machine needs: a hang is what pytest's timeout is for. New examples, to look for
# more: pytest --hypothesis-profile=explore.
_UNTIMED = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("same", _UNTIMED, derandomize=True)
hypothesis.settings.register_profile("explore", _UNTIMED, derandomize=False, print_blob=True)
hypothesis.settings.load_profile("same")


def pytest_configure() -> None:
    """A shell without job control lets commands behind & ignore SIGINT, and so would all that the tests send it to."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the tests of the files that take longest to the front; and let none with a marker be where nobody looks."""
    for item in items:
        if not _PURE.isdisjoint(item.path.parents) and any(map(item.get_closest_marker, _WIRED)):
            raise pytest.UsageError(f"{item.nodeid}: its markers keep it out of every run. Move it to another folder.")
    positions = {Path(__file__).parent / name: position for position, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: positions.get(item.path, len(positions)))


def pytest_report_header() -> list[str]:
    """Name the MPI of this environment, the skips that are allowed, and the seed of the fault tests."""
    skips = ", ".join(_allowed_skips()) or "none"
    return [f"mpi: {_mpi()}", f"allowed skips: {skips}", f"fault seed: {SEED} (another one: FAULT_SEED=)"]


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turn a run with a skip that nobody allowed into a failed one."""
    if _forbidden_skips(session.config) and session.exitstatus in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say which skips made the run fail, and what to do."""
    for node_id in _forbidden_skips(config):
        terminalreporter.write_line(
            f"FORBIDDEN SKIP {node_id}: provide what it needs, or add it to tests/{_ALLOWED.name}", red=True
        )


def _forbidden_skips(config: pytest.Config) -> list[str]:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if isinstance(reporter, pytest.TerminalReporter) else []
    allowed = tuple(_allowed_skips())
    return [report.nodeid for report in skipped if not report.nodeid.startswith(allowed)]


def _allowed_skips() -> list[str]:
    lines = (line.strip() for line in _ALLOWED.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _mpi() -> str:
    mpiexec = Path(sys.prefix, "bin", "mpiexec")
    if not mpiexec.exists():
        return f"none beside {sys.executable}"
    answer = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=200, check=True).stdout
    vendor = next((name for sign, name in _VENDORS.items() if sign in answer), "unknown vendor")
    version = next((word for word in answer.split() if word[0].isdigit()), "unknown version")
    return f"{vendor} {version} ({mpiexec})"
