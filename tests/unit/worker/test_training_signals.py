"""`bnlayer train` and signals: which are noted, and how the process ends."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path

import pytest

from bnworker.cli import rank
from bnworker.cli.files import Files
from bnworker.cli.interruption import Interruption, WaitInterrupted
from bnworker.cli.rank import _end_stopped, _stopped_between
from bnworker.train.checkpoint import Checkpoint, Origin, Progress, encode, read
from bnworker.train.loop import Replica, StoppedError
from bnworker.train.settings import Settings
from bnworker.transports.alone import AloneTransport
from bnworker.world import World


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_a_second_ctrl_c_is_not(first: signal.Signals) -> None:
    """What SIGINT did before it does again after the first signal; the others do when the block is left."""
    received: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    try:
        with Interruption() as interruption:
            assert not interruption.asked()
            signal.raise_signal(first)
            for number in numbers:
                assert received == []
                signal.raise_signal(number)
            assert (interruption.asked(), interruption.signal, received) == (True, first, [signal.SIGINT])
        for number in numbers:
            signal.raise_signal(number)
        assert received == [signal.SIGINT, *numbers]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("by", "saved", "code"),
    [
        (signal.SIGTERM, Path("run.safetensors"), 75),
        (signal.SIGUSR1, Path("run.safetensors"), 75),
        (signal.SIGINT, Path("run.safetensors"), 130),
        (signal.SIGTERM, None, 143),
        (signal.SIGUSR1, None, 138),
    ],
)
def test_the_exit_code_of_a_run_that_was_stopped(by: signal.Signals, saved: Path | None, code: int) -> None:
    """One that can be resumed is not replaced by the signal with which `srun --kill-on-bad-exit` ends the others."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        world = World(AloneTransport(), install=False)
        assert _end_stopped(by, 3, "digits", Settings(), world, Files(save=saved), None).code == code
        for number, handler in before.items():
            assert signal.getsignal(number) == (signal.SIG_IGN if code == 75 else handler)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("late", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_that_comes_after_the_other_ranks_does_not_end_this_one(
    late: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank's has stopped the run already; it was killed while the ranks agreed on which signal that was."""
    received: list[int] = []

    def stopped(*_: object, **__: object) -> None:
        raise StoppedError(3)

    def agreed(*_: object) -> signal.Signals:
        signal.raise_signal(late)
        return late

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in numbers}
    monkeypatch.setattr(rank, "train", stopped)
    monkeypatch.setattr(rank, "_agreed", agreed)
    try:
        world = World(AloneTransport(), install=False)
        ended = rank._train("digits", Settings(epochs=1), world, Replica(), Files(), first=False)
        assert isinstance(ended, rank._Stopped)
        assert (ended.signal, received) == (late, [])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As under nohup, or in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert not interruption.asked()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_ends_the_wait_for_other_ranks() -> None:
    """One that comes meanwhile, and one that has come before; elsewhere it is only noted."""
    with Interruption() as interruption:
        with interruption.waiting():
            pass
        with pytest.raises(WaitInterrupted), interruption.waiting():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(WaitInterrupted), interruption.waiting():
            pytest.fail("it waits")
    assert interruption.signal == signal.SIGTERM


@pytest.mark.parametrize(("in_file", "kept"), [(None, 7), (3, 7), (7, 7), (9, 9), ("another run's", 7), ("none", 7)])
def test_a_rank_between_two_generations_keeps_its_state(in_file: int | str | None, kept: int, tmp_path: Path) -> None:
    """Unless the file is as far already; that of another run is replaced, as during the run."""
    path = tmp_path / "run.safetensors"
    origin = Origin("digits", "abc", 64, 10)
    latest = Checkpoint({}, Progress(7), Settings().as_json(), origin)
    if isinstance(in_file, int):
        path.write_bytes(encode(replace(latest, progress=Progress(in_file))))
    elif in_file is not None:
        other = replace(latest, progress=Progress(9), settings=Settings(seed=5).as_json())
        path.write_bytes(encode(other) if in_file == "another run's" else b"none")
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    interruption = Interruption()
    interruption.signal = signal.SIGTERM
    try:
        assert _stopped_between(latest, interruption, Files(save=path), first=False).code == 75
        assert _stopped_between(None, interruption, Files(save=path), first=False).code == 143
        assert _stopped_between(latest, interruption, Files(), first=False).code == 143
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    saved = read(path)
    assert saved is not None
    assert saved.progress.steps == kept
