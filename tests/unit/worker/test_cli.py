"""The command line: help that teaches, one line for a user's error."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import bnlayer
import bnserver
import bnworker
from bnworker.cli import main
from bnworker.cli.commands import app
from bnworker.cli.hosts import Hosts

BNLAYER_MAIN = str(Path(bnlayer.__file__).with_name("__main__.py"))


def run(*arguments: str, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "bnworker.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=environ,
    )


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ((), "bnlayer train --data digits --workers 2"),
        (("train",), "mpiexec -n 3 bnlayer train"),
        (("launch",), "bnlayer launch -n 4 -- python my_training.py --epochs 3"),
        (("serve",), "bnlayer serve --listen 127.0.0.1:"),
        (("doctor",), "bnlayer doctor --address 127.0.0.1:"),
    ],
)
def test_help_teaches_by_example(command: tuple[str, ...], example: str) -> None:
    """Every command's help shows one that can be copied."""
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert example in " ".join(result.stdout.split())


def test_version() -> None:
    """The installed distribution's."""
    assert CliRunner().invoke(app, ["--version"]).stdout == f"bnlayer {version('bnlayer')}\n"


@pytest.mark.parametrize("start", [("-m", "bnlayer"), ("-Im", "bnlayer"), ("-mbnlayer",), (BNLAYER_MAIN,)])
def test_python_m_bnlayer_is_the_command(start: tuple[str, ...]) -> None:
    """Its options, exit codes and lines on stderr; the interpreter's own options stay."""
    ended = subprocess.run(
        [sys.executable, *start, "launch", "-n", "0", "--", "true"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "bnlayer: launch: expected at least 1 rank, received 0.\n"


def test_python_m_bnlayer_sets_the_threads_before_numpy_counts_them() -> None:
    """As `bnlayer` does: the process that runs the command has not imported the layer on its way there."""
    code = (
        "import sys; from importlib.metadata import EntryPoint\n"
        "sys.orig_argv = [sys.executable, '-m', 'bnlayer', 'train']; sys.argv = ['__main__.py', 'train']\n"
        "import os; os.execv = lambda path, arguments: print(arguments[1:])\n"
        "import runpy; runpy.run_module('bnlayer', run_name='__main__')\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=50)
    assert ended.stdout == "['-m', 'bnworker.cli', 'train']\n"


def test_the_shell_completes() -> None:
    """Commands, options and their values, as `bnlayer --install-completion` sets it up."""
    for limbs, expected in (
        ("bnlayer tr", "train"),
        ("bnlayer export --n", "--names"),
        ("bnlayer train --dt", "--dtype"),
    ):
        environ = {"_BNLAYER_COMPLETE": "complete_bash", "COMP_WORDS": limbs, "COMP_CWORD": str(limbs.count(" "))}
        ended = run(environ={**os.environ, **environ})
        assert ended.stdout.split() == [expected], ended.stderr


def test_every_package_has_its_version() -> None:
    """The installed distribution's, as `bnlayer --version`; other names are still refused."""
    for package in (bnlayer, bnworker, bnserver):
        assert package.__version__ == version("bnlayer")
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            package.nothing  # noqa: B018


def test_help_imports_nothing_heavy() -> None:
    """`bnlayer --help` answers at once: half a second, interpreter included."""
    code = (
        "import sys, bnworker.cli.commands; "
        "print([name for name in ('numpy', 'grpc', 'sklearn', 'mpi4py') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=200)
    assert ended.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "--data", "mnist"], "bnlayer: train: --data: received 'mnist'; there is no such file or folder. "),
        (["train", "--hidden", "64,x"], "bnlayer: train: --hidden: expected positive integers with commas, e.g."),
        (["train", "--summary", "/"], "bnlayer: train: / is a folder: expected the name of a file."),
        (["launch", "-n", "0", "--", "true"], "bnlayer: launch: expected at least 1 rank, received 0."),
        (["launch", "-n", "2"], "bnlayer: launch: expected a command after --, received nothing; e.g. bnlayer"),
    ],
)
def test_a_users_error_is_one_line(
    arguments: list[str], line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On stderr, with exit code 2 and no traceback."""
    monkeypatch.setattr(sys, "argv", ["bnlayer", *arguments])
    with pytest.raises(SystemExit) as raised:
        main()
    captured = capsys.readouterr()
    assert raised.value.code == 2
    assert captured.err.startswith(line)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_values_in_usage_errors_are_shown_as_they_are() -> None:
    """Brackets are no markup there either."""
    ended = run("train", "[red]x[/red]", "[mpich]", environ={**os.environ, "COLUMNS": "200"})
    assert ended.returncode == 2
    assert "([red]x[/red] [mpich])" in ended.stderr


@pytest.mark.parametrize("command", [["train"], ["launch", "--", "true"]])
def test_credentials_are_one_line_too(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What can't be used towards the service is said before anything is started."""
    monkeypatch.setenv("BNLAYER_TOKEN_FILE", "/run/secrets/token")
    monkeypatch.setattr(sys, "argv", ["bnlayer", command[0], "--address", "trainer:7431", *command[1:]])
    with pytest.raises(SystemExit) as raised:
        main()
    captured = capsys.readouterr()
    assert raised.value.code == 2
    assert "The token would cross the network to trainer:7431 in plain text." in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_unknown_options_are_usage_errors() -> None:
    """Exit code 2, and the option is named."""
    ended = run("train", "--batchsize", "3")
    assert ended.returncode == 2
    assert "--batchsize" in ended.stderr


def test_a_rank_cannot_choose_the_number_of_workers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Inside mpiexec the command is a rank; --workers would contradict it."""
    monkeypatch.setenv("PMI_RANK", "1")
    monkeypatch.setenv("PMI_SIZE", "3")
    monkeypatch.setattr(sys, "argv", ["bnlayer", "train", "--workers", "2"])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 2
    assert capsys.readouterr().err == (
        "bnlayer: train: --workers 2, but MPICH's mpiexec started this process as rank 1 of 3. Leave out --workers "
        "here, or start the command without MPICH's mpiexec.\n"
    )


def test_an_internal_error_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is not dressed up as a user's error."""

    def broken(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("bnworker.train.data.check", broken)
    monkeypatch.setattr(sys, "argv", ["bnlayer", "train"])
    with pytest.raises(KeyError, match="a bug"):
        main()


def test_a_single_process(tmp_path: object) -> None:
    """`--transport none` with one worker starts nothing else, and says that it is alone."""
    ended = run("train", "--transport", "none", "--epochs", "1", "--steps", "2", "--hidden", "8")
    assert ended.returncode == 0, ended.stderr
    assert "epoch 1/1" in ended.stdout
    assert "1 (alone)" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--nnodes=2"], "--nnodes 2 needs --node-rank on each host, e.g. --node-rank 0 --rendezvous one:7431."),
        (
            ["--nnodes=2", "--node-rank=0"],
            "--nnodes 2 needs --rendezvous on each host, e.g. --node-rank 0 --rendezvous one:7431.",
        ),
        (["--node-rank=1"], "--node-rank 1 needs --nnodes, the number of hosts."),
        (
            ["--nnodes=2", "--node-rank=2", "--rendezvous=one:1"],
            "--node-rank: expected 0 to 1 with --nnodes 2, received 2.",
        ),
        (
            ["--nnodes=2", "--node-rank=0", "--rendezvous=one:65535", "--insecure"],
            ("--rendezvous: expected HOST:PORT, such as one:7431, with a port from 1 to 65534; received 'one:65535'."),
        ),
        (
            ["--nnodes=2", "--node-rank=0", "--rendezvous=one:7431"],
            (
                "--rendezvous one:7431 is reachable from other machines, and launchers and service speak plain text "
                "there without a check of who joins. Say --insecure if the network is your own."
            ),
        ),
        (
            ["--nnodes=2", "--node-rank=0", "--rendezvous=127.0.0.1:7431", "--transport=mpi"],
            (
                "several hosts are for transport service, received transport mpi: mpiexec and srun start MPI ranks on "
                "several hosts themselves."
            ),
        ),
        (["--hosts=a", "--hostfile=b"], "--hosts and --hostfile: give one of them."),
        (
            ["--hosts=a", "--nnodes=2"],
            "--hosts starts the command on each host; --nnodes and --node-rank are for starting it.",
        ),
        (["--hosts=a:0"], "--hosts: expected HOST, HOST:N or HOST slots=N, received 'a:0'."),
        (
            ["--hosts=[::1]:2"],
            (
                "--hosts: expected HOST, HOST:N or HOST slots=N, received '[::1]:2'. Give an IPv6 address a name, in "
                "/etc/hosts or ~/.ssh/config."
            ),
        ),
        (["--hosts=,"], "--hosts: expected a host, received none."),
        (["--hostfile=none"], "--hostfile none: No such file or directory."),
        (
            ["--hosts=a"],
            "--rendezvous a:7431 is reachable from other machines, and launchers and service speak plain text there",
        ),
        (["--hosts=a", "--insecure", "--ssh=no-ssh"], "--ssh: no-ssh: No such file or directory"),
    ],
)
def test_hosts_that_cannot_work(arguments: list[str], line: str, command: Callable[..., tuple[int, str, str]]) -> None:
    """Said before anything is started, by both commands."""
    if "--hosts=a" in arguments:
        arguments = [*arguments, "--rendezvous=a:7431"]
    code, out, err = command("launch", *arguments, "--", "true")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"bnlayer: launch: {line}")


