"""Sums that come out the same to the last bit however documents are cut into chunks and in whatever order they add.

Floating-point addition is not associative; integer addition is.  So every value is rounded once to a multiple of
2**-40, and what travels and adds are integers.  The ratio is taken at the end, on the driver.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

FRACTION_BITS = 40
SCALE = 1 << FRACTION_BITS
LARGEST = float(1 << 22)
WORD_BITS = 32
WORD_MASK = (1 << WORD_BITS) - 1


def to_fixed(x: ArrayLike) -> NDArray[np.int64]:
    """Values as integers in units of 2**-40, rounded half to even.

    x: any shape, |x| <= 2**22.  Each value is off by at most 2**-41 (4.6e-13); integers are exact.
    """
    x = np.asarray(x, dtype=np.float64)
    if not np.all(np.abs(x) <= LARGEST):
        raise ValueError(
            f"to_fixed: a value is NaN or beyond +-{LARGEST:.0f}; expected finite values within that range"
        )
    # the product is exact (a power of two), so the only rounding is rint's
    return np.rint(x * SCALE).astype(np.int64)


def join_words(high: ArrayLike, low: ArrayLike) -> Any:
    """high * 2**32 + low as a Python int, or as an object array of them for arrays."""
    # astype: asarray with dtype=object would keep a numpy scalar as it is, and that overflows
    return np.asarray(high).astype(object) * (1 << WORD_BITS) + np.asarray(low).astype(object)


def exact_sum(values: ArrayLike) -> Any:
    """Sum of int64 (m, ...) over the first axis, m < 2**31: a Python int, or an object array (...) of them.

    Cannot overflow.
    """
    values = np.asarray(values, dtype=np.int64)
    # two half words: each sums in int64 without overflow, which a plain sum of 2**53-sized counts does not
    return join_words((values >> WORD_BITS).sum(axis=0), (values & WORD_MASK).sum(axis=0))


def from_fixed(total: int) -> float:
    """Back from units of 2**-40.  Correctly rounded."""
    return int(total) / SCALE


def mean_of(total: int, count: int, if_undefined: float = 0.0) -> float:
    """total / count for a fixed-point total, rounded once.  0/0 is `if_undefined`."""
    return int(total) / (SCALE * int(count)) if count else if_undefined


def add_sums(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Key by key a + b.  Values are Python ints, int64 arrays or object arrays of Python ints."""
    if a.keys() != b.keys():
        raise ValueError(f"add_sums: keys {sorted(a.keys() ^ b.keys())} are on one side only; expected the same keys")
    return {name: a[name] + b[name] for name in a}
