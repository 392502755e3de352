"""What a rank sends when it reconnects follows from the answers that it has received."""

from bnproto.v1 import statistics_pb2 as pb
from bnworker.transports.memory import Memory

_JOIN = pb.Join(job="j", rank=1, world_size=2, incarnation=7)


def _contribution(sequence: int, layer: str | None = None) -> list[pb.ExchangeRequest]:
    contribution = pb.Contribution(sequence=sequence, layer=layer)
    return [pb.ExchangeRequest(contribution=contribution), pb.ExchangeRequest(part=pb.Part(data=b"x"))]


def _result(sequence: int, version: int | None = None) -> pb.ExchangeResponse:
    return pb.ExchangeResponse(boot_id=5, generation=3, result=pb.Result(sequence=sequence, version=version))


def _resumption(memory: Memory) -> list[pb.ExchangeRequest]:
    """All that is said on a connection, first the join."""
    return [memory.joining(), *memory.repetition()]


def _joined() -> Memory:
    memory = Memory(_JOIN)
    assert memory.hears(pb.ExchangeResponse(boot_id=5, generation=3, joined=pb.Joined()))
    return memory


def test_before_all_have_joined_it_joins_again() -> None:
    """There is nothing to resume; the incarnation says who it is."""
    assert _resumption(Memory(_JOIN)) == [pb.ExchangeRequest(join=_JOIN)]


def test_it_says_again_what_waits_and_what_was_answered_last() -> None:
    """With all parts, in order; and how far it has come, of the layers as of the rest."""
    memory = _joined()
    memory.asks(_contribution(1, "a"))
    assert memory.hears(_result(1, version=4))
    memory.asks(_contribution(2))
    assert memory.hears(_result(2))
    memory.asks(_contribution(3))
    join, *reported = _resumption(memory)
    assert reported == _contribution(2) + _contribution(3)
    expected = pb.Join()
    expected.CopyFrom(_JOIN)
    known = pb.Resume(boot_id=5, generation=3, sequence=2, layer_sequence=1, versions={"a": 4})
    expected.resume.CopyFrom(known)
    assert join.join == expected


def test_the_join_itself_stays_as_it_was() -> None:
    """What was added for one connection is not there on the next."""
    memory = _joined()
    first = _resumption(memory)
    assert _resumption(memory) == first
    assert not _JOIN.HasField("resume")


def test_an_answer_counts_once() -> None:
    """What was said twice is no news the second time, and neither is that all ranks have joined."""
    memory = _joined()
    memory.asks(_contribution(1))
    assert memory.hears(_result(1))
    assert not memory.hears(_result(1))
    assert not memory.hears(pb.ExchangeResponse(boot_id=6, generation=3, joined=pb.Joined()))
    memory.asks(_contribution(2))
    assert not memory.hears(_result(1))
    assert memory.answered == 1


def test_a_pull_is_asked_again_until_it_is_answered() -> None:
    """It has no number; the contribution before it stays the last one."""
    memory = _joined()
    memory.asks(_contribution(1))
    memory.hears(_result(1))
    pull = [pb.ExchangeRequest(pull=pb.Pull(layer="a"))]
    memory.asks(pull)
    assert _resumption(memory)[1:] == _contribution(1) + pull
    assert memory.hears(pb.ExchangeResponse(boot_id=5, owned=pb.Owned()))
    assert _resumption(memory)[1:] == _contribution(1)


def test_a_goodbye_takes_the_place_of_what_was_interrupted() -> None:
    """Its answer may still come, and is not taken for the goodbye's."""
    memory = _joined()
    memory.asks(_contribution(1))
    assert not memory.leaves
    memory.asks([pb.ExchangeRequest(leave=pb.Leave(reason="x"))])
    assert not memory.hears(_result(1))
    assert memory.leaves
    assert [request.WhichOneof("message") for request in _resumption(memory)] == ["join", "leave"]
