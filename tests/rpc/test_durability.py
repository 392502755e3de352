"""What outlives a daemon: its state directory, the statistics in it, and checkpoints."""

import json
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bnlayer import BatchNormalization, PeerLostError
from bnworker import CheckpointError, World
from bnworker.cli.commands import app
from bnworker.transports.service import ServiceTransport
from support.looking_on import X, joined, train

pytestmark = pytest.mark.rpc


def _trained(address: str, steps: int) -> tuple[bytes, int]:
    """The owner's statistics after a run of some steps."""
    with joined(address) as world:
        layer = train(world, steps)
        world.pull(layer)
        state = layer.state
        return state.moving.mean.tobytes() + state.moving.variance.tobytes(), state.version


# ---- the state directory ----


def test_a_state_directory_has_one_daemon(serve: Callable[..., Any], start: Callable[..., Any], tmp_path: Path) -> None:
    """Two owners of the same statistics would overwrite each other; the second is told who holds them."""
    first = serve("--state-dir", str(tmp_path))
    code, _, err = start("-m", "bnserver", "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path)).end(within=150)
    assert code == 1
    holder = f"pid {first.popen.pid} on host {socket.gethostname()}"
    assert f"bnserver: The state directory {tmp_path} is in use by {holder}." in err


def test_a_lock_ends_with_its_daemon(serve: Callable[..., Any], tmp_path: Path) -> None:
    """After kill -9 the next daemon starts: the kernel gave the lock back."""
    first = serve("--state-dir", str(tmp_path))
    first.end(signal.SIGKILL)
    serve("--state-dir", str(tmp_path))


def test_a_corrupt_snapshot_stops_the_start(
    serve: Callable[..., Any], start: Callable[..., Any], tmp_path: Path
) -> None:
    """Moving statistics are never lost silently: the file is named, and left as it is."""
    service = serve("--state-dir", str(tmp_path))
    _trained(service.address, 2)
    service.end(signal.SIGTERM)
    (path,) = tmp_path.glob("*.job")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, _, err = start("-m", "bnserver", "--listen", "127.0.0.1:0", "--state-dir", str(tmp_path)).end(within=150)
    assert code == 1
    assert f"bnserver: The snapshot {path} is corrupt: the checksum of record " in err
    assert path.read_bytes() == data


# ---- statistics ----


def test_statistics_outlive_a_drain(serve: Callable[..., Any], tmp_path: Path) -> None:
    """A run over two daemons gives the bits of a run over one."""
    first = serve("--state-dir", str(tmp_path / "two"))
    _trained(first.address, 3)
    assert first.end(signal.SIGTERM)[0] == 0
    second = serve("--state-dir", str(tmp_path / "two"))
    got = _trained(second.address, 2)
    uninterrupted = serve("--state-dir", str(tmp_path / "one"))
    _trained(uninterrupted.address, 3)
    assert got == _trained(uninterrupted.address, 2)
    assert got[1] == 5


def test_what_the_last_rank_left_behind_outlives_kill_9(serve: Callable[..., Any], tmp_path: Path) -> None:
    """When `leave` returns on the last rank, the job is on disk."""
    first = serve("--state-dir", str(tmp_path))
    before = _trained(first.address, 3)
    first.end(signal.SIGKILL)
    second = serve("--state-dir", str(tmp_path))
    with joined(second.address) as world:
        state = ServiceTransport.pull(world._transport, "a")  # type: ignore[arg-type]  # below the layer: what is owned
        assert state is not None
        assert (state.moving.mean.tobytes() + state.moving.variance.tobytes(), state.version) == before


def test_without_a_state_directory_nothing_stays(serve: Callable[..., Any]) -> None:
    """In memory alone: another daemon knows nothing of the job."""
    first = serve()
    _trained(first.address, 1)
    first.end(signal.SIGTERM)
    assert _trained(serve().address, 1)[1] == 1


def test_the_next_generation_goes_on_after_a_lost_rank(serve: Callable[..., Any], run_rank: Callable[..., Any]) -> None:
    """One job, two attempts: the second begins with what the first one completed."""
    service = serve()
    lost = run_rank(service.address, 1, 2, "time.sleep(60)")
    with joined(service.address, 0, 2) as world:
        assert lost.line() == "joined"
        lost.end(signal.SIGKILL)
        with pytest.raises(PeerLostError):
            world.barrier()
    assert _trained(service.address, 2)[1] == 2


def test_a_full_disk_is_reported(serve: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A job that can't be saved is no orderly end, which its last rank hears; what was saved before is still there."""
    service = serve("--state-dir", str(tmp_path))
    _trained(service.address, 1)
    (path,) = tmp_path.glob("*.job")
    before = path.read_bytes()
    path.with_suffix(".part").mkdir()  # stands in the way of the next write
    assert not [text for text in caplog.messages if "confirm" in text]
    _trained(service.address, 1)
    assert caplog.messages[-1].startswith(
        f"rank 0 has left job 'job', but the service at {service.address} did not confirm that its job is on disk: Job "
        f"'job' could not be saved to {path}: "
    )
    code, _, err = service.end(signal.SIGTERM)
    assert code == 1
    assert f"bnserver: Job 'job' could not be saved to {path}:" in err
    assert path.read_bytes().startswith(before)


# ---- checkpoints ----


def _on_both(address: str, steps: Callable[[World, BatchNormalization], Any], *, trained: bool = True) -> list[Any]:
    """The same steps on two ranks, which are threads; what each returned or raised."""
    results: list[Any] = [None, None]

    def rank(number: int) -> None:
        try:
            with joined(address, number, 2) as world:
                layer = BatchNormalization(synchronized=True, name="a", collective=world)
                layer.build((None, 2))
                if trained:
                    layer(X + number, training=True)
                else:
                    world.pull(layer)
                results[number] = steps(world, layer)
        except BaseException as error:  # noqa: BLE001 - what a thread raised is one of the results
            results[number] = error

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(150)
    return results


def _bits(layer: BatchNormalization) -> bytes:
    return b"".join(array.tobytes() for array in layer.state.arrays().values())


def test_a_job_goes_back_to_a_checkpoint(serve: Callable[..., Any], tmp_path: Path) -> None:
    """It is on disk when the call returns: the daemon is killed; restored, the job goes on with the same bits."""

    def steps(world: World, layer: BatchNormalization) -> tuple[bytes, bytes]:
        world.checkpoint("early", step=1)
        layer(X * 3, training=True)
        world.checkpoint("late", step=2)
        kept = _bits(layer)
        layer(X * 5, training=True)
        return kept, _bits(layer)

    service = serve("--state-dir", str(tmp_path), "--keep-checkpoints=1")
    (kept, expected), other = _on_both(service.address, steps)
    assert other == (kept, expected)
    service.end(signal.SIGKILL)
    shown = CliRunner().invoke(app, ["state", "checkpoints", "job", "--json", "--state-dir", str(tmp_path)])
    assert [(each["checkpoint"], each["step"]) for each in json.loads(shown.stdout)] == [("late", 2)]
    restored = CliRunner().invoke(app, ["state", "restore", "job", "late", "--state-dir", str(tmp_path)])
    assert restored.stdout == "job 'job': 1 layers of checkpoint 'late', step 2\n"

    def one_more_step(world: World, layer: BatchNormalization) -> tuple[bytes, bytes]:
        before = _bits(layer)
        layer(X * 5, training=True)
        return before, _bits(layer)

    assert _on_both(serve("--state-dir", str(tmp_path)).address, one_more_step, trained=False) == [(kept, expected)] * 2


@pytest.mark.parametrize(
    ("durable", "text"),
    [
        (True, "expected at most 1 checkpoints of a job, received a request for 2"),
        (False, "has no state directory"),
    ],
)
def test_a_checkpoint_that_is_not_kept_ends_nothing(
    durable: bool, text: str, serve: Callable[..., Any], tmp_path: Path
) -> None:
    """Every rank is told, and goes on."""

    def steps(world: World, layer: BatchNormalization) -> str:
        if durable:
            world.checkpoint("first", step=1)
        with pytest.raises(CheckpointError) as raised:
            world.checkpoint("second", step=2)
        layer(X, training=True)
        return str(raised.value)

    arguments = ("--state-dir", str(tmp_path), "--max-checkpoints=1") if durable else ()
    first, second = _on_both(serve(*arguments).address, steps)
    assert first == second
    assert text in first
