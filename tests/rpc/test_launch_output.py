"""What a launch shows and keeps: terminals, log folders, and a service of its own that is quiet."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from support.processes import arguments, launch, launched, pids, script

pytestmark = pytest.mark.rpc

SPEAKS = script("print('hello', flush=True); os.write(2, b'oops\\n')")
FAILS = script("sys.exit(3)")


def on_a_terminal(*options: str, environ: Mapping[str, str] | None = None) -> tuple[str, str]:
    """What a launch of one rank shows on a terminal that is its stdout, and on a pipe that is its stderr."""
    master, slave = pty.openpty()
    given = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    command = arguments(1, *SPEAKS, options=options)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=slave, stderr=subprocess.PIPE, env={**given, **(environ or {})}
    ) as process:
        os.close(slave)
        shown = b""
        try:
            while chunk := os.read(master, 4096):
                shown += chunk
        except OSError:  # the last one who held the terminal's other side is gone
            os.close(master)
        assert process.stderr is not None
        return shown.decode().replace("\r\n", "\n"), process.stderr.read().decode()


TIME = r"\d\d:\d\d:\d\d\.\d\d\d"


def test_a_terminal_gets_time_and_colour_a_pipe_neither() -> None:
    """Each output of the same launch for itself."""
    out, err = on_a_terminal()
    assert re.fullmatch(rf"\x1b\[36m{TIME} \[0\]\x1b\[0m hello\n", out)
    assert err == "[0] oops\n"


def test_without_colour() -> None:
    """NO_COLOR is heard; the time stays."""
    out, _ = on_a_terminal(environ={"NO_COLOR": "1"})
    assert re.fullmatch(rf"{TIME} \[0\] hello\n", out)


def test_times_can_be_turned_off_and_on() -> None:
    """On a terminal, and in a pipe."""
    out, err = on_a_terminal("--no-timestamps")
    assert (out, err) == ("\x1b[36m[0]\x1b[0m hello\n", "[0] oops\n")
    done = launch(1, *SPEAKS, options=["--timestamps"])
    assert re.fullmatch(rf"{TIME} \[0\] hello\n", done.stdout)
    assert re.fullmatch(rf"{TIME} \[0\] oops\n", done.stderr)


def test_the_launchers_own_lines_have_the_time_too() -> None:
    """One column of times, whoever speaks."""
    done = launch(1, *FAILS, options=["--timestamps"])
    assert done.returncode == 3
    assert re.fullmatch(rf"{TIME} bnlayer launch: rank 0 exited with code 3\n", done.stderr)


# ---- the log folder ----


def test_a_file_for_each_rank(tmp_path: Path) -> None:
    """Its bytes as it wrote them; the launcher's lines and the service's log beside them; the screen as ever."""
    logs = tmp_path / "not" / "there"
    text = (
        "import bnworker\n"
        "with bnworker.join() as w: w.barrier()\n"
        "os.write(1, b'\\xff raw %d' % rank)\n"
        "os.write(2, b'oops\\n')\n"
        "sys.exit(3 if rank == 1 else 0)"
    )
    done = launch(2, *script(text), options=["--log-dir", str(logs)], errors="replace")
    assert done.returncode == 3
    assert sorted(done.stdout.splitlines()) == ["[0] \ufffd raw 0", "[1] \ufffd raw 1"]
    held = {path.name: path.read_bytes() for path in logs.iterdir()}
    assert set(held) == {"launch.log", "rank-0.err", "rank-0.out", "rank-1.err", "rank-1.out", "service.log"}
    for rank in range(2):
        assert held[f"rank-{rank}.out"] == b"\xff raw %d" % rank
        assert held[f"rank-{rank}.err"] == b"oops\n"
    assert re.fullmatch(rf"{TIME} bnlayer launch: rank 1 exited with code 3\n", held["launch.log"].decode())
    assert b" bnserver INFO stopping: telling every rank" in held["service.log"]


def test_a_line_is_in_its_file_while_the_rank_runs(tmp_path: Path) -> None:
    """And before it is on the screen: `tail -f`, and what is left after a crash, are true."""
    with launched(
        1, *script("print(os.getpid(), flush=True)\nwhile True: time.sleep(0.05)"), options=["--log-dir", str(tmp_path)]
    ) as process:
        (rank,) = pids(process, 1)
        assert (tmp_path / "rank-0.out").read_text(encoding="ascii") == f"{rank}\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(150) == 143


def test_files_of_an_earlier_run_are_replaced(tmp_path: Path) -> None:
    """A log holds one run."""
    (tmp_path / "rank-0.out").write_text("earlier", encoding="ascii")
    assert launch(1, *SPEAKS, options=["--log-dir", str(tmp_path)]).returncode == 0
    assert (tmp_path / "rank-0.out").read_text(encoding="ascii") == "hello\n"


def test_a_log_that_cannot_be_written_does_not_end_the_job(tmp_path: Path) -> None:
    """Said once, however much follows; the screen still shows everything."""
    (tmp_path / "rank-0.out").symlink_to("/dev/full")
    text = "for i in range(3):\n    print(i, flush=True)"
    done = launch(1, *script(text), options=["--log-dir", str(tmp_path)])
    assert (done.returncode, done.stdout) == (0, "[0] 0\n[0] 1\n[0] 2\n")
    path = tmp_path / "rank-0.out"
    assert done.stderr == (f"bnlayer launch: {path}: No space left on device; what follows is on the screen alone\n")


def test_a_log_folder_that_cannot_be_made(tmp_path: Path) -> None:
    """One line, before anything is started."""
    (tmp_path / "file").touch()
    done = launch(1, *script("print('started')"), options=["--log-dir", str(tmp_path / "file" / "logs")])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"bnlayer: launch: --log-dir: {tmp_path}/file/logs: Not a directory\n"


# ---- the service of the job's own ----


def test_a_service_that_does_its_work_says_nothing() -> None:
    """Ranks that come and go are no news."""
    done = launch(2, *script("import bnworker\nwith bnworker.join() as w: w.barrier()"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_service_that_cannot_start_is_heard(tmp_path: Path) -> None:
    """Quiet is not mute: the reason stands above the launcher's own line."""
    (tmp_path / "service.log").mkdir()
    done = launch(1, *script("print('started')"), options=["--log-dir", str(tmp_path)])
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"[service] bnserver: Can't write the log to {tmp_path}/service.log: Is a directory. Name another file.\n"
        "bnlayer: launch: the statistics service for this job did not start; what it said stands above.\n"
    )


