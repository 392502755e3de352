"""Encoding of calls under MPI: ranks compare a fingerprint of each call, and send its text only where they disagree.

A rank under MPI owns a mirror of the moving statistics, so its call also includes what was pushed into its mirror, and
the shape of its limbs: otherwise ranks whose mirrors were replaced differently would diverge unnoticed.
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
    """The addition to a call's signature for ranks that own a mirror of the layer.

    Attributes:
        shape: of the limbs, as text.
        pushed: what was pushed into the mirror, as text.
    """

    shape: str = ""
    pushed: str = ""


_MASK = 2**62 - 1
_STEP = 0x1E37_79B9_7F4A_7C15  # the golden ratio's digits, which correlate with no hash
_ATTEMPT = 0x2545_F491_4F6C_DD1D
_FORWARD_STEP = 0x1656_67B1_9E37_79F9

_PLAIN = tuple(field.name for field in fields(PlainSignature))
_MIRROR = tuple(field.name for field in fields(MirrorSignature))
_LAYER = tuple(field.name for field in fields(LayerSignature))
# One spelling for each value: 1 and 1.0, or a NumPy scalar, are the same value.
_SPELL = {"channels": int, "momentum": float, "epsilon": float, "grid": int, "root": int}


def encode_call(call: Call, shape: str = "", pushed: str = "nothing") -> bytes:
    """A call as text: equal for equal calls, on every machine.

    Args:
        call: the call.
        shape: of the limbs that belong to it; "" without.
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
    """The call that `encode_call` made text of."""
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
    """A text's hash, from 1 to 2^62."""
    return (int.from_bytes(blake2b(text, digest_size=8).digest(), "little") >> 2) + 1


class CallFingerprints:
    """Fingerprints of calls: equal where `encode_call` gives equal texts, and almost never otherwise.

    From one step to the next only the steps change, so a fingerprint combines that of all the rest, which is cached
    for each layer, with the steps.
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
    """A mirror's digest of its pushes after one more: their number, and a hash of all that was pushed."""
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
