"""Sums as pairs of int64 limbs: addition without an order, and without overflow.

A term v is rounded once to a multiple of u by adding a magic number M whose last place is u. The float64's bit
pattern, read as int64, is linear in the rounded value, so `q = bits(v + M) − bits(M)` is v/u as an integer:

    M = 1.5·2^52·u  for |v| ≤ 2^51·u        M = 2^52·u  for 0 ≤ v ≤ 2^52·u

Such a rounding has ties, which go to the even neighbour: whether v is rounded up or down would depend on what it is
added to, if M were a sum already. The float32 sums have none, so that terms may also be added one after the other:

    v·(1 − 2^-53)    with v = m·2^k, m odd, is an odd multiple of 2^(k − 53); half a unit is at least 2^(w − 52), k < w
    d·d              with d = m·2^k, m odd, is an odd multiple of 2^(2k); half a unit is 2^(2w − 53), an odd power
    g'·h             with g' the float64 next to g towards 0, whose last bit is odd, is an odd multiple of
                     2^(e − 53 + k) for 2^(e−1) < |g| < 2^e and h = m·2^k, m odd; half a unit is at least
                     2^(wA + wX − 52), and e ≤ wA, k < wX

g' = fl(g·(1 − 2^-53)), and for factors of 24 digits g'·h is rounded as g·h, but that ties go towards 0. The two differ
by less than half a unit, and by less than a sixteenth of the last place of g·h: no half-way point lies between them, a
tie is left on the side of 0, and a whole number of units rounds back.

A sum of q is the pair (hi, lo) with hi = Σ(q >> 32) and lo = Σ(q & 0xffffffff). Only the carried pair is canonical:
0 ≤ lo < 2^32. There is room for 2^40 terms and 2^20 ranks.

Source: order-independent summation by pre-rounding, Demmel and Nguyen, "Parallel Reproducible Summation" (2015).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LOW = 0xFFFF_FFFF
_SPLITTER = 134_217_729.0  # 2^27 + 1: Veltkamp's constant, which halves a float64's 53 bits


def limbs_of_sum(folds: int) -> int:
    """W, the limbs per channel of a batch's sums: two of each fold of the first sum, of the second, and two more."""
    return 4 * folds + 2


def integers(v: NDArray[np.float64], magic: NDArray[np.float64]) -> NDArray[np.int64]:
    """v in units of the magic number's last place, rounded to nearest even."""
    return (v + magic).view(np.int64) - magic.view(np.int64)


def integers_without_ties(v: NDArray[np.float64], magic: NDArray[np.float64]) -> NDArray[np.int64]:
    """v·(1 − 2^-53), rounded once, in units of the magic number's last place; |v| < 2^51 of them.

    The factor takes less than the last place of v, so it does nothing but to send ties towards 0. For v = g·h of at
    most 48 digits this is the rounding of g'·h.
    """
    q, rest = integers(v, magic), remainder(v, magic)
    tie = np.abs(rest) * 2 == np.spacing(magic)
    if tie.any():
        q += (tie & (rest > 0) & (v < 0)).astype(np.int64) - (tie & (rest < 0) & (v > 0))
    return q


def square_integers(v: NDArray[np.float64], magic: NDArray[np.float64]) -> NDArray[np.int64]:
    """v·v, rounded once, in units of the magic number's last place; 0 ≤ v·v < 2^52 of them."""
    square = v * v
    q, rest = integers(square, magic), remainder(square, magic)
    tie = np.abs(rest) * 2 == np.spacing(magic)  # of the rounded product: the product itself lies beside it
    if tie.any():
        error = np.where(tie, product_error(v, v), 0.0)
        q += ((rest > 0) & (error > 0)).astype(np.int64) - ((rest < 0) & (error < 0))
    return q


def remainder(v: NDArray[np.float64], magic: NDArray[np.float64]) -> NDArray[np.float64]:
    """What `integers` rounded away, exactly."""
    return v - ((v + magic) - magic)


def product_error(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """a·b − float64(a·b), exactly, barring underflow (Dekker's product, 1971)."""
    a_big, b_big = _SPLITTER * a, _SPLITTER * b
    a_hi, b_hi = a_big - (a_big - a), b_big - (b_big - b)
    a_lo, b_lo = a - a_hi, b - b_hi
    return a_lo * b_lo - (((a * b - a_hi * b_hi) - a_lo * b_hi) - a_hi * b_lo)


def carried(hi: NDArray[np.int64], lo: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The canonical pair of the same value."""
    return hi + (lo >> 32), lo & LOW


def as_float(hi: NDArray[np.int64], lo: NDArray[np.int64]) -> NDArray[np.float64]:
    """The value of a pair as float64."""
    hi, lo = carried(hi, lo)
    return hi.astype(np.float64) * 2.0**32 + lo.astype(np.float64)


def as_ints(hi: NDArray[np.int64], lo: NDArray[np.int64]) -> list[int]:
    """The value of a pair, exactly."""
    return [(h << 32) + low for h, low in zip(hi.tolist(), lo.tolist(), strict=True)]


def two_folds(limbs: NDArray[np.int64], shift: int) -> list[int]:
    """One integer per channel from the limbs of two folds, the second in units 2^shift finer."""
    coarse, fine = as_ints(*limbs[0:2]), as_ints(*limbs[2:4])
    return [(c << shift) + f for c, f in zip(coarse, fine, strict=True)]


def flags(high: NDArray[np.bool_], low: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Two booleans per channel in one int64; its sum over the ranks counts both."""
    return (high.astype(np.int64) << 32) | low


def counted(packed: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Whether any rank raised the high and the low flag."""
    return (packed >> 32) > 0, (packed & LOW) > 0
