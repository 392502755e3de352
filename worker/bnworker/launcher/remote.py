"""A job on several hosts that is started from one of them, or from elsewhere: a launcher on each host, over ssh.

    ssh HOST bnlayer launch --nnodes … --node-rank … --attached …        one for each host

The launchers meet by themselves (`nodes`), and node 0's supervises the job. What is left to do here: pass on their
output and the signals that come, and end with the code of the first cause. A launcher that is `--attached` reads its
standard input: a line is the number of a signal; its end, with the connection or with this process, is a SIGHUP.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bnlayer.environment import variable
from bnworker.launcher.nodes import parsed
from bnworker.launcher.prefix import Prefixer
from bnworker.launcher.reactor import OutputPipe, Reactor, Sink, signals
from bnworker.launcher.starting import LaunchError, detach

AGENT = "ssh -T"

# Of any ssh, after its own options, the first of which counts: no question is asked, since nobody is there to answer; a
# host that doesn't answer, or accepts a connection and says nothing, is given up, before and after the login.
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=1", "ServerAliveCountMax=5")

_SSH_FAILED = 255  # ssh's own code; otherwise its code is the remote command's
_LEFT_S = 30.0  # for the other hosts, once one connection has died: their launchers end the job within seconds


@dataclass(frozen=True, slots=True)
class Remote:
    """What to run, and where.

    Attributes:
        command: the program of every rank, and its arguments.
        hosts: names for ssh, each with its number of ranks.
        rendezvous: HOST:PORT, of the first host.
        insecure: whether plain text may be spoken there.
        agent: the command that stands in front of a host's name and a command line: `ssh -p 2222`. An ssh gets
            `_OPTIONS`.
        options: of the launchers.
    """

    command: tuple[str, ...]
    hosts: tuple[tuple[str, int], ...]
    rendezvous: str
    insecure: bool
    agent: str = AGENT
    options: tuple[str, ...] = ()

    def command_line(self, node: int, environ: Mapping[str, str]) -> list[str]:
        """What starts a node's launcher, in this folder and with the variables of this project."""
        name, ranks = self.hosts[node]
        first = sum(count for _, count in self.hosts[:node])
        launcher = [
            *(sys.executable, "-P", "-m", "bnworker.cli", "launch", "--attached"),
            *(f"--nnodes={len(self.hosts)}", f"--node-rank={node}", f"--rendezvous={self.rendezvous}"),
            *(f"--ranks={ranks}", f"--first-rank={first}", f"--world-size={sum(count for _, count in self.hosts)}"),
            *(["--insecure"] if self.insecure else []),
            *self.options,
            *("--", *self.command),
        ]
        ours = [f"{name}={value}" for name, value in environ.items() if name.startswith("BNLAYER_")]
        there = f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(['env', *ours, *launcher])}"
        agent = shlex.split(self.agent)
        if agent and Path(agent[0]).name == "ssh":
            agent += [part for option in _OPTIONS for part in ("-o", option)]
        return [*agent, name, there]


def launch(remote: Remote, environ: Mapping[str, str] = os.environ) -> int:
    """Run a job to its end; called in the main thread.

    Returns:
        The exit code: of the first connection that died (255, or 128 + signal), else of node 0's launcher.

    Raises:
        LaunchError: it could not be started.
    """
    parsed(remote.rendezvous, insecure=remote.insecure)
    if variable(environ, "BNLAYER_TOKEN") is not None:
        raise LaunchError(
            "BNLAYER_TOKEN would stand in the command lines on the hosts, which all their users can read. Set "
            "BNLAYER_TOKEN_FILE, to a file on each host, in its place."
        )
    run = _Run(remote.agent)
    with signals(run.reactor, run.signalled):
        try:
            for node in range(len(remote.hosts)):
                run.start(node, remote.hosts[node][0], remote.command_line(node, environ))
            run.reactor.pump(lambda: not run.running)
        finally:
            run.finish()
    return run.exit_code()


