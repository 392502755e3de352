"""Vectors of eight for Numba: kernels that are vectorized because they say so, not because a compiler saw how.

LLVM's own vectorizer gives up silently: on a descending loop, on an index that may be negative, on more arrays than it
cares to compare for overlap; the kernel is then four to seven times slower. These types have no such moods. Eight is
the width of AVX-512 in float64; LLVM makes two or four narrower instructions of one where the machine has less. Some
passes go by halves, of four.

A vector is a Numba type of its own, known to + − × | & ^; `load` and `store` move it. The functions below take scalars
too, so that one formula serves the vectors and the few elements that are left over.

Every operation rounds once. Nothing is ever contracted: what is fused says so (`fused`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from bnlayer.kernels.compiled.vectors import (
    BITS,
    HALF,
    HALVES,
    INT32,
    INT64,
    LANES,
    LLVM_BYTE,
    LLVM_INT32,
    NUMBERS,
    VECTORS,
    WIDER,
    Vector,
    constant,
    llvm_of,
)


def _instruction(generator: Callable[..., Any]) -> Any:
    """A function of the kernels that becomes LLVM's instructions; Numba types what goes in and comes out."""
    return intrinsic(generator)


def _address(context: Any, builder: Any, sig: Any, args: Any, element: Any) -> Any:
    array = context.make_array(sig.args[0])(context, builder, args[0])
    return builder.bitcast(builder.gep(array.data, [args[1]]), element.as_pointer())


def _loaded(array: Any, vector: Vector, *, volatile: bool = False) -> Any:
    """A vector of a contiguous array's elements, from an index on."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        loaded = builder.load(_address(context, builder, sig, args, vector.llvm), align=array.dtype.bitwidth // 8)
        if volatile:
            loaded.opname = "load volatile"
        return loaded

    return vector(array, types.intp), generate


@_instruction
def load(typing: Any, array: Any, index: Any) -> Any:
    """The eight elements of a contiguous array from an index on."""
    del typing, index
    return _loaded(array, VECTORS[array.dtype])


@_instruction
def load_half(typing: Any, array: Any, index: Any) -> Any:
    """The four elements of a contiguous array from an index on."""
    del typing, index
    return _loaded(array, HALVES[array.dtype])


@_instruction
def load_again(typing: Any, array: Any, index: Any) -> Any:
    """As `load`, where the same elements are loaded by halves too, before it: neither is made of the other.

    A float32 is widened as it is loaded, for less than it takes to cut it out of a register.
    """
    del typing, index
    return _loaded(array, VECTORS[array.dtype], volatile=True)


def _half(value: Any, first: int) -> Any:
    """Four of the eight lanes."""
    vector = HALVES[value.element]

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        lanes = ir.Constant(ir.VectorType(LLVM_INT32, vector.lanes), list(range(first, first + vector.lanes)))
        return builder.shuffle_vector(args[0], ir.Constant(value.llvm, ir.Undefined), lanes)

    return vector(value), generate


@_instruction
def first_half(typing: Any, value: Any) -> Any:
    """The first four of eight."""
    del typing
    return _half(value, 0)


@_instruction
def second_half(typing: Any, value: Any) -> Any:
    """The last four of eight."""
    del typing
    return _half(value, HALF)


@_instruction
def store(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Put eight elements into a contiguous array."""
    del typing, index

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig, args, value.llvm)
        builder.store(args[2], address, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), generate


