"""The files in deploy/ against the validators of their fields.

The validators come with the environment, except systemd-analyze, which is the system's. A missing one fails
the test. That each of them notices a mistake is tested beside it.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bnserver.configuration import resolve

_ROOT = Path(__file__).parents[2]
_DOCKERFILE = _ROOT / "deploy/docker/Dockerfile"
_MPIJOB_DOCKERFILE = _ROOT / "deploy/docker/Dockerfile.mpijob"
_UNIT = _ROOT / "deploy/systemd/bnlayer.service"
_SBATCH = _ROOT / "deploy/slurm/mpiexec.sbatch"
_BATCH_SCRIPTS = sorted((_ROOT / "deploy/slurm").glob("*.sbatch"))
_SHELL_SCRIPTS = (
    *_BATCH_SCRIPTS,
    *(
        _ROOT / name
        for name in (".ci/run", ".ci/system-tools", "wheels/build", "wheels/arm-python", "tests/deploy/image.sh")
    ),
)

# systemd-analyze rates from 0 (sealed) to 10 (open), here in tenths. Sockets alone make up most of our 1.3.
_EXPOSURE_TENTHS = 15


@pytest.mark.parametrize("path", [_DOCKERFILE, _MPIJOB_DOCKERFILE], ids=lambda path: path.name)
def test_the_dockerfiles_pass_hadolint(path: Path) -> None:
    """Unpinned bases, shell mistakes and late user switches do not enter the images."""
    assert _run(_tool("hadolint"), path) == ""


def test_hadolint_notices_a_mistake(tmp_path: Path) -> None:
    """The check above can fail."""
    broken = tmp_path / "Dockerfile"
    broken.write_text(_DOCKERFILE.read_text().replace("python:3.13-slim-bookworm AS", "python AS"))
    assert "DL3006" in _run(_tool("hadolint"), broken)


def test_the_image_gets_only_files_that_exist() -> None:
    """Every COPY from the repository names something that is there and that .dockerignore lets through."""
    ignore = _DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    admitted = {line[1:] for line in ignore if line.startswith("!")}
    copied = {
        source.rstrip("/")
        for line in _DOCKERFILE.read_text().splitlines()
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    }
    assert admitted == copied
    assert [name for name in sorted(copied) if not (_ROOT / name).exists()] == []


def test_the_mpijob_image_gets_only_files_that_exist() -> None:
    """Its context is the folder of the Dockerfiles; the worker's command names the configuration that is copied."""
    lines = [line.split() for line in _MPIJOB_DOCKERFILE.read_text().splitlines()]
    copied = {fields[1]: fields[2] for fields in lines if fields[:1] == ["COPY"]}
    assert [name for name in copied if not (_MPIJOB_DOCKERFILE.parent / name).exists()] == []
    worker = (_ROOT / "deploy/kubernetes/mpijob/mpijob.yaml").read_text()
    assert f"{copied['sshd_bnlayer.conf']}sshd_bnlayer.conf" in worker


def test_the_image_installs_with_hashes_as_a_user_without_rights() -> None:
    """Nothing unverified is installed, and the daemon does not run as root."""
    lines = [line.strip() for line in _DOCKERFILE.read_text().splitlines()]
    installs = [line for line in lines if "pip install" in line or "pip wheel" in line]
    built_here = ("--no-deps --no-build-isolation", "--no-deps /wheels/")
    assert all("--require-hashes" in line or any(ours in line for ours in built_here) for line in installs)
    assert len(installs) == 4
    assert [line for line in lines if line.startswith("USER ")] == ["USER 10001:10001"]


def test_the_unit_passes_systemd_analyze(tmp_path: Path) -> None:
    """No unknown key, no bad value. systemd-analyze exits 0 on unknown keys, so any output is a failure."""
    assert _run(_tool("systemd-analyze"), "verify", _installed(_UNIT.read_text(), tmp_path)) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("ProtectSystem=strict", "ProtectSystm=strict"),
        ("MemoryDenyWriteExecute=yes", "MemoryDenyWriteExecute=maybe"),
        ("TimeoutStopSec=15", "TimeoutStopSec=soon"),
        ("[Install]", "[Instal]"),
    ],
)
def test_systemd_analyze_notices_a_mistake(right: str, wrong: str, tmp_path: Path) -> None:
    """The check above can fail, for a key, a value and a section."""
    text = _UNIT.read_text()
    assert right in text
    assert _run(_tool("systemd-analyze"), "verify", _installed(text.replace(right, wrong), tmp_path)) != ""