def test_a_host_file(tmp_path: Path) -> None:
    """Open MPI's form and MPICH's, comments, and hosts without a number; the first rank of each follows."""
    path = tmp_path / "hosts"
    path.write_text("# mine, not yours\nme@a slots=2\n\nb:3   # the big one, too\nc\n", encoding="utf-8")
    hosts = Hosts(hostfile=path, ssh="ssh -p 22", rendezvous="a:7431")
    listed = hosts.listed("launch", 4)
    assert listed == (("me@a", 2), ("b", 3), ("c", 4))
    remote = hosts.remote(listed, ("python", "x y.py"), {"job": None, "grace": 5.0, "timestamps": False})
    *start, line = remote.command_line(1, {"BNLAYER_THREADS": "1 2", "HOME": "/root"})
    given_up = ["ConnectTimeout=10", "ServerAliveInterval=1", "ServerAliveCountMax=5"]  # who doesn't answer
    options = [part for option in ("BatchMode=yes", *given_up) for part in ("-o", option)]
    assert start == ["ssh", "-p", "22", *options, "b"]
    there, _, command = line.partition(" && exec ")
    assert shlex.split(there) == ["cd", str(Path.cwd())]
    assert shlex.split(command) == [
        *("env", "BNLAYER_THREADS=1 2", sys.executable, "-P", "-m", "bnworker.cli", "launch", "--attached"),
        *("--nnodes=3", "--node-rank=1", "--rendezvous=a:7431", "--ranks=3", "--first-rank=2", "--world-size=9"),
        *("--grace=5.0", "--", "python", "x y.py"),
    ]
    hosts = Hosts(hosts="a", ssh="docker exec", rendezvous="a:7431")  # no ssh: as it is
    assert hosts.remote((("a", 1),), ("true",), {}).command_line(0, {})[:-1] == ["docker", "exec", "a"]
    assert Hosts(hosts="me@a,b:3").listed("launch", 1) == (("me@a", 1), ("b", 3))
