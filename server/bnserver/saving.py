"""Keeps the jobs of a service in its state directory: journals, snapshots, and jobs that are over.

A record is appended before the answers that depend on it are sent. If that fails (a full disk), the jobs go on in
memory, the log and the health service report it, and a snapshot is tried every second until it is on disk.

Saves are independent of each other: where one fails, its job alone is unsaved; that is logged, and tried again.

A job that is over and saved is dropped from memory; the first rank that joins it again has it read from its file.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from bnserver.core.effects import Persist, Record
from bnserver.core.journal_records import JournalRecord
from bnserver.core.service import Service
from bnserver.counts import Counts
from bnserver.job_file import StoreError
from bnserver.logs import fields
from bnserver.retention import Keep, SteadyTime, log_forgotten
from bnserver.store import Store

_log = logging.getLogger("bnserver")

_LISTED = 5  # jobs in one error
_DELETED_AT_ONCE = 100  # files, in one turn of the event loop

SavingCallback = Callable[[bool], Coroutine[Any, Any, None]]


class Saving:
    """What a service does to keep its jobs.

    Args:
        store: where.
        service: whose.
        report: called with False when jobs can't be saved, and with True when they can again.
        keep: what is kept of jobs that are over; None: everything.
        counts: where saves are counted.

    Attributes:
        tasks: saves in progress.
        unsaved: the jobs that could not be saved, and why.
    """

    def __init__(
        self,
        store: Store,
        service: Service,
        report: Callable[[bool], None],
        keep: Keep | None = None,
        counts: Counts | None = None,
    ) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.unsaved: dict[str, Exception] = {}
        self._store = store
        self._service = service
        self._report = report
        self._keep = keep or Keep()
        self._counts = counts or Counts()
        self._due: set[str] = set()  # jobs of which a snapshot will be taken
        self._saves: dict[str, set[asyncio.Task[None]]] = {}  # in progress, by job
        self._recalling = asyncio.Lock()
        self._clock = SteadyTime(time.time(), time.monotonic())

    def record(self, effect: Record) -> None:
        """Append a record, without a thread: it goes to the kernel's page cache, and is not synced."""
        try:
            self._store.append(effect.job, effect.record)
        except Exception as error:  # noqa: BLE001 - the rim: another job must not suffer from it
            self._could_not_save(effect.job, error)
        if self._store.long(effect.job):
            self._start(effect.job)

    def persist(self, effect: Persist) -> None:
        """Begin to save a job as a snapshot."""
        self._start(effect.job)

    def persist_finished(self) -> None:
        """Save the jobs whose end is in their journal, but not in a snapshot yet."""
        for job in self._service.jobs:
            if self._service.is_over(job):
                self._start(job)

    def retry(self) -> None:
        """Save what could not be saved."""
        if not self.tasks:
            for job in self.unsaved:
                self._start(job)

    def in_progress(self, job: str) -> tuple[asyncio.Task[None], ...]:
        """The saves of a job that have begun, or will."""
        return tuple(self._saves.get(job, ()))

    async def finish(self) -> None:
        """Save every job whose snapshot is out of date.

        Raises:
            StoreError: a job could not be saved.
        """
        for job in self._service.jobs:
            if not self._store.is_saved(job):
                self._start(job)
        await asyncio.gather(*self.tasks)
        if self.unsaved:
            (job, error), *others = self.unsaved.items()
            text = described(job, error)
            if others:
                names = ", ".join(repr(name) for name, _ in others[:_LISTED])
                text += f" Nor could {len(others)} more: {names}{', …' if len(others) > _LISTED else ''}."
            raise StoreError(text) from error

    async def recall(self, job: str, now: Callable[[], float]) -> None:
        """Load a job that is over, if there is one of this name on disk.

        Args:
            job: its name.
            now: the core's time.

        Raises:
            StoreError: its file is corrupt.
            RecoveryError: its records are inconsistent.
        """
        if self._service.knows(job):
            return
        async with self._recalling:
            if not self._service.knows(job) and self._store.holds(job):
                records = await asyncio.to_thread(self._store.read, job)
                self._service.recall(job, records, now())

    def release(self, job: str) -> None:
        """Drop a job from memory if it is over, and saved as it is."""
        if job not in self._due and self._service.is_over(job) and self._store.is_saved(job):
            self._service.forget(job)
            self._store.release(job)

    async def expire(self) -> None:
        """Delete the files of jobs that are over, and not kept any more. Ranks that come back find a new job."""
        if self._keep.is_everything:
            return
        ended = await asyncio.to_thread(self._store.last_written)
        for name in self._in_memory():
            ended.pop(name, None)
        expired = self._keep.expired(ended, self._clock.time(time.time(), time.monotonic()))
        for start in range(0, len(expired), _DELETED_AT_ONCE):
            async with self._recalling:  # what is being read back is in memory afterwards
                in_memory = self._in_memory()
                for name in expired[start : start + _DELETED_AT_ONCE]:
                    if name not in in_memory:
                        self._store.delete(name)
            await asyncio.sleep(0)
        log_forgotten(expired)

    def _in_memory(self) -> set[str]:
        """The names of the files of all jobs in memory."""
        return {self._store.path(job).name for job in self._service.jobs}

    def _start(self, job: str) -> None:
        if job not in self._due:
            self._due.add(job)
            task = asyncio.create_task(self._save(job))
            self.tasks.add(task)
            self._saves.setdefault(job, set()).add(task)
            task.add_done_callback(partial(self._done, job))

    def _done(self, job: str, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self._saves[job].discard(task)
        if not self._saves[job]:
            del self._saves[job]

    async def _save(self, job: str) -> None:
        taken = False

        def records() -> list[JournalRecord]:
            nonlocal taken
            taken = True
            self._due.discard(job)
            return self._service.records(job)

        try:
            await self._store.save(job, records)
        except Exception as error:  # noqa: BLE001 - the rim: it must neither end other saves nor the drain
            if not taken:
                self._due.discard(job)
            self._could_not_save(job, error)
            return
        self._counts.saves += 1
        if self.unsaved.pop(job, None) is not None:
            _log.warning("Job %r is saved again.", job, extra=fields(job=job))
            self._report(not self.unsaved)
        self.release(job)

    def _could_not_save(self, job: str, error: Exception) -> None:
        self._counts.failed_saves += 1
        if job not in self.unsaved:
            text = "%s It goes on in memory; a new attempt is made every second."
            # What no disk is to blame for is a fault of the service.
            trace = None if _is_of_the_disk(error) else error
            _log.error(text, described(job, error), exc_info=trace, extra=fields(job=job))
        self.unsaved[job] = error
        self._report(not self.unsaved)


def described(job: str, error: Exception) -> str:
    """Why a job could not be saved, as a sentence that names it."""
    if isinstance(error, StoreError):
        return str(error)
    return f"Job {job!r} could not be saved: {type(error).__name__}: {error}."


def _is_of_the_disk(error: Exception) -> bool:
    return isinstance(error, StoreError) and isinstance(error.__cause__, OSError | None)
