"""What the passes that sum do with float64 data: two folds, each term rounded by itself.

The first fold rounds a term v to the nearest multiple of its unit, ties to even, as v + M; the second takes what that
rounded away, v − ((v + M) − M), which is exact, on a grid 2^52 finer (2^51 for squares). Sums are integers, the terms'
bit patterns added up, less the bits(M) that `fold` takes away. There are no chains: a term of 53 digits has ties, and
its remainder must not depend on what came before it.

Functions of `forward` and `backward`; places are laid out as in `folds`.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from bnlayer.kernels.compiled.folds import AHEAD, magic, sums, where_is
from bnlayer.kernels.compiled.jit import inlined
from bnlayer.kernels.compiled.simd import (
    bits,
    broadcast,
    greater,
    load,
    load_truths,
    magnitude,
    number,
    prefetch,
    store,
    where,
)
from bnlayer.kernels.compiled.vectors import LANES

Array = NDArray[Any]

_SPLITTER = 134_217_729.0  # 2^27 + 1, as in `bnlayer.limbs`


@inlined
def _split(v: Any, splitter: Any) -> Any:
    """The upper half of v's digits; the rest is v less that."""
    big = splitter * v
    return big - (big - v)


@inlined
def _square_error(d: Any, square: Any, splitter: Any) -> Any:
    """d·d − float64(d·d), operation by operation that of `bnlayer.limbs.product_error`."""
    hi = _split(d, splitter)
    lo = d - hi
    return lo * lo - (((square - hi * hi) - lo * hi) - hi * lo)


@inlined
def _magics(accumulators: Array, at: int, height: int) -> tuple[float, float, float, float]:
    """What the terms of one place are added to: M of both sums, then those of their second folds."""
    return (
        number(accumulators[where_is(at, magic(0, 0), height)]),
        number(accumulators[where_is(at, magic(0, 1), height)]),
        number(accumulators[where_is(at, magic(1, 0), height)]),
        number(accumulators[where_is(at, magic(1, 1), height)]),
    )


@inlined
def _add(
    accumulators: Array, at: int, height: int, first: float, second: float, first_finer: float, second_finer: float
) -> None:
    """Add the bits of rounded terms to the sums of one place."""
    accumulators[where_is(at, sums(0, 0), height)] += bits(first)
    accumulators[where_is(at, sums(0, 1), height)] += bits(second)
    accumulators[where_is(at, sums(1, 0), height)] += bits(first_finer)
    accumulators[where_is(at, sums(1, 1), height)] += bits(second_finer)


