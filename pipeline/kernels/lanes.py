"""Which rows take part in the lanes of a group, and which of them are positive."""

import numpy as np
from numba import njit

from pipeline.kernels.simd import LANES, aligned


@njit(cache=True, nogil=True)
def uniform(key, i):
    """A number in [0, 1) that is a function of (key, i) alone: the i-th of the SplitMix64 generator `key`.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014.
    """
    z = np.uint64(key) + np.uint64(i + 1) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) * 2.0**-53


@njit(cache=True, nogil=True)
def sample(n, key, share):
    """(n,) bool: each row with probability `share`, by (key, row)."""
    chosen = np.empty(n, np.bool_)
    for i in range(n):
        chosen[i] = uniform(key, i) < share
    return chosen


@njit(cache=True, nogil=True)
def _fill(inside, count, keep, keys, sign):
    for i in range(inside.size):
        for lane in range(count):
            taken = inside[i] and (keep[lane] >= 1.0 or uniform(keys[lane], i) < keep[lane])
            sign[i * LANES + lane] = -1 if taken else 0


def signs(inside: np.ndarray, positives: list[np.ndarray], keep=None, keys=None) -> np.ndarray:
    """Signs of up to sixteen lanes over the same rows.

    Args:
        inside (n,) bool: rows that take part in all lanes.
        positives: rows of the positives of each lane; those outside of `inside` do not take part.
        keep: share of the negatives of each lane that take part, drawn by (key, row); None: all.
        keys: uint64 of each lane, for the draw.

    Returns:
        (n * 16,) int8: +1 positive, -1 negative, 0 the row is not in the lane, or the lane is not used.
    """
    count = len(positives)
    sign = aligned(inside.size * LANES, np.int8)
    keep = np.ones(count) if keep is None else np.asarray(keep, np.float64)
    keys = np.zeros(count, np.uint64) if keys is None else np.asarray(keys, np.uint64)
    _fill(inside, count, keep, keys, sign)
    for lane, rows in enumerate(positives):
        sign[rows.astype(np.int64) * LANES + lane] = inside[rows]
    return sign
