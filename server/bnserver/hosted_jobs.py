"""The jobs of a service: in the core, and on disk where there is a state directory.

It knows where a job is: running, over and still in memory, or over and in its file alone. So metrics, the
dashboard, `bnlayer jobs` and readers of statistics get from it what they show. It knows no connection and no
message, and decides nothing about a job: the core does (`core.service`), and `saving` says when it is written.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from bnlayer.state import LayerState
from bnserver.checkpoints import Checkpoints
from bnserver.core.members import LivenessTimeouts
from bnserver.core.observation import JobObservation
from bnserver.core.quotas import Quotas
from bnserver.core.recovery import RecoveryError
from bnserver.core.service import Service
from bnserver.core.suspend_aware_clock import SuspendAwareClock
from bnserver.counts import Counts
from bnserver.job_file import StoreError
from bnserver.retention import Keep, MemoryRetention
from bnserver.saving import Saving
from bnserver.store import Store


class HostedJobs:
    """All jobs of one run of the service.

    Args:
        store: where they are saved; None keeps them in memory alone.
        timeouts: how long the core waits for signs of life.
        quotas: in force.
        keep: what is kept of jobs that are over.
        counts: where saves are counted.
        report_saving: called with False when jobs can't be saved, and with True when they can again.

    Attributes:
        core: decides; another one once `load` has read the state directory.
        clock: what the core takes for the time.
        saving: keeps the jobs on disk; None without a store.
        retention: what forgets jobs that are over.
        checkpoints: what writes them.
    """

    def __init__(
        self,
        store: Store | None,
        timeouts: LivenessTimeouts,
        quotas: Quotas,
        keep: Keep,
        counts: Counts,
        report_saving: Callable[[bool], None],
    ) -> None:
        self._store = store
        self._timeouts = timeouts
        self._quotas = quotas
        self._keep = keep
        self._counts = counts
        self._report_saving = report_saving
        self._loaded = asyncio.Event()
        self.checkpoints = Checkpoints(
            store.directory if store is not None else None, quotas.checkpoints, keep.checkpoints
        )
        self.clock = SuspendAwareClock(time.monotonic())
        self._host(Service(timeouts=timeouts, quotas=quotas))

    def _host(self, core: Service) -> None:
        self.core = core
        self.saving: Saving | None = None
        if self._store is None:
            self.retention: Saving | MemoryRetention = MemoryRetention(self._keep, core)
        else:
            self.saving = Saving(self._store, core, self._report_saving, self._keep, self._counts)
            self.retention = self.saving

    def now(self) -> float:
        """The core's time."""
        return self.clock.time(time.monotonic())

    # ---- between memory and disk ----

    async def load(self) -> None:
        """Read the jobs that were not over when the service ended.

        Raises:
            StoreError: a file is corrupt.
        """
        journals = await asyncio.to_thread(self._store.load, finished=False) if self._store is not None else {}
        now = time.monotonic()
        self.clock = SuspendAwareClock(now)
        try:
            self._host(Service(journals, self._timeouts, now, self._quotas))
        except RecoveryError as error:
            raise StoreError(f"The state directory holds a job that makes no sense: {error}.") from error
        if self.saving is not None:
            self.saving.persist_finished()

    def accept(self) -> None:
        """Everything is ready: whoever waits in `ready` goes on."""
        self._loaded.set()

    async def ready(self) -> None:
        """Wait until the jobs are loaded."""
        await self._loaded.wait()

    async def recall(self, job: str) -> None:
        """Have a job in memory until `release`, if it is over and on disk.

        Raises:
            StoreError: its file is corrupt.
            RecoveryError: its records are inconsistent.
        """
        if self.saving is not None:
            await self.saving.recall(job, self.now)

    def release(self, job: str) -> None:
        """A job that was recalled may leave memory, unless it goes on."""
        if self.saving is not None:
            self.saving.release(job)

    # ---- what can be observed ----

    @property
    def active(self) -> Sequence[str]:
        """The names of the jobs that are not over."""
        return self.core.active

    @property
    def kept(self) -> int:
        """How many jobs are in memory, and over."""
        return len(self.core.jobs) - len(self.core.active)

    @property
    def unsaved(self) -> int:
        """How many jobs could not be saved, and are tried again."""
        return len(self.saving.unsaved) if self.saving is not None else 0

    def is_active(self, job: str) -> bool:
        """Whether a job is not over."""
        return self.core.is_active(job)

    def observe(self, jobs: Iterable[str]) -> Iterator[JobObservation]:
        """What there is to see of those jobs that are not over."""
        now = self.now()
        for job in jobs:
            if self.core.is_active(job):
                yield self.core.observe(job, now)

    async def states(self, job: str) -> Mapping[str, LayerState] | None:
        """The owner's states of a job, by layer; None if there is no such job. One that is over may be read for it.

        Raises:
            StoreError: its file is corrupt.
            RecoveryError: its records are inconsistent.
        """
        await self.ready()
        if self.saving is None or self.core.knows(job):
            return self.core.states(job) if self.core.knows(job) else None
        await self.recall(job)
        if not self.core.knows(job):
            return None
        states = self.core.states(job)
        self.release(job)
        return states
