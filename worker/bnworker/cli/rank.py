"""One rank of `bnlayer train`, from joining to the files it leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlayer import CollectiveError, RegroupError
from bnlayer.environment import variable
from bnworker.cli.errors import RESUMABLE, CommandError
from bnworker.cli.files import Files
from bnworker.cli.interruption import Interruption, WaitInterrupted, ignore_batch_systems
from bnworker.cli.lines import write_line
from bnworker.elastic_job import elastic
from bnworker.joining import join
from bnworker.limits import VARIABLE
from bnworker.train.checkpoint import Checkpoint, CheckpointError, encode, labels_of, read, read_by_first
from bnworker.train.data import DataError, Dataset, listed, load
from bnworker.train.elastic import Kept
from bnworker.train.events import Event
from bnworker.train.files import write_atomically
from bnworker.train.initial import Sizes
from bnworker.train.initial import read_by_first as initial_by_first
from bnworker.train.loop import DivergedError, Outcome, Replica, Saving, StoppedError, train
from bnworker.train.report.recorder import Recorder
from bnworker.train.settings import Settings
from bnworker.train.summary import summary, summary_file
from bnworker.train.weight_files import WeightFileError
from bnworker.world import World

if TYPE_CHECKING:
    from bnworker.cli.display import Display


@dataclass(frozen=True, slots=True)
class _Stopped:
    """A signal ended the run before it was over; the same on every rank, whichever of them received it."""

    signal: signal.Signals
    saved: bool

    @property
    def code(self) -> int:
        """What the rank exits with: Ctrl-C was a person, who knows; others must tell whether it can be resumed."""
        resumable = self.saved and self.signal != signal.SIGINT
        return RESUMABLE if resumable else 128 + self.signal


def run(
    data: str,
    settings: Settings,
    *,
    transport: str | None,
    address: str | None,
    job: str | None,
    replica: Replica,
    files: Files,
) -> None:
    """Train as the rank that the environment announces; the first one shows progress and writes the files.

    Raises:
        CommandError: joining failed, the data or the checkpoint is bad, or a file cannot be written.
        SystemExit: training failed; it was said why.
    """
    if variable(os.environ, VARIABLE) is not None:
        _run_elastic(data, settings, address=address, job=job, files=files)
        return
    try:
        # Floats in rank order: over MPI too, the result then is the service's, and a resumed run's that of another.
        world = join(transport=transport, address=address or None, job=job or None, deterministic=True)
    except CollectiveError as error:
        raise CommandError(f"train: {type(error).__name__}: {error}", 1) from None
    except (ValueError, ImportError, RuntimeError) as error:
        raise CommandError(f"train: {error}") from None
    first = world.rank == 0 and replica.index == 0
    with world:
        problem = _train(data, settings, world, replica, files, first=first)
    _end(problem, first=first)


def _run_elastic(data: str, settings: Settings, *, address: str | None, job: str | None, files: Files) -> None:
    """The same as one of the ranks of an elastic job, which may change while it runs."""
    kept, first, interruption = Kept(), False, Interruption()
    problem: DataError | CheckpointError | WeightFileError | _Stopped | None = None
    try:
        with interruption:
            generations = elastic(kept, address=address or None, job=job or None)
            while True:
                try:
                    with interruption.waiting():
                        generation = next(generations, None)
                except WaitInterrupted:
                    problem = _stopped_between(kept.checkpoint, interruption, files, first=first)
                    break
                if generation is None:
                    break
                with generation as world:
                    first = world.rank == 0
                    problem = _train(data, settings, world, Replica(), files, first=first, elastic=(kept, interruption))
                if generation.change is not None:
                    first = world.rank == min(set(range(world.world_size)) - set(generation.change.ranks), default=-1)
    except CollectiveError as error:
        raise CommandError(f"train: {type(error).__name__}: {error}", 1) from None
    except (ValueError, ImportError, RuntimeError) as error:
        raise CommandError(f"train: {error}") from None
    _end(problem, first=first)


def _stopped_between(latest: Checkpoint | None, interruption: Interruption, files: Files, *, first: bool) -> _Stopped:
    """Stop where the ranks of an elastic job are no world: some are lost, and who of the others is first is open.

    Each holds the state after the step before, or after the one before that. Either is good to go on from, so each
    writes it, unless the file is as far already; the first of those that are left says so even then.
    """
    assert interruption.signal is not None
    saving = _saving(files)
    ended = _Stopped(interruption.signal, latest is not None and saving is not None)
    if ended.code == RESUMABLE:
        ignore_batch_systems()
    if latest is None or saving is None:
        return ended
    assert files.save is not None
    if behind := not _has(files.save, latest):
        saving.write(latest)
    if behind or first:
        write_line(
            f"bnlayer: train: {ended.signal.name}: stopped after step {latest.progress.steps:,}, while the ranks "
            f"formed the next generation; {files.save} goes on from there with --resume",
            error=True,
        )
    return ended


def _has(path: Path, latest: Checkpoint) -> bool:
    """Whether a file has a state of the same run, as late as this one or later."""
    try:
        saved = read(path)
    except CheckpointError:
        return False
    same = saved is not None and (saved.settings, saved.data) == (latest.settings, latest.data)
    return same and saved is not None and saved.progress.steps >= latest.progress.steps


def _end(problem: DataError | CheckpointError | WeightFileError | _Stopped | None, *, first: bool) -> None:
    if isinstance(problem, _Stopped):
        raise SystemExit(problem.code)
    if problem is not None:
        # The same on every rank, so no notification was needed: one prints it.
        if first:
            raise CommandError(f"train: {problem}")
        raise SystemExit(2)


def _train(
    data: str,
    settings: Settings,
    world: World,
    replica: Replica,
    files: Files,
    *,
    first: bool,
    elastic: tuple[Kept, Interruption] | None = None,
) -> DataError | CheckpointError | WeightFileError | _Stopped | None:
    """Train, show and write; returns what every rank finds wrong with what the user gave, or that it was stopped.

    `elastic`: of a rank of an elastic job, its latest state and its signals, which are more than one generation's.
    """
    recorder: Recorder | None = None
    kept, interruption = elastic or (None, Interruption())
    try:
        start = _start(world, files, kept)
        loaded = load(
            data,
            settings.dtype,
            world=world,
            validation_split=settings.validation_split,
            labels=labels_of(settings, start),
        )
        if first and loaded.ignored:
            write_line(f"bnlayer: train: --data {data}: not read: {listed(loaded.ignored)}", error=True)
        settings = settings.completed(None if start is None else start.settings)
        initial = _initial(world, settings, loaded, start, first=first)
        steps_per_epoch = loaded.steps_per_epoch(settings.batch_size, settings.last_batch)
        steps = settings.total_steps(steps_per_epoch)
        display = _display(steps, settings.epochs, world) if first else None
        recorder = Recorder(files.report, files.tensorboard, steps, steps_per_epoch) if first else None
        watching = [each for each in (display, recorder) if each is not None]

        def watch(event: Event) -> None:
            for each in watching:
                each.watch(event)

        saving = _saving(files) if first else None
        outcome: Outcome | StoppedError
        with interruption if elastic is None else nullcontext():
            with display or nullcontext():
                try:
                    outcome = train(
                        settings,
                        loaded,
                        world,
                        replica,
                        watch,
                        start=start,
                        initial=initial,
                        saving=saving,
                        stop=interruption.asked,
                        keep=None if kept is None else kept.keep,
                    )
                except StoppedError as error:
                    outcome = error
            if isinstance(outcome, StoppedError):
                # The signal that stopped another rank may reach this one only now: it must not end it.
                by = _agreed(world, interruption.signal)
                return _end_stopped(by, outcome.steps, data, settings, world, files, recorder)
    except (DataError, CheckpointError, WeightFileError) as error:
        _report_failure(recorder, data, settings, world, str(error))
        return error
    except RegroupError:  # the ranks of an elastic job go on
        raise
    except (CollectiveError, DivergedError) as error:
        # Printed here, because leaving a broken MPI world may end the process.
        rank = replica.index if replica.count > 1 else world.rank
        why = f"{type(error).__name__}: {error}"
        write_line(f"bnlayer: train: rank {rank}: {why}", error=True)
        _report_failure(recorder, data, settings, world, why)
        raise SystemExit(1) from None
    if recorder is not None and display is not None:
        _finish(outcome, world, replica, settings, data, files, display, recorder)
    return None


def _display(steps: int, epochs: int, world: World) -> Display:
    from bnworker.cli.display import Display  # here: what draws it is nothing to the ranks that show nothing

    return Display(steps, epochs, plain=world.transport == "mpi")


def _start(world: World, files: Files, kept: Kept | None) -> Checkpoint | None:
    """Where to go on: from what the ranks of an elastic job had, or the file; None: from the beginning."""
    if kept is not None and kept.checkpoint is not None:
        return kept.checkpoint
    return read_by_first(world, files.save) if files.resume and files.save is not None else None


def _agreed(world: World, received: signal.Signals | None) -> signal.Signals:
    """The signal that stopped the run, where ranks received different ones or none; a batch system's before Ctrl-C."""
    (number,) = world.allreduce([np.array([received or 0])], op="max")
    return signal.Signals(int(number[0]) or signal.SIGINT)


