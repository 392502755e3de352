"""What is not the service it should be is left alone."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from bnproto.frames import Frames, framed
from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.service.local_channel import LocalChannel, attached


@contextmanager
def _listener(answer: bytes, backlog: int = 1) -> Iterator[tuple[socket.socket, pb.LocalSocket]]:
    """Somebody who answers one caller with some bytes, and hangs up after the caller."""
    name = f"test-{threading.get_native_id()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen(backlog)

        def serve() -> None:
            end, _ = listener.accept()
            with end:
                end.recv(100)
                end.sendall(answer)
                end.recv(100)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener, pb.LocalSocket(name=name, ticket=b"t", port=7)
        thread.join()


@pytest.mark.parametrize(
    "answer",
    [
        b"\x03\0\0\0\xff\xff\xff",
        b"\xff\xff\xff\xff",
        b"",
        framed(pb.ExchangeResponse(boot_id=5)),
        framed(pb.ExchangeResponse(boot_id=6, attached=pb.Attached())),
        framed(pb.ExchangeResponse(boot_id=5, part=pb.Part(data=b"x"))),
    ],
    ids=["nonsense", "too large", "silence", "nothing", "another service", "a part"],
)
def test_a_rank_needs_no_local_socket(answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """It stays on its stream, and the log says why."""
    with caplog.at_level("INFO", "bnworker"), _listener(answer) as (_, invitation):
        joined = pb.ExchangeResponse(boot_id=5, joined=pb.Joined(local_socket=invitation))
        assert attached(joined, "127.0.0.1:7", 1.0) is None
    assert "no local socket to the service at 127.0.0.1:7 (" in caplog.text


def test_a_rank_retries_while_the_listen_queue_is_full() -> None:
    """All ranks of a job come at once: a full queue is not a closed socket."""
    name = f"crowded-{threading.get_native_id()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen(0)
        waiting = socket.socket(socket.AF_UNIX)
        waiting.connect(f"\0{name}")  # the one that fits
        with socket.socket(socket.AF_UNIX) as refused:
            refused.setblocking(False)
            with pytest.raises(BlockingIOError):
                refused.connect(f"\0{name}")

        def serve() -> None:
            with waiting, listener.accept()[0]:
                pass
            end, _ = listener.accept()
            with end:
                frames = Frames()
                while frames.next() is None:
                    frames.received(end.recv_into(frames.room()))
                end.sendall(framed(pb.ExchangeResponse(boot_id=5, attached=pb.Attached())))
                end.recv(1)

        thread = threading.Timer(0.1, serve)
        thread.start()
        LocalChannel(pb.LocalSocket(name=name, ticket=b"t"), 5, 1.0).close()
        thread.join()
