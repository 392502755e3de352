"""Where the output of a job's processes goes: to the screen, line by line, and into files of a log folder.

    rank-0.out, rank-0.err, …   the bytes that the rank wrote, unchanged
    launch.log                  lines of the launcher itself, mpiexec and the service's stderr, with the time
    service.log                 the log of the job's own service, which writes it itself

Laws:
1. A byte is in its file before it is on the screen, and no later than the launcher has it: a file's end is true
   even after kill -9.
2. A file that cannot be written any more is reported once; the job goes on, and so does the screen.
3. Each of the launcher's two outputs has its own style: one may be a terminal, the other a pipe.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from bnworker.launcher.prefix import Prefixer, Style
from bnworker.launcher.reactor import Consumer, OutputPipe, Reactor, Sink
from bnworker.launcher.starting import Job, LaunchError

_IN_LOGS = Style(timestamps=True, colour=False)
_STDOUT, _STDERR = 1, 2


@dataclass(frozen=True, slots=True)
class Output:
    """What the user wants to see and to keep.

    Attributes:
        timestamps: before each line on the screen; None: on a terminal alone.
        log_dir: the folder for the log files, made if need be; None: none are written.
    """

    timestamps: bool | None = None
    log_dir: Path | None = None


class Log:
    """A file that gets bytes as they come.

    Args:
        path: of the file; what it held is gone.
        failed: called once, with an error line, when it can't be written.
    """

    def __init__(self, path: Path, failed: Callable[[str], None]) -> None:
        self._path = path
        self._failed = failed
        # Unbuffered: nothing is lost with this process.
        self._file = path.open("wb", buffering=0)

    def feed(self, chunk: bytes) -> None:
        """Write at once."""
        rest = memoryview(chunk)
        try:
            while rest and not self._file.closed:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.close()
            self._failed(f"{self._path}: {error.strerror}; what follows is on the screen alone")

    def finish(self) -> None:
        """Close it."""
        self._file.close()

    def go_on(self) -> None:
        """Open it again, after another process of the same rank."""
        if self._file.closed:
            try:
                self._file = self._path.open("ab", buffering=0)
            except OSError as error:
                self._failed(f"{self._path}: {error.strerror}; what follows is on the screen alone")


class _Screen:
    """Output as lines with their heads, for a sink or a log."""

    def __init__(self, put: Callable[[bytes], None], style: Style, label: str, rank: int | None) -> None:
        self._put = put
        self._lines = Prefixer(lambda: style.head(label, rank, datetime.now(UTC).astimezone()))

    def feed(self, chunk: bytes) -> None:
        self._put(self._lines.feed(chunk))

    def finish(self) -> None:
        self._put(self._lines.finish())


class Outputs:
    """The outputs of one job.

    Args:
        reactor: waits for the processes' output, and until the screen can take it.
        job: whose processes.
        output: what the user wants.
        environ: NO_COLOR and TERM.
        unread: called when the reader of the launcher's output has closed it.

    Raises:
        LaunchError: a log file cannot be written.
    """

    def __init__(
        self, reactor: Reactor, job: Job, output: Output, environ: Mapping[str, str], unread: Callable[[], None]
    ) -> None:
        self._reactor = reactor
        self._out, self._err = Sink(reactor, _STDOUT, unread), Sink(reactor, _STDERR, unread)
        self._out_style, self._err_style = (
            Style.of(terminal=os.isatty(descriptor), timestamps=output.timestamps, environ=environ)
            for descriptor in (_STDOUT, _STDERR)
        )
        self._label = f"bnlayer {job.program}:"  # in front of the launcher's own lines
        self._host = os.uname().nodename if job.several is not None else ""
        self._pipes: list[OutputPipe] = []
        self._logs = _opened(job, output.log_dir, self._write_on_screen) if output.log_dir is not None else {}

    def rank(self, descriptor: int, rank: int, kind: str) -> None:
        """Pass on a rank's output; kind is "out" or "err"."""
        sink, style = (self._out, self._out_style) if kind == "out" else (self._err, self._err_style)
        log = self._logs.get(f"rank-{rank}.{kind}")
        if log is not None:
            log.go_on()
        label = f"[{self._host}:{rank}]" if self._host else f"[{rank}]"
        shown = _Screen(sink.put, style, label, rank)
        self._read(descriptor, sink, [log, shown] if log is not None else [shown])

    def other(self, descriptor: int, name: str) -> None:
        """Pass on the output of a process that is no rank."""
        label = f"[{name}]"
        shown = _Screen(self._err.put, self._err_style, label, None)
        log = self._logs.get("launch.log")
        consumers = [_Screen(log.feed, _IN_LOGS, label, None), shown] if log is not None else [shown]
        self._read(descriptor, self._err, consumers)

    def _read(self, descriptor: int, sink: Sink, consumers: Sequence[Consumer]) -> None:
        self._pipes.append(OutputPipe(self._reactor, descriptor, sink, consumers))

    def announce(self, text: str) -> None:
        """A line of the launcher's own."""
        if (log := self._logs.get("launch.log")) is not None:
            self._line(log.feed, _IN_LOGS, text)
        self._write_on_screen(text)

    def _write_on_screen(self, text: str) -> None:
        self._line(self._err.put, self._err_style, text)

    def _line(self, put: Callable[[bytes], None], style: Style, text: str) -> None:
        _Screen(put, style, self._label, None).feed(f"{text}\n".encode())

    @property
    def written(self) -> bool:
        """Whether the screen got everything."""
        return self._out.empty and self._err.empty

    def close(self) -> None:
        """Pass on what has arrived, without waiting for more."""
        for pipe in self._pipes:
            pipe.drain()
        for log in self._logs.values():
            log.finish()


def _opened(job: Job, folder: Path, failed: Callable[[str], None]) -> dict[str, Log]:
    names = ["launch.log", *(f"rank-{rank}.{kind}" for rank in job.local_ranks for kind in ("out", "err"))]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return {name: Log(folder / name, failed) for name in names}
    except OSError as error:
        raise LaunchError(f"--log-dir: {error.filename}: {error.strerror}") from None