@pytest.mark.parametrize(("level", "reported"), [("warning", False), ("info", True)])
def test_the_level_of_a_daemon(start: Callable[..., Any], tmp_path: Path, level: str, reported: bool) -> None:
    """Its log on stderr is cut; the file gets all of it."""
    log = tmp_path / "log"
    service = start("-m", "bnserver", "--listen", "127.0.0.1:0", "--log-level", level, "--log-file", str(log))
    assert service.line().startswith("bnserver listening on ")
    code, _, err = service.end(signal.SIGTERM)
    assert code == 0
    assert ("INFO stopping" in err) is reported
    assert " bnserver INFO stopping" in log.read_text(encoding="utf-8")


# ---- signals that a user's shell has its own mind about ----


@pytest.mark.fault
def test_nohup_is_respected() -> None:
    """A SIGHUP that was ignored when the launcher started stays ignored, and the job goes on."""
    text = "print(os.getpid(), flush=True)\nsignal.sigwait([signal.SIGUSR1])\nprint('done')"
    command = arguments(1, *script("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])\n" + text))
    with subprocess.Popen(
        ["env", "--ignore-signal=HUP", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        pids(process, 1)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGUSR1)
        assert process.stdout is not None
        assert process.stdout.read() == "[0] done\n"
        assert process.wait(150) == 0


def test_closed_standard_streams() -> None:
    """What a rank writes does not land in one of the launcher's own pipes, which would take their numbers."""
    text = "os.write(1, b'hello\\n'); os.write(2, os.readlink(f'/proc/{os.getppid()}/fd/1').encode())"
    command = ["sh", "-c", 'exec "$@" >&- <&-', "sh", *arguments(1, *script(text))]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (0, "[0] /dev/null\n")
