"""The launchers of one job on several hosts: how they meet, and what they tell each other.

Node 0's launcher supervises the whole job: every end is reported to it, and it sends the signals, wherever the ranks
are. The others do what it sends them, and decide for themselves only when node 0 is gone.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from bnproto.address import hint, split
from bnworker.launcher.links import Link, Listener, Message
from bnworker.launcher.reactor import Reactor
from bnworker.launcher.starting import Job, LaunchError
from bnworker.launcher.supervision import LAUNCHER, Ended

VERSION = 2  # of the messages

_PAUSE_S = 0.2  # between attempts to reach node 0
_ATTEMPT_S = 2.0
_END_WAIT_S = 10.0  # until the other launchers have ended: sweeping takes milliseconds, and at most 10 s


def parsed(rendezvous: str, *, insecure: bool) -> tuple[str, int]:
    """Host and port of a rendezvous.

    Raises:
        LaunchError: it is none, or one that other machines can reach, without `insecure`.
    """
    parts = split(rendezvous)
    if parts is None or not 0 < parts[1] < 2**16 - 1:
        raise LaunchError(
            f"--rendezvous: expected HOST:PORT, such as one:7431, with a port from 1 to 65534; received "
            f"{rendezvous!r}.{hint(rendezvous)}"
        )
    if not insecure and not _is_loopback(parts[0]):
        raise LaunchError(
            f"--rendezvous {rendezvous} is reachable from other machines, and launchers and service speak plain text "
            "there without a check of who joins. Say --insecure if the network is your own."
        )
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass
class Peer:
    """Another node's launcher, as node 0 sees it."""

    link: Link
    node: int
    host: str
    ranks: range
    is_disconnected: bool = False


@dataclass
class Head:
    """Node 0's end.

    Attributes:
        reactor: waits for the others.
        job: of this host.
        ended: called with every end on another host.
        interrupted: called with a signal that another launcher got.
        refusal: why the job can't begin: another node said so.
    """

    reactor: Reactor
    job: Job
    ended: Callable[[Ended], None]
    interrupted: Callable[[int], None]
    refusal: LaunchError | None = None
    _peers: dict[int, Peer] = field(default_factory=dict)
    _unidentified: list[Link] = field(default_factory=list)
    _listener: Listener | None = None

    def listen(self) -> None:
        """Begin to wait for the others.

        Raises:
            LaunchError: nothing can listen there.
        """
        several = self.job.several
        assert several is not None
        host, port = parsed(several.rendezvous, insecure=several.insecure)
        try:
            self._listener = Listener(self.reactor, host, port + 1, self._connected)
        except OSError as error:
            raise LaunchError(
                f"--rendezvous {several.rendezvous}: can't listen on port {port + 1} of {host}: {error.strerror}. Node "
                "0 runs on this host, whose address it is; the launchers meet at the port after the service's."
            ) from None

    @property
    def complete(self) -> bool:
        """Whether all have come, or the job can't begin."""
        assert self.job.several is not None
        return self.refusal is not None or len(self._peers) == self.job.several.nodes - 1

    def missing(self) -> list[int]:
        """Who has not come."""
        assert self.job.several is not None
        return [node for node in range(1, self.job.several.nodes) if node not in self._peers]

    def start(self, name: str, address: str) -> frozenset[int]:
        """Let the others start their ranks; returns these."""
        for peer in self._peers.values():
            peer.link.send(kind="start", name=name, address=address)
        return frozenset(rank for peer in self._peers.values() for rank in peer.ranks)

    def signal(self, number: int) -> None:
        """Have a signal sent to the ranks of the other hosts."""
        for peer in self._peers.values():
            peer.link.send(kind="signal", number=number)

    def restart(self, rank: int, number: int) -> None:
        """Have a rank on another host started again, in an elastic job."""
        for peer in self._peers.values():
            if rank in peer.ranks:
                peer.link.send(kind="restart", rank=rank, number=number)

    def refuse(self, text: str, code: int) -> None:
        """The job can't begin."""
        for peer in self._peers.values():
            peer.link.send(kind="refused", text=text, code=code)

    def finish(self, code: int, cause: str) -> None:
        """Tell the others how the job ended, and wait until they have."""
        for peer in self._peers.values():
            peer.link.send(kind="exit", code=code, cause=cause)
        self.reactor.pump(lambda: all(peer.is_disconnected for peer in self._peers.values()), _END_WAIT_S)
        for link in [*self._unidentified, *(peer.link for peer in self._peers.values())]:
            link.close()
        if self._listener is not None:
            self._listener.close()

    def _connected(self, connection: socket.socket) -> None:
        self._unidentified.append(Link(self.reactor, connection, self._received, self._disconnected))

    def _received(self, link: Link, message: Message) -> None:
        peer = next((peer for peer in self._peers.values() if peer.link is link), None)
        match message, peer:
            case {"kind": "hello", "node": int(node), "first": int(first), "local": int(local)}, None:
                self._introduced(link, message, node, range(first, first + local))
            case {"kind": "unable", "text": str(text), "code": int(code)}, Peer():
                self.refusal = self.refusal or LaunchError(f"node {peer.node} ({peer.host}): {text}", code)
            case {"kind": "ended", "who": int(who), "status": int(status), "secondary": bool(secondary)}, Peer() if (
                who in peer.ranks
            ):
                self.ended(Ended(who, status, secondary, str(message.get("left_open", "")), host=peer.host))
            case {"kind": "interrupted", "number": int(number)}, Peer():
                self.interrupted(number)
            case _:  # another version's, or no launcher's
                pass

    def _introduced(self, link: Link, message: Message, node: int, ranks: range) -> None:
        several = self.job.several
        assert several is not None
        mine = {"version": VERSION, "--nnodes": several.nodes, "ranks": several.world_size}
        wrong = [f"{name} {message.get(name)}, here {is_}" for name, is_ in mine.items() if message.get(name) != is_]
        text = ""
        if wrong:
            text = f"the launchers disagree: {', '.join(wrong)}. Give all the same --nnodes and -n"
        elif not 0 < node < several.nodes:
            text = f"expected --node-rank from 1 to {several.nodes - 1}, received {node}"
        elif node in self._peers:
            text = f"--node-rank {node} is taken by {self._peers[node].host}. Give each host another one"
        if text:
            link.send(kind="refused", text=f"node 0: {text}.", code=2)
            return
        self._unidentified.remove(link)
        self._peers[node] = Peer(link, node, str(message.get("host")), ranks)

    def _disconnected(self, link: Link) -> None:
        if link in self._unidentified:
            self._unidentified.remove(link)
            return
        peer = next(peer for peer in self._peers.values() if peer.link is link)
        peer.is_disconnected = True
        if self._listener is not None and not self.complete:  # it may come again: its launcher was started anew
            del self._peers[peer.node]
            return
        self.ended(Ended(LAUNCHER - peer.node, -9, host=peer.host, takes=frozenset(peer.ranks)))


