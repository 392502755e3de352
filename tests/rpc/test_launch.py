"""`bnlayer launch` with real processes: output, exit codes, and that nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from support.processes import arguments, children, gone, launch, launched, pids, script, watched

pytestmark = [pytest.mark.rpc, pytest.mark.timeout(90)]

# ---- what ranks are given ----


def test_ranks_reach_each_other_through_a_service_of_their_own() -> None:
    """The whole way: start a service, join, exchange, leave, stop the service."""
    done = launch(
        3,
        *script("import bnworker\nwith bnworker.join() as w: print(w.transport, w.world_size, *w.allreduce([rank]))"),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] service 3 3" for rank in range(3)]


def test_the_environment_of_a_rank() -> None:
    """Every variable that `join` reads; nothing of an outer launcher; an empty standard input."""
    text = (
        "import json; print(json.dumps({k: v for k, v in os.environ.items() "
        "if k.startswith(('BNLAYER_', 'PMI_RANK'))} | {'input': sys.stdin.read()}))"
    )
    environ = {**os.environ, "PMI_RANK": "0", "PMI_SIZE": "1", "BNLAYER_JOB": "named"}
    done = subprocess.run(
        arguments(2, *script(text)), capture_output=True, text=True, timeout=60, check=True, env=environ, input="x"
    )
    got = [json.loads(line.partition(" ")[2]) for line in sorted(done.stdout.splitlines())]
    for rank, variables in enumerate(got):
        assert variables.pop("BNLAYER_ADDRESS").startswith("127.0.0.1:")
        folder = Path(variables.pop("BNLAYER_LAUNCH_DIR"))
        assert not folder.exists()
        assert variables == {
            "BNLAYER_TRANSPORT": "service",
            "BNLAYER_RANK": str(rank),
            "BNLAYER_WORLD_SIZE": "2",
            "BNLAYER_JOB": "named",
            "input": "",
        }


# ---- output ----


def test_output_is_prefixed_by_rank() -> None:
    """stdout to stdout, stderr to stderr; characters stay whole, and so does a last line without its end."""
    text = (
        "for piece in ('h\\u00e9'.encode()[:2], 'h\\u00e9'.encode()[2:], b'llo\\n', b'last'):\n"
        "    os.write(1, piece)\n"
        "os.write(2, b'oops\\n')"
    )
    done = launch(2, *script(text))
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["[0] h\u00e9llo", "[0] last", "[1] h\u00e9llo", "[1] last"]
    assert {"[0] oops", "[1] oops"} <= set(done.stderr.splitlines())


def test_much_output_from_many_arrives_whole() -> None:
    """More than pipes hold, from all ranks at once: every line is there, none is torn."""
    done = launch(3, *script("print('\\n'.join(f'{rank} {i}' for i in range(30000)))"))
    lines = done.stdout.splitlines()
    assert len(lines) == 90000
    for rank in range(3):
        mine = [line for line in lines if line.startswith(f"[{rank}] ")]
        assert mine == [f"[{rank}] {rank} {i}" for i in range(30000)]


def test_a_reader_that_goes_away_ends_the_job() -> None:
    """`bnlayer launch … | head -1` does not run on for nobody; the code is that of SIGPIPE."""
    with launched(2, *script("while True: print('y' * 100)")) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 141


# ---- exit codes ----


def test_the_first_failing_ranks_code() -> None:
    """The others get SIGTERM after the grace, and do not count."""
    done = launch(3, *script("sys.exit(7) if rank == 1 else time.sleep(60)"))
    assert done.returncode == 7
    assert "bnlayer launch: rank 1 exited with code 7" in done.stderr
    assert "bnlayer launch: SIGTERM sent to ranks 0, 2" in done.stderr


@pytest.mark.fault
def test_a_killed_rank() -> None:
    """128 + 9; the others were told by a CollectiveError, and their code comes second."""
    text = (
        "import bnworker\n"
        "with bnworker.join() as w:\n"
        "    w.barrier()\n"
        "    if rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    w.barrier()"
    )
    done = launch(3, *script(text))
    assert done.returncode == 137
    assert "bnlayer launch: rank 1 was killed by SIGKILL" in done.stderr
    assert done.stderr.count("PeerLostError: ") == 2
    assert "SIGTERM" not in done.stderr  # they ended by themselves


def test_ranks_that_were_told_come_second() -> None:
    """A rank that leaves with an exit code may end after those that are told of it."""
    text = (
        "import bnworker, select\n"
        "with bnworker.join() as w:\n"
        "    other = os.pidfd_open(int(w.allreduce([0 if rank else os.getpid()])[0]))\n"
        "    if rank == 1:\n"
        "        w._depart('failed with SystemExit: 7')\n"
        "        select.select([other], [], [])\n"
        "        sys.exit(7)\n"
        "    w.barrier()"
    )
    done = launch(2, *script(text))
    lines = [line for line in done.stderr.splitlines() if "exited with code" in line]
    assert lines == ["bnlayer launch: rank 0 exited with code 1", "bnlayer launch: rank 1 exited with code 7"]
    assert done.returncode == 7


def test_command_not_found() -> None:
    """A shell's code, one line, and nothing was started."""
    done = launch(2, "no-such-command")
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr == "bnlayer: launch: no-such-command: command not found\n"