def _end_stopped(
    by: signal.Signals, steps: int, data: str, settings: Settings, world: World, files: Files, recorder: Recorder | None
) -> _Stopped:
    """Say that the run was stopped, and let no rank end before everything is written."""
    ended = _Stopped(by, files.save is not None)
    if ended.code == RESUMABLE:
        ignore_batch_systems()
    if recorder is not None:
        kept = f"; {files.save} goes on from there with --resume" if files.save is not None else ""
        write_line(f"bnlayer: train: {by.name}: stopped after step {steps:,}{kept}", error=True)
        _report_failure(recorder, data, settings, world, f"{by.name} after step {steps:,}.", stopped=True)
    # An exit code other than 0 makes mpiexec, and srun --kill-on-bad-exit, kill the ranks that still run.
    world.barrier()
    return ended


def _initial(
    world: World, settings: Settings, data: Dataset, start: Checkpoint | None, *, first: bool
) -> dict[str, NDArray[Any]] | None:
    """The weights of `--init-from`; a run that goes on from a checkpoint has its own."""
    if start is not None or settings.init_from is None:
        return None
    initial = initial_by_first(world, Path(settings.init_from), Sizes.of(settings, data))
    if first:
        write_line(initial.text)
    return initial.tensors


def _saving(files: Files) -> Saving | None:
    path = files.save
    if path is None:
        return None

    def write(checkpoint: Checkpoint) -> None:
        try:
            write_atomically(path, encode(checkpoint))
        except OSError as error:
            kept = " The file is as it was before." if path.exists() else ""
            raise CommandError(
                f"train: --save {path}: step {checkpoint.progress.steps} could not be saved: {error.strerror}.{kept}", 1
            ) from None

    return Saving(write, files.save_every)


def _finish(
    outcome: Outcome,
    world: World,
    replica: Replica,
    settings: Settings,
    data: str,
    files: Files,
    display: Display,
    recorder: Recorder,
) -> None:
    contents = summary(outcome, world, replica, settings, data)
    display.table(outcome, contents)
    if files.summary is not None:
        try:
            write_atomically(files.summary, summary_file(contents))
        except OSError as error:
            raise CommandError(f"train: {error}", 1) from None
    _report(recorder, contents)


def _report_failure(
    recorder: Recorder | None, data: str, settings: Settings, world: World, why: str, *, stopped: bool = False
) -> None:
    if recorder is not None:
        run = {"data": data, "world_size": world.world_size, "transport": world.transport}
        _report(recorder, {**run, "settings": settings.as_json()}, why, stopped=stopped)


def _report(
    recorder: Recorder, contents: Mapping[str, Any], failure: str | None = None, *, stopped: bool = False
) -> None:
    try:
        page = recorder.finish(contents, failure, stopped=stopped)
    except OSError as error:
        raise CommandError(f"train: --report: {error}", 1) from None
    if page is not None:
        write_line(f"report: {page}")