@dataclass
class Member:
    """Another node's end.

    Attributes:
        reactor: waits for node 0.
        job: of this host.
        signal_ranks: called with a signal that the ranks here shall get.
        restart_rank: called with a rank here that shall be started again, and the number of that restart.
        abandoned: called when node 0 is gone.
        started: the job's name and the service's address, once node 0 has sent them.
        refusal: why the job can't begin.
        exit: the job's exit code and its cause, once node 0 has sent them.
        head_is_lost: whether the connection to node 0 has ended.
    """

    reactor: Reactor
    job: Job
    signal_ranks: Callable[[int], None]
    restart_rank: Callable[[int, int], None]
    abandoned: Callable[[], None]
    started: tuple[str, str] | None = None
    refusal: LaunchError | None = None
    exit: tuple[int, str] | None = None
    head_is_lost: bool = False
    _link: Link | None = None

    def connect(self, stop: Callable[[], bool]) -> None:
        """Connect to node 0, and introduce this node; returns without where `stop` holds.

        Raises:
            LaunchError: node 0 could not be reached in time.
        """
        several = self.job.several
        assert several is not None
        host, port = parsed(several.rendezvous, insecure=several.insecure)
        reason = ""
        for _ in range(max(1, round(several.wait_s / _PAUSE_S))):
            if stop():
                return
            try:
                connection = socket.create_connection((host, port + 1), _ATTEMPT_S)
            except OSError as error:
                reason = error.strerror or str(error)
                self.reactor.pump(stop, _PAUSE_S)
                continue
            self._link = Link(self.reactor, connection, self._received, self._disconnected)
            self._link.send(
                kind="hello",
                node=several.node,
                first=several.first_rank,
                local=self.job.ranks,
                host=os.uname().nodename,
                **{"version": VERSION, "--nnodes": several.nodes, "ranks": several.world_size},
            )
            return
        raise LaunchError(
            f"--rendezvous {several.rendezvous}: nobody listens on port {port + 1} of {host}, where the launchers "
            f"meet: {reason}. Start the command with --node-rank 0 on the host that the rendezvous names."
        )

    @property
    def linked(self) -> bool:
        """Whether node 0 is there and decides."""
        return self._link is not None and not self.head_is_lost

    def unable(self, error: LaunchError) -> None:
        """Say that the ranks here can't be started."""
        assert self._link is not None
        link = self._link
        link.send(kind="unable", text=str(error), code=error.code)
        self.reactor.pump(lambda: link.sent, _ATTEMPT_S)

    def ended(self, end: Ended) -> None:
        """Report the end of a rank."""
        assert self._link is not None
        self._link.send(kind="ended", who=end.who, status=end.status, secondary=end.secondary, left_open=end.left_open)

    def interrupted(self, number: int) -> None:
        """Report a signal to the launcher here."""
        if self._link is not None:
            self._link.send(kind="interrupted", number=number)

    def close(self) -> None:
        """End the connection."""
        if self._link is not None:
            self._link.close()

    def _received(self, _: Link, message: Message) -> None:
        match message:
            case {"kind": "start", "name": str(name), "address": str(address)}:
                self.started = name, address
            case {"kind": "refused", "text": str(text), "code": int(code)}:
                self.refusal = LaunchError(text, code)
            case {"kind": "signal", "number": int(number)}:
                self.signal_ranks(number)
            case {"kind": "restart", "rank": int(rank), "number": int(number)} if rank in self.job.local_ranks:
                self.restart_rank(rank, number)
            case {"kind": "exit", "code": int(code), "cause": str(cause)}:
                self.exit = code, cause
            case _:
                pass

    def _disconnected(self, _: Link) -> None:
        self.head_is_lost = True
        if self.exit is None:
            self.abandoned()