class _Run:
    def __init__(self, agent: str) -> None:
        self._agent = agent
        self.reactor = Reactor()
        self.running: dict[int, subprocess.Popen[bytes]] = {}
        self._codes: dict[int, int] = {}
        self._died: int | None = None
        self._signals = 0
        self._sinks = [Sink(self.reactor, descriptor, self._unread) for descriptor in (1, 2)]
        self._pipes: list[OutputPipe] = []

    def start(self, node: int, host: str, command: Sequence[str]) -> None:
        """Start a node's launcher."""
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                bufsize=0,
            )
        except OSError as error:
            raise LaunchError(f"--ssh: {command[0]}: {error.strerror}") from error
        self.running[node] = process
        for pipe, sink in zip((process.stdout, process.stderr), self._sinks, strict=True):
            assert pipe is not None
            self._pipes.append(OutputPipe(self.reactor, detach(pipe), sink, [_Lines(sink.put)]))
        handle = os.pidfd_open(process.pid)

        def ready() -> None:
            self.reactor.forget(handle)
            os.close(handle)
            self._ended(node, host, process.wait())

        self.reactor.watch(handle, ready)

    def signalled(self, number: int) -> None:
        """Pass a signal on; the third one that asks for the end does not wait for anybody."""
        if number not in (signal.SIGUSR1, signal.SIGUSR2):
            self._signals += 1
        if self._signals > 2:
            self._abandon()
        elif 0 in self.running:
            self._tell(0, number)
        else:  # each of the others ends the job
            for node in self.running:
                self._tell(node, number)

    def _unread(self) -> None:
        self.signalled(signal.SIGTERM)

    def _tell(self, node: int, number: int) -> None:
        pipe = self.running[node].stdin
        assert pipe is not None
        with suppress(OSError):  # it has just ended
            pipe.write(f"{number:d}\n".encode())

    def _ended(self, node: int, host: str, status: int) -> None:
        process = self.running.pop(node)
        assert process.stdin is not None
        process.stdin.close()
        code = status if status >= 0 else 128 - status
        self._codes[node] = code
        if (
            (status < 0 or code == _SSH_FAILED)
            and self._died is None
            and not any(self._codes[n] for n in self._codes if n != node)
        ):
            self._died = code
            why = (
                f"was killed by {signal.Signals(-status).name}"
                if status < 0
                else f"failed; ssh's reason is above. `{self._agent} {host} true` must work here, and ask for nothing"
            )
            self._sinks[1].put(f"bnlayer launch: the connection to {host} {why}\n".encode())
        if code:
            self.reactor.ring(_LEFT_S, self._abandon)
            if status < 0 or code == _SSH_FAILED:
                for other in self.running.values():  # a SIGHUP for each: node 0 may be the one that can't be reached
                    assert other.stdin is not None
                    other.stdin.close()

    def _abandon(self) -> None:
        for process in self.running.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)

    def finish(self) -> None:
        """End the connections that are left, and write the last output."""
        for process in self.running.values():  # a launcher that can't be started leaves others behind
            assert process.stdin is not None
            process.stdin.close()
        self.reactor.pump(lambda: not self.running, _LEFT_S)
        self._abandon()
        for pipe in self._pipes:
            pipe.drain()
        self.reactor.pump(lambda: all(sink.empty for sink in self._sinks) or self._signals > 1)

    def exit_code(self) -> int:
        """Of the first cause."""
        return self._died if self._died is not None else self._codes.get(0, 1)


class _Lines:
    """Whole lines, as they are: those of the hosts don't mix."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self._put = put
        self._lines = Prefixer(lambda: b"")

    def feed(self, chunk: bytes) -> None:
        self._put(self._lines.feed(chunk))

    def finish(self) -> None:
        self._put(self._lines.finish())


def attach(reactor: Reactor, signalled: Callable[[int], None]) -> None:
    """Read signals from the standard input; its end is a SIGHUP."""
    os.set_blocking(0, False)
    reactor.watch(0, partial(_read, reactor, signalled))


def _read(reactor: Reactor, signalled: Callable[[int], None]) -> None:
    try:
        chunk = os.read(0, 4096)
    except BlockingIOError:
        return
    except OSError:
        chunk = b""
    for line in chunk.split():  # a line is written at once, and arrives so
        if line.isdigit() and int(line) in signal.valid_signals():
            signalled(int(line))
    if not chunk:
        reactor.forget(0)
        signalled(signal.SIGHUP)
