"""`--metrics`: what Prometheus reads.

Each scrape takes an observation in the event loop, which costs microseconds a rank, and makes text of it in a thread of
its own. Exchanges pay for nothing but the sums that the core keeps anyway. Series are bounded: of jobs that are not
over, and no more than `MOST_JOBS` of these and `MOST_RANKS` ranks.

A job is named by the label `job_name`: `job` is Prometheus's own, for what it scrapes.

With certificates the port speaks TLS, with the service's own; with tokens a scrape shows one, and sees its jobs.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from bnserver.admission import Admission
from bnserver.core.generation import Phase
from bnserver.core.observation import JobObservation
from bnserver.core.waiting import BOUNDS
from bnserver.servicer import Servicer
from bnserver.tls import Certificates

MOST_JOBS = 1000
MOST_RANKS = 10_000
_ANSWER_S = 5.0  # the loop takes an observation within milliseconds


class Source:
    """Where metrics come from.

    Args:
        exchanges: serves the ranks.
        loop: in which it does so.
        admission: lets calls in; None: everybody may.
        certificates: of the service; None: plain text.
        state_dir: where jobs are saved; None: nowhere.
    """

    def __init__(
        self,
        exchanges: Servicer,
        loop: asyncio.AbstractEventLoop,
        admission: Admission | None,
        certificates: Certificates | None,
        state_dir: Path | None,
    ) -> None:
        self.exchanges = exchanges
        self.admission = admission
        self.certificates = certificates
        self.state_dir = state_dir
        self.started = time.time()
        self._loop = loop

    def collector(self, covers: Callable[[str], bool]) -> Collector:
        """What a registry collects, of the jobs that `covers` returns True for; made and used in any thread."""
        return _Collector(self, covers)

    def observe(self, covers: Callable[[str], bool]) -> Seen:
        """One observation of all jobs.

        Raises:
            TimeoutError: the event loop does not answer.
        """

        async def look() -> Seen:
            return Seen(self.exchanges, covers)

        return asyncio.run_coroutine_threadsafe(look(), self._loop).result(_ANSWER_S)


class Seen:
    """What the service looks like at one moment.

    Args:
        exchanges: serves the ranks; asked in its own event loop.
        covers: which jobs are looked at.
    """

    def __init__(self, exchanges: Servicer, covers: Callable[[str], bool]) -> None:
        active = exchanges.jobs.active
        counts = exchanges.counts
        counts.forget(frozenset(active))
        covered = [job for job in active if covers(job)]
        self.jobs: list[JobObservation] = []
        self.phases = dict.fromkeys(Phase, 0)
        ranks = 0
        for job in exchanges.jobs.observe(covered):
            self.phases[job.phase] += 1
            ranks += len(job.ranks)
            if len(self.jobs) < MOST_JOBS and ranks <= MOST_RANKS:
                self.jobs.append(job)
        self.left_out = len(covered) - len(self.jobs)
        self.kept = exchanges.jobs.kept
        self.connections = {"stream": exchanges.connections, "local_socket": exchanges.local_sockets}
        self.unsaved = exchanges.jobs.unsaved
        self.saves, self.failed_saves = counts.saves, counts.failed_saves
        self.failed, self.endings = dict(counts.failed), dict(counts.endings)
        self.handling = tuple(counts.handling.counts), counts.handling.seconds
        self.traffic = {job.job: counts.traffic(job.job) for job in self.jobs}


class _Collector(Collector):
    def __init__(self, source: Source, covers: Callable[[str], bool]) -> None:
        self._source = source
        self._covers = covers

    def collect(self) -> Iterator[Metric]:
        seen = self._source.observe(self._covers)
        yield from of_service(seen, self._source)
        yield from of_jobs(seen)


def of_service(seen: Seen, source: Source) -> Iterator[Metric]:
    """What is true of the service as a whole."""
    phases = {
        "joining": seen.phases[Phase.JOINING],
        "running": seen.phases[Phase.RUNNING],
        "recovering": seen.phases[Phase.RECOVERING],
        "over": seen.kept,
    }
    yield _gauge(
        "jobs",
        "Jobs in memory, by state. Those that are over are there until they are saved.",
        ("state",),
        _labelled(phases),
    )
    yield _gauge("start_timestamp_seconds", "When the service was started.", (), [((), source.started)])
    yield _gauge(
        "jobs_left_out",
        f"Jobs without series of their own: more than {MOST_JOBS}, or of more than {MOST_RANKS} ranks together.",
        (),
        [((), seen.left_out)],
    )
    yield _gauge("connections", "Ranks that are connected, by channel.", ("channel",), _labelled(seen.connections))
    refused = source.admission.refused if source.admission is not None else {}
    why = {reason: refused.get(reason, 0) for reason in ("unauthenticated", "permission")}
    yield _counter("refused_calls", "Calls that were refused for their token.", ("reason",), _labelled(why))
    yield _counter("failed_streams", "Streams of ranks that ended with an error.", ("reason",), _labelled(seen.failed))
    yield _counter(
        "ended_generations",
        "Runs of a job's ranks that are over, by the error that the ranks got.",
        ("reason",),
        _labelled({"none": 0, "PEER_LOST": 0} | seen.endings),
    )
    handling = _histogram(
        "handling_seconds", "What the service itself takes, from an operation's last contribution to its answers.", ()
    )
    handling.add_metric((), *_buckets(*seen.handling))
    yield handling
    yield _counter("saves", "Snapshots of jobs that were written.", (), [((), seen.saves)])
    yield _counter(
        "failed_saves", "Snapshots and journal records that could not be written.", (), [((), seen.failed_saves)]
    )
    yield _gauge("unsaved_jobs", "Jobs that could not be saved, and are tried again.", (), [((), seen.unsaved)])
    if source.state_dir is not None:
        disk = os.statvfs(source.state_dir)
        yield _gauge("state_dir_free_bytes", "Room in the state directory.", (), [((), disk.f_bavail * disk.f_frsize)])
    if source.certificates is not None:
        expires = source.certificates.loaded.tried.expires.timestamp()
        yield _gauge("certificate_expiry_timestamp_seconds", "When the certificate ends.", (), [((), expires)])


def of_jobs(seen: Seen) -> Iterator[Metric]:
    """What is true of each job, and of each of its ranks."""
    jobs = [((job.job,), job) for job in seen.jobs]
    ranks = [((job.job, str(rank.peer.rank)), rank) for job in seen.jobs for rank in job.ranks]
    of_job, of_rank = ("job_name",), ("job_name", "rank")
    operations = _counter(
        "operations", "Operations that all ranks of a job have completed.", ("job_name", "operation", "direction"), ()
    )
    took = _histogram(
        "operation_seconds", "From an operation's first contribution to its last: what ranks wait for.", of_job
    )
    for label, job in jobs:
        for (operation, direction), count in job.operations.items():
            operations.add_metric((*label, operation, direction or "none"), count)
        took.add_metric(label, *_buckets(job.took, job.took_seconds))
    yield operations
    yield took
    received = [((job,), traffic.received) for job, traffic in seen.traffic.items()]
    sent = [((job,), traffic.sent) for job, traffic in seen.traffic.items()]
    yield _counter("received_bytes", "Bytes of arrays that the ranks of a job have sent.", of_job, received)
    yield _counter("sent_bytes", "Bytes of arrays that the ranks of a job were sent.", of_job, sent)
    yield _gauge("job_ranks", "Ranks of a job.", of_job, [(label, job.world_size) for label, job in jobs])
    yield _gauge(
        "job_connected_ranks",
        "Ranks of a job that have joined, and are connected.",
        of_job,
        [(label, sum(rank.is_connected for rank in job.ranks)) for label, job in jobs],
    )
    yield _gauge("job_layers", "Layers of a job.", of_job, [(label, job.layers) for label, job in jobs])
    yield _gauge(
        "job_version",
        "The highest version among a job's layers.",
        of_job,
        [(label, job.version) for label, job in jobs],
    )
    yield _counter(
        "rank_waited_seconds",
        "For how long a rank has waited for others.",
        of_rank,
        [(label, rank.waited) for label, rank in ranks],
    )
    yield _counter(
        "rank_held_up_seconds",
        "For how long all others have waited for this rank alone: the straggler's grows.",
        of_rank,
        [(label, rank.held_up) for label, rank in ranks],
    )
    yield _gauge(
        "rank_awaited_seconds",
        "For how long others have been waiting for this rank now.",
        of_rank,
        [(label, rank.awaited) for label, rank in ranks],
    )


_Labels = tuple[str, ...]


def _labelled(values: dict[str, int]) -> list[tuple[_Labels, float]]:
    return [((name,), value) for name, value in values.items()]


def _gauge(name: str, text: str, labels: _Labels, values: Iterable[tuple[_Labels, float]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"bnserver_{name}", text, labels=labels)
    for label, value in values:
        family.add_metric(label, value)
    return family


def _counter(name: str, text: str, labels: _Labels, values: Iterable[tuple[_Labels, float]]) -> CounterMetricFamily:
    family = CounterMetricFamily(f"bnserver_{name}", text, labels=labels)
    for label, value in values:
        family.add_metric(label, value)
    return family


def _histogram(name: str, text: str, labels: _Labels) -> HistogramMetricFamily:
    return HistogramMetricFamily(f"bnserver_{name}", text, labels=labels)


def _buckets(counts: tuple[int, ...], seconds: float) -> tuple[list[tuple[str, float]], float]:
    """What a family takes: cumulative counts, and the sum."""
    cumulative, total = [], 0
    for bound, count in zip((*map(str, BOUNDS), "+Inf"), counts, strict=True):
        total += count
        cumulative.append((bound, float(total)))
    return cumulative, seconds
