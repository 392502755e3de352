"""The vectors' types, as Numba and LLVM know them: of eight values, or of four.

A vector is a Numba type of its own, known to + − × | & ^. What else there is to do with it is in `simd`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import lower_builtin, models, register_model

LANES = 8
HALF = LANES // 2

LLVM_INT32, LLVM_INT64, LLVM_BYTE = ir.IntType(32), ir.IntType(64), ir.IntType(8)
_ELEMENTS = {
    types.float32: ir.FloatType(),
    types.float64: ir.DoubleType(),
    types.int32: LLVM_INT32,
    types.int64: LLVM_INT64,
}


class Vector(types.Type):
    """Eight values of one dtype, or the half of them.

    Attributes:
        element: Numba's type of one of them.
        lanes: how many.
        llvm: LLVM's type of the whole.
    """

    def __init__(self, element: Any, lanes: int) -> None:
        super().__init__(name=f"{element.name}x{lanes}")
        self.element = element
        self.lanes = lanes
        self.llvm = ir.VectorType(_ELEMENTS[element], lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


FLOAT32, FLOAT64, INT32, INT64 = (Vector(element, LANES) for element in _ELEMENTS)
HALF_FLOAT32, HALF_FLOAT64, HALF_INT32, HALF_INT64 = (Vector(element, HALF) for element in _ELEMENTS)
VECTORS = {vector.element: vector for vector in (FLOAT32, FLOAT64, INT32, INT64)}
HALVES = {vector.element: vector for vector in (HALF_FLOAT32, HALF_FLOAT64, HALF_INT32, HALF_INT64)}
WIDER = {
    FLOAT32: FLOAT64, FLOAT64: FLOAT64, HALF_FLOAT32: HALF_FLOAT64, HALF_FLOAT64: HALF_FLOAT64,
    types.float32: types.float64, types.float64: types.float64,
}  # fmt: skip
BITS = {
    FLOAT64: INT64, FLOAT32: INT32, HALF_FLOAT64: HALF_INT64, HALF_FLOAT32: HALF_INT32,
    types.float64: types.int64, types.float32: types.int32,
}  # fmt: skip
NUMBERS = {bits: number for number, bits in BITS.items()}


def llvm_of(kind: Any) -> Any:
    """LLVM's type of a scalar or vector."""
    if isinstance(kind, Vector):
        return kind.llvm
    return _ELEMENTS[kind]


def constant(kind: Any, value: int) -> Any:
    """The same integer in every lane."""
    shape = llvm_of(kind)
    return ir.Constant(shape, [value] * kind.lanes) if isinstance(kind, Vector) else ir.Constant(shape, value)


def _operator(function: Callable[[Any, Any], Any], instructions: dict[Vector, str]) -> None:
    """Teach Numba an operator on two vectors of one type."""

    @infer_global(function)
    class Template(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            del kws
            if len(args) == 2 and args[0] == args[1] and args[0] in instructions:
                return signature(args[0], args[0], args[0])
            return None

    for vector, instruction in instructions.items():

        def lower(context: Any, builder: Any, sig: Any, args: Any, instruction: str = instruction) -> Any:
            del context, sig
            return getattr(builder, instruction)(*args)

        lower_builtin(function, vector, vector)(lower)


_operator(operator.add, {FLOAT32: "fadd", FLOAT64: "fadd", HALF_FLOAT64: "fadd", INT32: "add", INT64: "add"})
_operator(operator.sub, {FLOAT32: "fsub", FLOAT64: "fsub", HALF_FLOAT64: "fsub", INT32: "sub", INT64: "sub"})
_operator(operator.mul, {FLOAT32: "fmul", FLOAT64: "fmul", HALF_FLOAT64: "fmul", INT64: "mul"})
_operator(operator.or_, {INT32: "or_", INT64: "or_"})
_operator(operator.and_, {INT32: "and_", INT64: "and_"})
_operator(operator.xor, {INT32: "xor", INT64: "xor"})
