"""Integer sums: exact, without an order, and carried canonically."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bnlayer.limbs import (
    as_float,
    as_ints,
    carried,
    counted,
    flags,
    integers,
    integers_without_ties,
    product_error,
    remainder,
    square_integers,
)

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


def nearest(exact: Fraction, unit: Fraction) -> int:
    """The integer that is nearest to exact/unit; there must be one."""
    below = exact / unit // 1
    assert exact / unit - below != Fraction(1, 2), "a tie"
    return int(below + (exact / unit - below > Fraction(1, 2)))


# The places where rounding decides: odd numbers of half units, and what lies a little beside them.
HALVES = st.integers(-(2**51), 2**51 - 1).map(lambda n: (2 * n + 1) * 2.0**-52)


@given(
    v=WIDE | HALVES,
    exponent=st.integers(-150, 130),
    nudge=st.sampled_from([0, 1, -1, 3, -3]),
    scale=st.integers(-60, 0),
)
def test_integers_without_ties_are_the_nearest(v: float, exponent: int, nudge: int, scale: int) -> None:
    """To v·(1 − 2^-53), which never lies half-way, in Python's fractions."""
    value = float(np.ldexp(v, exponent + scale)) + nudge * float(np.ldexp(1.0, exponent - 52))
    if abs(value) >= float(np.ldexp(1.0, exponent)):
        return
    q = int(integers_without_ties(column(value), column(3.0 * np.ldexp(1.0, exponent)))[0])
    assert q == nearest(Fraction(value) * (1 - Fraction(1, 2**53)), Fraction(2) ** (exponent - 51))


@given(v=WIDE | HALVES, exponent=st.integers(-150, 130), scale=st.integers(-30, 0))
def test_square_integers_are_the_nearest(v: float, exponent: int, scale: int) -> None:
    """To the exact square, which never lies half-way either; to the rounded product they need not be."""
    value = float(np.ldexp(v, exponent + scale))
    if abs(value) >= float(np.ldexp(1.0, exponent)):
        return
    q = int(square_integers(column(value), column(np.ldexp(1.0, 2 * exponent)))[0])
    assert q == nearest(Fraction(value) ** 2, Fraction(2) ** (2 * exponent - 52))


def test_a_square_whose_rounded_product_is_a_tie_is_rounded_by_its_error() -> None:
    """float64(d·d) lies half-way between two units, d·d just beside: both ways, found by looking."""
    thirty_one_bits = 2**30 + np.arange(2**18)
    d = thirty_one_bits * 2.0**-31
    exact = thirty_one_bits**2  # of 2^-62; a unit is 2^-52
    product = (d * d * 2.0**62).astype(np.int64)
    tie = (product % 2**10 == 2**9) & (product != exact)
    assert set((exact > product)[tie]) == {True, False}
    assert not (exact[tie] % 2**10 == 2**9).any()
    assert (square_integers(d[tie], np.ones(tie.sum())) == (exact[tie] + 2**9) // 2**10).all()


@given(a=st.floats(-1e100, 1e100, allow_subnormal=False), b=st.floats(-1e100, 1e100, allow_subnormal=False))
def test_product_error_is_what_the_product_lacks(a: float, b: float) -> None:
    """a·b = float64(a·b) + error, exactly, barring underflow."""
    if 0 < abs(a * b) < 1e-250 or (a * b == 0 and a != 0 and b != 0):
        return
    error = Fraction(float(product_error(column(a), column(b))[0]))
    assert Fraction(a) * Fraction(b) == Fraction(a * b) + error


@given(st.lists(st.integers(-(2**51), 2**51), min_size=1, max_size=50), st.randoms(use_true_random=False))
def test_carried_limbs_do_not_depend_on_the_order(terms: list[int], random: object) -> None:
    """Any grouping gives the same canonical pair, and the exact sum."""
    q = np.array(terms, np.int64)
    pair = carried(np.array([(q >> 32).sum()]), np.array([(q & 0xFFFFFFFF).sum()]))
    half = len(terms) // 2
    parts = [carried(np.array([(p >> 32).sum()]), np.array([(p & 0xFFFFFFFF).sum()])) for p in (q[:half], q[half:])]
    regrouped = carried(parts[0][0] + parts[1][0], parts[0][1] + parts[1][1])
    assert [w.tolist() for w in pair] == [w.tolist() for w in regrouped]
    assert as_ints(*pair) == [sum(terms)]
    assert as_float(*pair)[0] == float(sum(terms)) or abs(sum(terms)) >= 2**53


def test_flags_count_both_truths_over_ranks() -> None:
    """The sum of many ranks' flags still tells the two apart."""
    yes, no = np.array([True]), np.array([False])
    assert [bool(c[0]) for c in counted(sum(flags(no, yes) for _ in range(1000)))] == [False, True]  # type: ignore[arg-type]
    assert [bool(c[0]) for c in counted(flags(yes, no))] == [True, False]
