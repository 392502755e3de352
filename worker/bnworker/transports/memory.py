"""What a rank must still know when its connection to the service breaks, so that it can go on where it was.

Laws:
1. What was asked is kept until it is answered, and asked again on the next connection.
2. The latest contribution that was answered is kept, too, and said again: after a restart of the service another rank
   may lack that answer, and plain operations leave no trace on the service's disk.
3. An answer counts once.
"""

from __future__ import annotations

from bnproto.v1 import statistics_pb2 as pb


class Memory:
    """One rank's part of the conversation.

    Args:
        join: how it takes its place.

    Attributes:
        generation: that it is in; 0 before all ranks have joined.
        answered: the number of the last contribution that was answered.
        versions: the owner's version of each layer, as of the last answer.
        asked: what is not answered yet: a request, and the parts of its payload.
    """

    def __init__(self, join: pb.Join) -> None:
        self.generation = 0
        self.answered = 0
        self.versions: dict[str, int] = {}
        self.asked: list[pb.ExchangeRequest] = []
        self._join = join
        self._boot_id = 0
        self._layer_answered = 0
        self._contributed: list[pb.ExchangeRequest] = []

    def asks(self, requests: list[pb.ExchangeRequest]) -> None:
        """It asks for something: a request, and the parts of its payload."""
        self.asked = requests

    @property
    def leaves(self) -> bool:
        """Whether it has said goodbye."""
        return bool(self.asked) and self.asked[0].HasField("leave")

    def hears(self, response: pb.ExchangeResponse) -> bool:
        """It hears an answer, whole; returns whether that is news."""
        self._boot_id = response.boot_id
        match response.WhichOneof("message"):
            case "joined":
                news, self.generation = not self.generation, response.generation
                return news
            case "result":
                return self._answers(response.result)
            case _:
                self.asked = []
                return True

    def joining(self) -> pb.ExchangeRequest:
        """What is said first on a connection."""
        join = pb.Join()
        join.CopyFrom(self._join)
        if self.generation:
            join.resume.boot_id = self._boot_id
            join.resume.generation = self.generation
            join.resume.sequence = self.answered
            join.resume.layer_sequence = self._layer_answered
            join.resume.versions.update(self.versions)
        return pb.ExchangeRequest(join=join)

    def repetition(self) -> list[pb.ExchangeRequest]:
        """What is said after it."""
        return [*self._contributed, *self.asked]

    def _answers(self, result: pb.Result) -> bool:
        if result.sequence <= self.answered or not self.asked or not self.asked[0].HasField("contribution"):
            return False  # said twice, or to an exchange that was interrupted
        contribution = self.asked[0].contribution
        self.answered = result.sequence
        if contribution.HasField("layer"):
            self._layer_answered = result.sequence
            self.versions[contribution.layer] = result.version
        self._contributed, self.asked = self.asked, []
        return True
