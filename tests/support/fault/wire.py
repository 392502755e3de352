"""A job through the proxy: connections break in every way, and nothing is lost, and nothing counted twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.fault.daemons import daemon
from support.fault.faults import plan
from support.fault.jobs import Job, owner
from support.fault.model import check
from support.fault.proxy import proxy
from support.fault.ranks import ranks
from support.fault.report import Report

WORLD = 3
EXCHANGES_PER_STEP = 12
_LARGE_EVERY = 20  # steps: a connection may break within an array that travels in parts
_TELL_EVERY = 500
# The next connection may be swallowed as well, from its first byte: by itself a service gives a rank half a second to
# come back, because a killed one looks the same.
AWAY = "--away=10"
_EXCHANGES_PER_FAULT = 60  # at most, all ranks together

Progress = Callable[[str], None]


def exchanges_under_faults(folder: Path, seed: int, exchanges: int, progress: Progress) -> Report:
    """Train for so many exchanges, while every connection of every rank ends as the seed says."""
    report = Report(f"exchanges under the fault proxy, seed {seed}")
    steps = -(-exchanges // EXCHANGES_PER_STEP)
    with (
        daemon(folder / "service", AWAY) as service,
        ranks(WORLD, folder / "ranks") as team,
        proxy(service.address, WORLD, lambda rank, number: plan(seed, rank, number)) as between,
    ):
        options = {"large_every": _LARGE_EVERY}
        job = Job("wire", team, between.addresses, folder, seed=seed, until=steps, options=options)
        try:
            job.expect("joined")
            for count in range(_TELL_EVERY, exchanges, _TELL_EVERY):
                job.await_progress([count] * WORLD, quiet=team)
                progress(f"{count} exchanges, {between.struck.total()} faults")
            job.finish()
            histories = job.histories()
            job.leave()
            report.add(check(histories, owner(service.address, "wire")))
            if between.struck.total() < exchanges / _EXCHANGES_PER_FAULT:
                report.add([f"only {between.struck.total()} connections broke: the test does not test"])
            struck = ", ".join(f"{count} {kind}" for kind, count in sorted(between.struck.items()))
            report.done = f"{len(histories[0])} exchanges of {WORLD} ranks; {between.struck.total()} faults: {struck}"
        except AssertionError as error:
            report.add([str(error), *between.story[-5:], service.output()])
        report.story = between.story
    return report
