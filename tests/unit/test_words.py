"""Integer sums: exact, without an order, and carried canonically."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bnlayer.words import as_float, as_ints, carried, counted, flags, integers, product_error, remainder

WIDE = st.floats(-1, 1, allow_nan=False, allow_subnormal=True)


def column(*values: float) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """A float64 vector."""
    return np.array(values, np.float64)


@given(v=WIDE, exponent=st.integers(-480, 500))
def test_integers_and_remainder_split_a_value_exactly(v: float, exponent: int) -> None:
    """v = q·u + rest, |rest| ≤ u/2, for every |v| < 2^exponent."""
    value = float(np.ldexp(v, exponent))
    if abs(value) >= float(np.ldexp(1.0, exponent)):
        return
    unit = Fraction(2) ** (exponent - 51)
    magic = column(3.0 * np.ldexp(1.0, exponent))
    q, rest = int(integers(column(value), magic)[0]), Fraction(float(remainder(column(value), magic)[0]))
    assert q * unit + rest == Fraction(value)
    assert abs(rest) <= unit / 2


@given(a=st.floats(-1e100, 1e100, allow_subnormal=False), b=st.floats(-1e100, 1e100, allow_subnormal=False))
def test_product_error_is_what_the_product_lacks(a: float, b: float) -> None:
    """a·b = float64(a·b) + error, exactly, barring underflow."""
    if 0 < abs(a * b) < 1e-250 or (a * b == 0 and a != 0 and b != 0):
        return
    error = Fraction(float(product_error(column(a), column(b))[0]))
    assert Fraction(a) * Fraction(b) == Fraction(a * b) + error


@given(st.lists(st.integers(-(2**51), 2**51), min_size=1, max_size=50), st.randoms(use_true_random=False))
def test_carried_words_do_not_depend_on_the_order(terms: list[int], random: object) -> None:
    """Any grouping gives the same canonical pair, and the exact sum."""
    q = np.array(terms, np.int64)
    pair = carried(np.array([(q >> 32).sum()]), np.array([(q & 0xFFFFFFFF).sum()]))
    half = len(terms) // 2
    parts = [carried(np.array([(p >> 32).sum()]), np.array([(p & 0xFFFFFFFF).sum()])) for p in (q[:half], q[half:])]
    again = carried(parts[0][0] + parts[1][0], parts[0][1] + parts[1][1])
    assert [w.tolist() for w in pair] == [w.tolist() for w in again]
    assert as_ints(*pair) == [sum(terms)]
    assert as_float(*pair)[0] == float(sum(terms)) or abs(sum(terms)) >= 2**53


def test_flags_count_both_truths_over_ranks() -> None:
    """The sum of many ranks' flags still tells the two apart."""
    yes, no = np.array([True]), np.array([False])
    assert [bool(c[0]) for c in counted(sum(flags(no, yes) for _ in range(1000)))] == [False, True]  # type: ignore[arg-type]
    assert [bool(c[0]) for c in counted(flags(yes, no))] == [True, False]
