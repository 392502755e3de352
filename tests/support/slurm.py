"""A Slurm cluster of a test's own on this machine: a controller, two nodes, and what they need; gone afterwards.

Everything is in one folder, munge's key and socket included, so that a cluster which the machine belongs to is not
touched. Nothing of it needs root: jobs run as whoever runs the test.
"""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from support.ports import free_port

NODES = ("n1", "n2")
_LIMIT_S = 300.0  # ends a test that hangs; a busy machine takes a tenth of it
_PAUSE_S = 0.1
_DAEMONS = ("munged", "slurmctld", "slurmd")
# proctrack/linuxproc, task/none and jobacct_gather/none work without control groups, and so in containers.
_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
TmpFS={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,bf_window=60
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs.

    Attributes:
        folder: of its configuration and logs.
        environ: of its commands, and so of its jobs.
    """

    folder: Path
    environ: dict[str, str]

    @property
    def mark(self) -> bytes:
        """What every process of the cluster, and of its jobs, has in its environment."""
        return f"SLURM_CONF={self.environ['SLURM_CONF']}".encode()

    def run(self, *command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        """A command from its start to its end."""
        return subprocess.run(
            command, cwd=cwd, env=self.environ, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )

    def submit(self, script: Path, *arguments: str, options: Sequence[str] = (), cwd: Path) -> int:
        """Put a batch script into the queue; its number."""
        done = self.run("sbatch", "--parsable", *options, script, *arguments, cwd=cwd)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def state(self, job: int) -> str:
        """RUNNING, PENDING, COMPLETED, …"""
        fields = dict(word.partition("=")[::2] for word in self._scontrol("show", "job", str(job)).split())
        return fields["JobState"]

    def release(self, job: int) -> None:
        """Let a requeued job start again, which it would do by itself after two minutes.

        Its old steps must be gone, which the new ones would be taken for. Two seconds from now: nodes refuse a start
        that has the time stamp, in seconds, of the job's end.
        """
        step = f"slurmstepd: [{job}.".encode()
        deadline = time.monotonic() + _LIMIT_S
        while any((process / "cmdline").read_bytes().startswith(step) for process in _processes(self.mark)):
            assert time.monotonic() < deadline, f"job {job} still has steps, {_LIMIT_S} s after its end"
            time.sleep(_PAUSE_S)
        self._scontrol("update", f"JobId={job}", "StartTime=now+2")

    def cancel(self, *arguments: str) -> None:
        """`scancel`, e.g. to send a signal."""
        done = self.run("scancel", *arguments, cwd=self.folder)
        assert done.returncode == 0, done.stderr

    def wait(self, job: int, state: str, log: Path) -> None:
        """Until a job has reached a state."""
        final = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        deadline = time.monotonic() + _LIMIT_S
        while (now := self.state(job)) != state:
            said = log.read_text(encoding="utf-8") if log.exists() else "nothing"
            assert now not in final, f"job {job} is {now} and never will be {state}; its output:\n{said}"
            assert time.monotonic() < deadline, f"job {job} is {now}, not {state}; its output:\n{said}"
            time.sleep(_PAUSE_S)

    def _scontrol(self, *arguments: str) -> str:
        done = self.run("scontrol", *arguments, cwd=self.folder)
        assert done.returncode == 0, done.stderr
        return done.stdout


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster for the length of a `with` block.

    Args:
        folder: empty, and with a short name: munge's socket is in it.
    """
    folder.chmod(0o755)
    missing = [name for name in _DAEMONS if _daemon(name) is None]
    assert not missing, (
        f"{', '.join(missing)} missing: install slurm-wlm and munge (Debian's names; any user can then run these "
        "tests), or as root: CI=true .ci/system-tools"
    )
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurm.conf"
    ports = [free_port() for _ in range(3)]
    configuration.write_text(
        _CONFIGURATION.format(folder=folder, host=host, user=getpass.getuser(), ports=ports), encoding="ascii"
    )
    for name in ("state", *NODES):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("BNLAYER_", "SLURM_", "PMI_"))
    }
    environ = {
        **inherited,
        "SLURM_CONF": str(configuration),
        "BNLAYER_VENV": sys.prefix,
        "BNLAYER_KERNELS": "reference",  # the same bits, and no compiler to be loaded by every process
        "BNLAYER_SERVICE_HOST": "127.0.0.1",  # both nodes are this machine
    }
    running = Cluster(folder, environ)
    with ExitStack() as stack:
        stack.callback(_end_leftovers, running.mark)
        files = {"socket": "socket", "seed-file": "seed", "log-file": "log", "pid-file": "pid"}
        munge = [f"--{option}={folder}/munge.{name}" for option, name in files.items()]
        _start(stack, running, "munged", "--foreground", "--force", f"--key-file={key}", *munge)
        _start(stack, running, "slurmctld", "-D")
        for node in NODES:
            _start(stack, running, "slurmd", "-D", "-N", node)
        _await_nodes(running)
        try:
            yield running
        finally:
            running.cancel("--user", getpass.getuser())


def _start(stack: ExitStack, running: Cluster, name: str, *arguments: str) -> None:
    daemon = _daemon(name)
    assert daemon is not None
    with (running.folder / "daemons.log").open("ab") as log:
        process = subprocess.Popen(
            [daemon, *arguments], env=running.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    stack.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end_leftovers(mark: bytes) -> None:
    """Kill whatever a job left."""
    while left := _processes(mark):
        for process in left:
            with suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
        time.sleep(_PAUSE_S)


def _processes(mark: bytes) -> list[Path]:
    """The folders in /proc of all processes with this variable."""
    folders = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    folders.append(folder)
    return folders


def _await_nodes(running: Cluster) -> None:
    deadline = time.monotonic() + _LIMIT_S
    while True:
        done = running.run("sinfo", "--noheader", "--format=%T %D", cwd=running.folder)
        if done.stdout.split() == ["idle", str(len(NODES))]:
            return
        said = (running.folder / "daemons.log").read_text(encoding="utf-8", errors="replace")
        assert time.monotonic() < deadline, f"{done.stdout}{done.stderr}{said}"
        time.sleep(_PAUSE_S)


def _daemon(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