@inlined
def add_deviations(
    x: Array, starts: Any, mask: Any, first: int, stride: int, steps: int, at: int, accumulators: Array, numbers: Array,
    height: int, count: Any, odd: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """Add deviations and their squares, eight at a time, to eight places: see `forward._step`.

    Args:
        numbers: the places as float64.
        count: of eight lanes, how many of the values were not masked.
        odd: how the bits of squares on M2 differed from M2's: its exponent, if one was outside its window.

    Returns:
        `count` and `odd`, with what was added.
    """
    block = at * height
    m1, m2 = load(numbers, block + magic(0, 0) * LANES), load(numbers, block + magic(0, 1) * LANES)
    s, t = load(accumulators, block + sums(0, 0) * LANES), load(accumulators, block + sums(0, 1) * LANES)
    m1_finer, m2_finer = load(numbers, block + magic(1, 0) * LANES), load(numbers, block + magic(1, 1) * LANES)
    s_finer, t_finer = load(accumulators, block + sums(1, 0) * LANES), load(accumulators, block + sums(1, 1) * LANES)
    pivot, splitter = load(numbers, block + 8 * LANES), broadcast(_SPLITTER)
    for j in range(steps):
        index = first + j * stride if starts is None else starts[first + j] + at
        if starts is not None:
            prefetch(x, index + AHEAD)
        d = load(x, index) - pivot
        if mask is not None:
            truth = load_truths(mask, index)
            d = where(truth, d)
            count = count - truth
        square = d * d
        s_rounded, t_rounded = d + m1, square + m2
        s, t = s + bits(s_rounded), t + bits(t_rounded)
        odd = odd | (bits(t_rounded) ^ bits(m2))
        s_finer = s_finer + bits(d - (s_rounded - m1) + m1_finer)
        rest = (square - (t_rounded - m2)) + _square_error(d, square, splitter)
        t_finer = t_finer + bits(rest + m2_finer)
    store(accumulators, block + sums(0, 0) * LANES, s)
    store(accumulators, block + sums(0, 1) * LANES, t)
    store(accumulators, block + sums(1, 0) * LANES, s_finer)
    store(accumulators, block + sums(1, 1) * LANES, t_finer)
    return count, odd


@inlined
def add_deviation(d: float, at: int, accumulators: Array, height: int, odd: Array) -> None:
    """Add one deviation and its square to one place."""
    m1, m2, m1_finer, m2_finer = _magics(accumulators, at, height)
    square = d * d
    s, t = d + m1, square + m2
    odd[0] |= bits(t) ^ bits(m2)
    rest = (square - (t - m2)) + _square_error(d, square, _SPLITTER)
    _add(accumulators, at, height, s, t, d - (s - m1) + m1_finer, rest + m2_finer)


@inlined
def add_products(
    dy: Array, x: Array, check: Any, start: int, stride: int, steps: int, at: int, accumulators: Array, height: int,
    pivots: Array, to_p: int, largest: Array, to_g: int, to_h: int,
) -> None:  # fmt: skip
    """Add gradients and their products with deviations, eight at a time, to eight places: see `backward._step`.

    Args:
        to_p, to_g, to_h: where the places' pivots, largest |dy| and, with `check`, largest |x − pivot| are.
    """
    block = at * height
    m_a, m_b = (
        number(load(accumulators, block + magic(0, 0) * LANES)),
        number(load(accumulators, block + magic(0, 1) * LANES)),
    )
    a, b = load(accumulators, block + sums(0, 0) * LANES), load(accumulators, block + sums(0, 1) * LANES)
    m_a_finer = number(load(accumulators, block + magic(1, 0) * LANES))
    m_b_finer = number(load(accumulators, block + magic(1, 1) * LANES))
    a_finer, b_finer = load(accumulators, block + sums(1, 0) * LANES), load(accumulators, block + sums(1, 1) * LANES)
    pivot, top_g = load(pivots, to_p), load(largest, to_g)
    top_h = load(largest, to_g if check is None else to_h)
    for j in range(steps):
        g, h = load(dy, start + j * stride), load(x, start + j * stride) - pivot
        size = magnitude(g)
        top_g = greater(top_g, size)
        if check is not None:
            h = where(size, h)
            top_h = greater(top_h, magnitude(h))
        product = g * h
        a_rounded, b_rounded = g + m_a, product + m_b
        a, b = a + bits(a_rounded), b + bits(b_rounded)
        a_finer = a_finer + bits(g - (a_rounded - m_a) + m_a_finer)
        b_finer = b_finer + bits(product - (b_rounded - m_b) + m_b_finer)
    store(accumulators, block + sums(0, 0) * LANES, a)
    store(accumulators, block + sums(0, 1) * LANES, b)
    store(accumulators, block + sums(1, 0) * LANES, a_finer)
    store(accumulators, block + sums(1, 1) * LANES, b_finer)
    store(largest, to_g, top_g)
    if check is not None:
        store(largest, to_h, top_h)


@inlined
def add_product(g: float, h: float, at: int, accumulators: Array, height: int) -> None:
    """Add one gradient and its product with a deviation to one place."""
    m_a, m_b, m_a_finer, m_b_finer = _magics(accumulators, at, height)
    product = g * h
    a, b = g + m_a, product + m_b
    _add(accumulators, at, height, a, b, g - (a - m_a) + m_a_finer, product - (b - m_b) + m_b_finer)