@_instruction
def prefetch(typing: Any, array: Any, index: Any) -> Any:
    """Have the cache line of an element brought to the second-level cache; the index may lie behind the array's end.

    Not to the first: what is asked for far enough ahead would push out what is needed before it.
    """
    del typing, index

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        address = _address(context, builder, sig, args, LLVM_BYTE)
        kind = ir.FunctionType(ir.VoidType(), [LLVM_BYTE.as_pointer(), LLVM_INT32, LLVM_INT32, LLVM_INT32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [address, *(ir.Constant(LLVM_INT32, hint) for hint in (0, 2, 1))])  # a read, of data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@_instruction
def load_truths(typing: Any, array: Any, index: Any) -> Any:
    """Eight truths of a uint8 array as all ones (−1) or all zeros, for `where`."""
    del typing, index

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.VectorType(LLVM_BYTE, LANES)
        loaded = builder.load(_address(context, builder, sig, args, kind), align=1)
        return builder.sext(builder.icmp_signed("!=", loaded, ir.Constant(kind, [0] * LANES)), INT64.llvm)

    return INT64(array, types.intp), generate


@_instruction
def broadcast(typing: Any, value: Any) -> Any:
    """A scalar in every lane."""
    del typing
    vector = VECTORS[value]

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        one = builder.insert_element(ir.Constant(vector.llvm, ir.Undefined), args[0], ir.Constant(LLVM_INT32, 0))
        lanes = ir.Constant(ir.VectorType(LLVM_INT32, LANES), [0] * LANES)
        return builder.shuffle_vector(one, ir.Constant(vector.llvm, ir.Undefined), lanes)

    return vector(value), generate


@_instruction
def widen(typing: Any, value: Any) -> Any:
    """A float as float64, exactly."""
    del typing
    wider = WIDER[value]

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        return args[0] if wider is value else builder.fpext(args[0], llvm_of(wider))

    return wider(value), generate


@_instruction
def fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c for float64, rounded once, on every machine: where there is no such instruction, the C library's."""
    del typing

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        kind = llvm_of(a)
        name = f"llvm.fma.v{a.lanes}f64" if isinstance(a, Vector) else "llvm.fma.f64"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return builder.call(function, args)

    return a(a, b, c), generate


def _reinterpreted(value: Any, kind: Any) -> Any:
    """The same bits as another type."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        return builder.bitcast(args[0], llvm_of(kind))

    return kind(value), generate


@_instruction
def bits(typing: Any, value: Any) -> Any:
    """The bit pattern of a float, as a signed integer."""
    del typing
    return _reinterpreted(value, BITS[value])


@_instruction
def number(typing: Any, value: Any) -> Any:
    """The float of a bit pattern."""
    del typing
    return _reinterpreted(value, NUMBERS[value])


@_instruction
def magnitude(typing: Any, value: Any) -> Any:
    """|value| as an integer in the order of the numbers: infinity above all of them, NaN above infinity."""
    del typing
    kind = BITS[value]
    mask = (1 << (31 if kind in (INT32, types.int32) else 63)) - 1

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        return builder.and_(builder.bitcast(args[0], llvm_of(kind)), constant(kind, mask))

    return kind(value), generate


@_instruction
def upper(typing: Any, value: Any) -> Any:
    """The upper halves of eight int64, signed."""
    del typing

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        return builder.ashr(args[0], constant(value, 32))

    return value(value), generate


@_instruction
def greater(typing: Any, a: Any, b: Any) -> Any:
    """The greater of two signed integers, per lane."""
    del typing

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        return builder.select(builder.icmp_signed(">", args[0], args[1]), args[0], args[1])

    return a(a, b), generate


@_instruction
def where(typing: Any, truth: Any, value: Any) -> Any:
    """The value where a truth is not 0, and +0 elsewhere: whatever stands there, NaN included, is gone."""
    del typing

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        nothing = ir.Constant(llvm_of(value), [0.0] * LANES if isinstance(value, Vector) else 0.0)
        return builder.select(builder.icmp_signed("!=", args[0], constant(truth, 0)), args[1], nothing)

    return value(truth, value), generate


@_instruction
def either(typing: Any, truth: Any, value: Any, other: Any) -> Any:
    """The integer `value` where a truth is not 0, `other` elsewhere."""
    del typing

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        return builder.select(builder.icmp_signed("!=", args[0], constant(truth, 0)), args[1], args[2])

    return value(truth, value, other), generate


@_instruction
def finite(typing: Any, value: Any) -> Any:
    """−1 where a float is finite, 0 elsewhere, as an integer of its width."""
    del typing
    kind = BITS[value]
    sign, infinity = (1 << 31, 0x7F80_0000) if kind in (INT32, types.int32) else (1 << 63, 0x7FF0 << 48)

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        size = builder.and_(builder.bitcast(args[0], llvm_of(kind)), constant(kind, sign - 1))
        return builder.sext(builder.icmp_signed("<", size, constant(kind, infinity)), llvm_of(kind))

    return kind(value), generate


@_instruction
def key(typing: Any, value: Any) -> Any:
    """An integer in the order of the floats (−0 < +0): `bnlayer.precision.Precision.key`, in the float's own width."""
    del typing
    kind = BITS[value]
    width = 32 if kind in (INT32, types.int32) else 64

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        pattern = builder.bitcast(args[0], llvm_of(kind))
        negative = builder.ashr(pattern, constant(kind, width - 1))
        return builder.xor(pattern, builder.and_(negative, constant(kind, (1 << (width - 1)) - 1)))

    return kind(value), generate


@_instruction
def negated(typing: Any, value: Any) -> Any:
    """−value, zeros included."""
    del typing

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        del context, sig
        return builder.fneg(args[0])

    return value(value), generate
