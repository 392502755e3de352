"""What a rank says at the door: compared by a number that stands for it, sent as text only where the ranks disagree.

A rank under MPI owns a mirror of the moving statistics, so it also says what was pushed into its mirror, and of
what shape its words are: ranks whose mirrors were replaced differently would drift apart without a sound.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, fields
from hashlib import blake2b

from bnlayer.collective import Call, Direction, ExchangeKey, LayerSignature, Operation, PlainSignature
from bnlayer.renorm import Renorm
from bnlayer.state import LayerState


@dataclass(frozen=True, slots=True)
class MirrorSignature(LayerSignature):
    """What a rank with its own mirror believes of a layer.

    Attributes:
        shape: of the words, as text.
        pushed: what was pushed into the mirror, as text.
    """

    shape: str = ""
    pushed: str = ""


_MASK = 2**62 - 1
_STEP = 0x1E37_79B9_7F4A_7C15  # the golden ratio's digits, which don't line up with any hash
_ATTEMPT = 0x2545_F491_4F6C_DD1D
_FORWARD_STEP = 0x1656_67B1_9E37_79F9

_PLAIN = tuple(field.name for field in fields(PlainSignature))
_MIRROR = tuple(field.name for field in fields(MirrorSignature))
_LAYER = tuple(field.name for field in fields(LayerSignature))
# One spelling for each value: 1 and 1.0, or a NumPy scalar, are the same belief.
_SPELL = {"channels": int, "momentum": float, "epsilon": float, "grid": int, "root": int}


def encode_call(call: Call, shape: str = "", pushed: str = "nothing") -> bytes:
    """A call as text: equal for equal calls, on every machine.

    Args:
        call: the call.
        shape: of the words that belong to it; "" without.
        pushed: what was pushed into this rank's mirror of the layer.
    """
    signature: list[object]
    if isinstance(call.signature, LayerSignature):
        signature = [_spelt(call.signature, name) for name in _LAYER] + [shape, pushed]
    else:
        signature = [_spelt(call.signature, name) for name in _PLAIN]
    key = call.key
    forward_step = None if call.forward_step is None else int(call.forward_step)
    items = [call.operation, key.layer, key.direction, int(key.step), int(call.attempt), forward_step, signature]
    return json.dumps(items, separators=(",", ":")).encode()


def decode_call(text: bytes) -> Call:
    """The call that `speak` made text of."""
    operation, layer, direction, step, attempt, forward_step, values = json.loads(text)
    signature: MirrorSignature | PlainSignature
    if len(values) == len(_MIRROR):
        items = dict(zip(_MIRROR, values, strict=True))
        renorm = items.pop("renorm")
        signature = MirrorSignature(**items, renorm=None if renorm is None else Renorm(*renorm))
    else:
        op, arrays, root = values
        signature = PlainSignature(op, tuple(arrays), root)
    key = ExchangeKey(layer, None if direction is None else Direction(direction), step)
    return Call(Operation(operation), key, signature, attempt, forward_step)


def fingerprint_of(text: bytes) -> int:
    """A number from 1 to 2^62 that stands for a text."""
    return (int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 2) + 1


class CallFingerprints:
    """Numbers that stand for what is said: equal where `speak` says the same, and as good as never elsewhere.

    From one step to the next only the steps change, so a name is that of all the rest, which is remembered for each
    layer, and the steps'.
    """

    def __init__(self) -> None:
        self._rest: dict[tuple[str | None, Direction | None, Operation], tuple[object, object, str, int]] = {}

    def of(self, call: Call, shape: tuple[int, ...] | None = None, pushed: str = "nothing") -> int:
        """The name, from 1 to 2^62, of a call with words of a shape."""
        key, signature = call.key, call.signature
        cached = self._rest.get((key.layer, key.direction, call.operation))
        if cached is None or cached[0] is not signature or cached[1] != shape or cached[2] != pushed:
            rest = Call(call.operation, ExchangeKey(key.layer, key.direction, 0), signature)
            cached = (
                signature,
                shape,
                pushed,
                fingerprint_of(encode_call(rest, "" if shape is None else str(shape), pushed)),
            )
            self._rest[key.layer, key.direction, call.operation] = cached
        # Odd multipliers: steps that differ have names that differ.
        steps = key.step * _STEP + call.attempt * _ATTEMPT + (call.forward_step or 0) * _FORWARD_STEP
        return ((cached[3] + steps) & _MASK) + 1


def pushed_digest(before: str, state: LayerState) -> str:
    """How a mirror speaks of its pushes after one more: their number, and a name for all that was pushed."""
    number, _, chain = before.partition(" ")
    digest = blake2b(chain.encode(), digest_size=4)
    for array in state.arrays().values():
        digest.update(array.tobytes())
    return f"{(0 if number == 'nothing' else int(number)) + 1} ({digest.hexdigest()})"


def _spelt(signature: LayerSignature | PlainSignature, name: str) -> object:
    value = getattr(signature, name)
    if isinstance(value, Renorm):
        return [None if limit is None else float(limit) for limit in astuple(value)]
    return _SPELL[name](value) if name in _SPELL else value
