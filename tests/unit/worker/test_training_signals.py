"""`bnlayer train` and signals: which are noted, and how the process ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from bnworker.cli.files import Files
from bnworker.cli.interruption import Interruption
from bnworker.cli.rank import _end_stopped
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


def test_a_signal_that_is_ignored_stays_so() -> None:
    """As under nohup, or in a shell's background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            signal.raise_signal(signal.SIGINT)
            assert not interruption.asked()
    finally:
        signal.signal(signal.SIGINT, before)