def test_an_address_where_nobody_listens_is_the_ranks_error() -> None:
    """No service is started when an address is given."""
    done = launch(1, *script("print(os.environ['BNLAYER_ADDRESS'])"), options=["--address", "127.0.0.1:1"])
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0] 127.0.0.1:1\n", "")


# ---- nothing is left running ----

# Says its pid, and that of a child in a session of its own, which ignores SIGTERM; then goes on for ever.
STUBBORN = (
    "import subprocess\n"
    "child = subprocess.Popen(['sh', '-c', 'trap \"\" TERM INT; while :; do sleep 1; done'], start_new_session=True)\n"
    "print(child.pid, flush=True)\n"
    "print(os.getpid(), flush=True)\n"
    "time.sleep(300)"
)


@pytest.mark.fault
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_everything(number: int, code: int) -> None:
    """Ranks, what they started, the service, the guardian; and the folder is removed."""
    with launched(2, *script(STUBBORN)) as process:
        everybody = pids(process, 4) + children(process.pid)
        assert len(set(everybody)) == 6  # 2 ranks, 2 children of theirs, service, guardian
        with watched(sorted(set(everybody))) as handles:
            process.send_signal(number)
            assert process.wait(30) == code
            assert gone(handles)


@pytest.mark.fault
def test_the_launcher_is_killed() -> None:
    """Even SIGKILL to the launcher leaves nothing behind, and no folder."""
    with launched(2, *script(STUBBORN + "\n")) as process:
        everybody = sorted({*pids(process, 4), *children(process.pid)})
        rank = next(number for number in everybody if _folder(number))
        folder = _folder(rank)
        with watched(everybody) as handles:
            process.kill()
            assert gone(handles)
            assert folder
            assert not Path(folder).exists()


def _folder(pid: int) -> str:
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((v.partition(b"=")[2].decode() for v in variables if v.startswith(b"BNLAYER_LAUNCH_DIR=")), "")


@pytest.mark.fault
def test_a_background_process_of_a_rank_does_not_outlive_the_job(tmp_path: Path) -> None:
    """Although the ranks succeeded, and nobody waits for it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    text = (
        "import subprocess\n"
        "print(subprocess.Popen(['sleep', '300'], start_new_session=True, stdout=-3, stderr=-3).pid, flush=True)\n"
        f"open({str(gate)!r}).read()"
    )
    with launched(1, *script(text)) as process, watched(pids(process, 1)) as handles:
        gate.write_text("", encoding="ascii")
        assert process.wait(30) == 0
        assert gone(handles)


@pytest.mark.fault
def test_sigusr1_is_passed_on() -> None:
    """What it asks for is the ranks' business: the job goes on."""
    text = (
        "got = []\n"
        "signal.signal(signal.SIGUSR1, lambda *_: got.append(1))\n"
        "print(os.getpid(), flush=True)\n"
        "while not got: signal.sigtimedwait([], 0.05)\n"
        "print('got it')"
    )
    with launched(2, *script(text)) as process:
        pids(process, 2)
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert sorted(out.splitlines()) == ["[0] got it", "[1] got it"]


@pytest.mark.fault
def test_the_service_dies() -> None:
    """Ranks cannot go on without it: the job ends at once instead of after their patience, and says why."""
    with launched(1, *script("print(os.getpid(), flush=True)\ntime.sleep(300)")) as process:
        rank = pids(process, 1)
        service = next(
            number
            for number in children(process.pid)
            if number not in rank and b"bnserver" in Path(f"/proc/{number}/cmdline").read_bytes()
        )
        os.kill(service, signal.SIGKILL)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 137
        assert "bnlayer launch: the statistics service was killed by SIGKILL" in err
