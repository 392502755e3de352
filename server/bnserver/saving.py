"""Keeps the jobs of a service in its state directory: journals, snapshots, and jobs that are over.

A record is appended before the answers that depend on it are sent. If that fails (a full disk), the jobs go on in
memory, the log and the health service report it, and a snapshot is tried every second until it is on disk.

A job that is over and saved is dropped from memory; the first rank that joins it again has it read from its file.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from bnserver.core.effects import Persist, Record
from bnserver.core.journal_records import JournalRecord
from bnserver.core.service import Service
from bnserver.counts import Counts
from bnserver.job_file import StoreError
from bnserver.logs import fields
from bnserver.store import Store

_log = logging.getLogger("bnserver")

SavingCallback = Callable[[bool], Coroutine[Any, Any, None]]


class Saving:
    """What a service does to keep its jobs.

    Args:
        store: where.
        service: whose.
        report: called with False when jobs can't be saved, and with True when they can again.
        counts: where saves are counted.

    Attributes:
        tasks: saves in progress.
        unsaved: the jobs that could not be saved, and why.
    """

    def __init__(
        self, store: Store, service: Service, report: Callable[[bool], None], counts: Counts | None = None
    ) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.unsaved: dict[str, StoreError] = {}
        self._store = store
        self._service = service
        self._report = report
        self._counts = counts or Counts()
        self._due: set[str] = set()  # jobs of which a snapshot will be taken
        self._recalling = asyncio.Lock()

    def record(self, effect: Record) -> None:
        """Append a record, without a thread: it goes to the kernel's page cache, and is not synced."""
        try:
            self._store.append(effect.job, effect.record)
        except StoreError as error:
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

    def try_again(self) -> None:
        """Save what could not be saved."""
        if not self.tasks:
            for job in self.unsaved:
                self._start(job)

    async def finish(self) -> None:
        """Save every job whose snapshot is out of date.

        Raises:
            StoreError: a job could not be saved.
        """
        for job in self._service.jobs:
            if not self._store.is_saved(job):
                self._start(job)
        await asyncio.gather(*self.tasks)
        for error in self.unsaved.values():
            raise error

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

    def _start(self, job: str) -> None:
        if job not in self._due:
            self._due.add(job)
            task = asyncio.create_task(self._save(job))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _save(self, job: str) -> None:
        def records() -> list[JournalRecord]:
            self._due.discard(job)
            return self._service.records(job)

        try:
            await self._store.save(job, records)
        except StoreError as error:
            self._could_not_save(job, error)
            return
        self._counts.saves += 1
        if self.unsaved.pop(job, None) is not None:
            _log.warning("Job %r is saved again.", job, extra=fields(job=job))
            self._report(not self.unsaved)
        self.release(job)

    def _could_not_save(self, job: str, error: StoreError) -> None:
        self._counts.failed_saves += 1
        if job not in self.unsaved:
            said = fields(job=job)
            _log.error("%s It goes on in memory; a new attempt is made every second.", error, extra=said)
        self.unsaved[job] = error
        self._report(not self.unsaved)