def test_the_unit_stays_hardened(tmp_path: Path) -> None:
    """A unit that runs as root, or opens the system to the daemon in another way, is noticed."""
    rate = ["security", "--offline=yes", "--no-pager", f"--threshold={_EXPOSURE_TENTHS}"]
    unit = _installed(_UNIT.read_text(), tmp_path)
    hardened = subprocess.run([_tool("systemd-analyze"), *rate, unit], capture_output=True, check=False)
    assert hardened.returncode == 0, hardened.stdout.decode()

    unit = _installed(_UNIT.read_text().replace("DynamicUser=yes\n", ""), tmp_path)
    opened = subprocess.run([_tool("systemd-analyze"), *rate, unit], capture_output=True, check=False)
    assert opened.returncode != 0


def test_the_daemon_encrypts_and_asks_for_tokens_by_default() -> None:
    """In the image, whose variables say so, and in the unit, whose file does; and the service takes both."""
    lines = _DOCKERFILE.read_text().replace("\\\n", " ").splitlines()
    variables = dict(word.split("=", 1) for line in lines if line.startswith("ENV ") for word in line.split()[1:])
    assert [line for line in lines if line.startswith("CMD ")] == ['CMD ["serve"]']
    file = _UNIT.with_name("service.toml")
    for resolved in (resolve({}, variables, None), resolve({}, {}, (file, file.read_text()))):
        resolved.configuration.check()
        assert resolved.configuration.listen.startswith("0.0.0.0:")
        assert None not in (
            resolved.configuration.tls_cert,
            resolved.configuration.tls_key,
            resolved.configuration.tokens,
        )
        assert not resolved.configuration.insecure


@pytest.mark.parametrize("script", _SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_pass_bash_and_shellcheck(script: Path) -> None:
    """A batch script fails at once in review, not after an hour in the queue."""
    assert _run("bash", "-n", script) == ""
    assert _run(_tool("shellcheck"), script) == ""


def test_shellcheck_notices_a_mistake(tmp_path: Path) -> None:
    """The check above can fail."""
    broken = tmp_path / _SBATCH.name
    broken.write_text(_SBATCH.read_text().replace('"$SLURM_NTASKS"', "$SLURM_NTASKS"))
    assert "SC2086" in _run(_tool("shellcheck"), broken)


def test_the_batch_script_starts_one_rank_per_task(tmp_path: Path) -> None:
    """With a stand-in for mpiexec: the command line that the allocation's variables give."""
    mpiexec = tmp_path / "venv/bin/mpiexec"
    mpiexec.parent.mkdir(parents=True)
    mpiexec.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    mpiexec.chmod(0o755)
    variables = {"SLURM_NTASKS": "6", "SLURM_JOB_ID": "17", "BNLAYER_VENV": str(tmp_path / "venv")}
    done = subprocess.run(
        ["bash", _SBATCH, "digits", "--epochs", "3"],
        env={"PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = (
        "-n 6 bnlayer train --transport mpi --data digits --save bnlayer-17.safetensors --resume "
        "--summary summary-17.json --epochs 3"
    )
    assert done.stdout.split() == expected.split()


@pytest.mark.parametrize("script", _BATCH_SCRIPTS, ids=lambda path: path.name)
def test_a_batch_script_without_data_prints_its_usage(script: Path) -> None:
    """A forgotten argument is an error of its own, not mpiexec's."""
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        f"usage: sbatch {script.name} DATA [more options of bnlayer train]\n",
    )


def _installed(unit: str, folder: Path) -> Path:
    """A copy of the unit whose program exists on this machine, as it will on the one that runs it."""
    path = folder / _UNIT.name
    path.write_text(unit.replace("/opt/bnlayer/bin/bnlayer", sys.executable))
    return path


def _tool(name: str) -> str:
    """Where a validator is: beside this Python, or on PATH."""
    candidate = Path(sys.executable).parent / name
    path = str(candidate) if candidate.exists() else shutil.which(name)
    assert path, f"{name} is missing; `make setup` brings it, or your system's package of that name"
    return path


def _run(*command: str | Path) -> str:
    """Everything a command prints; whether it failed is for validators that say nothing."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    printed = done.stdout + done.stderr
    assert printed or done.returncode == 0, f"{command} exits {done.returncode} and says nothing"
    return printed
