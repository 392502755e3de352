"""The campaigns at the size that the promises name: `make soak`.

SOAK_SEED and SOAK_SCALE are read from the environment; names of campaigns on the command line run those alone. Every
run prints its seed and the command that repeats it; it ends with a table, and fails if a promise was broken.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.fault.damage import cut, flipped
from support.fault.full import full_disk
from support.fault.rank_kills import rank_kills
from support.fault.report import Report
from support.fault.service_kills import service_kills, storm
from support.fault.slow import slow_is_not_dead
from support.fault.sweep import failpoints
from support.fault.wire import exchanges_under_faults

Progress = Callable[[str], None]
Campaign = Callable[[Path, int, int, Progress], Report]

SHORT_LEASE_S = 1.0  # so that a hundred frozen ranks take minutes
_TELL_EVERY_S = 10.0


@dataclass(frozen=True)
class SoakRun:
    """One campaign of the soak.

    Attributes:
        run: it, given a folder, a seed, an amount, and whom to tell of progress.
        amount: what the promises name; SOAK_SCALE multiplies it.
        unit: of the amount.
    """

    run: Campaign
    amount: int
    unit: str


def _stops(folder: Path, seed: int, turns: int, progress: Progress, lease: float | None) -> Report:
    return rank_kills(folder, seed, turns, signal.SIGSTOP, lease, progress)


def _kills(folder: Path, seed: int, turns: int, progress: Progress) -> Report:
    return rank_kills(folder, seed, turns, signal.SIGKILL, None, progress)


def _damage(
    campaign: Callable[[Path, int, float, Progress], Report], folder: Path, seed: int, percent: int, progress: Progress
) -> Report:
    return campaign(folder, seed, min(1.0, percent / 100), progress)


CAMPAIGNS = {
    "service-kills": SoakRun(service_kills, 100, "kills"),
    "storm": SoakRun(storm, 100, "blows"),
    "rank-kills": SoakRun(_kills, 100, "kills"),
    "rank-stops": SoakRun(partial(_stops, lease=SHORT_LEASE_S), 100, "stops"),
    "rank-stops-default-lease": SoakRun(partial(_stops, lease=None), 5, "stops"),
    "exchanges": SoakRun(exchanges_under_faults, 10_000, "exchanges"),
    "failpoints": SoakRun(failpoints, 10, "hits of each"),
    "flipped-bytes": SoakRun(partial(_damage, flipped), 100, "% of all bytes"),
    "cut-journals": SoakRun(partial(_damage, cut), 100, "% of all bytes"),
    "full-disk": SoakRun(full_disk, 40, "rounds"),
    "slow": SoakRun(slow_is_not_dead, 10_000, "steps"),
}


def main() -> int:
    """Run what was asked for."""
    logging.basicConfig(level=logging.ERROR)
    seed = int(os.environ.get("SOAK_SEED") or time.time_ns() % 1_000_000)
    scale = float(os.environ.get("SOAK_SCALE") or 1)
    names = sys.argv[1:] or list(CAMPAIGNS)
    unknown = sorted(set(names) - set(CAMPAIGNS))
    if unknown:
        _print(f"soak: unknown: {', '.join(unknown)}; there are {', '.join(CAMPAIGNS)}")
        return 2
    _print(f"soak: seed {seed}, scale {scale:g}; again: make soak SOAK_SEED={seed} SOAK_SCALE={scale:g}")
    reports = []
    for name in names:
        soak_run = CAMPAIGNS[name]
        amount = max(1, round(soak_run.amount * scale))
        _print(f"=== {name}: {amount} {soak_run.unit}")
        with tempfile.TemporaryDirectory(prefix="bnlayer-soak-") as folder:
            began = time.monotonic()
            report = _run(soak_run, name, Path(folder), seed, amount)
        _print(f"{report}\n        {time.monotonic() - began:.0f} s")
        reports.append((name, report))
    _print("\n=== soak, seed " + str(seed))
    for _, report in reports:
        _print(str(report))
    failed = [name for name, report in reports if report.violations]
    for name in failed:
        _print(f"again: make soak SOAK_SEED={seed} SOAK_SCALE={scale:g} SOAK={name}")
    return 1 if failed else 0


def _run(soak_run: SoakRun, name: str, folder: Path, seed: int, amount: int) -> Report:
    """A campaign's report; one that fails by itself is a failed one, and the others still have their turn."""
    try:
        return soak_run.run(folder, seed, amount, _Bar(name))
    except Exception:  # noqa: BLE001 - whatever it is, it is told
        return Report(name, wrong=[traceback.format_exc()])


class _Bar:
    """Tells of progress now and then."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._began = self._last_print = time.monotonic()

    def __call__(self, what: str) -> None:
        now = time.monotonic()
        if now >= self._last_print + _TELL_EVERY_S:
            self._last_print = now
            _print(f"{self._name} {now - self._began:5.0f} s: {what}")


def _print(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
