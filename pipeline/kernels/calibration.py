"""Platt's map from scores to probabilities, fitted to binned counts."""

import numpy as np
from numba import njit

MIN_SLOPE = 0.05  # above 0, so that calibration never changes the ranking within a label


@njit(cache=True, error_model="numpy")
def platt(centres, positives, negatives):
    """a, b of sigmoid(a score + b) that maximise the likelihood of binned counts (Platt 1999; Lin, Lin, Weng 2007).

    Newton's method with halving; the targets are smoothed as Platt has it, so the answer is finite for separable
    counts.

    Args:
        centres (m,) float64 scores; positives, negatives (m,) float64 >= 0, pseudo-counts allowed.

    Returns:
        a >= 0.05, b.  (1, 0) where there is no count.
    """
    total_p, total_n = positives.sum(), negatives.sum()
    if total_p + total_n <= 0.0:
        return 1.0, 0.0
    high, low = (total_p + 1.0) / (total_p + 2.0), 1.0 / (total_n + 2.0)
    a, b = 1.0, np.log((total_p + 1.0) / (total_n + 1.0))
    loss = _loss(centres, positives, negatives, high, low, a, b)
    for _ in range(100):
        ga = gb = haa = hab = hbb = 0.0
        for k in range(centres.size):
            weight = positives[k] + negatives[k]
            if weight == 0.0:
                continue
            s = centres[k]
            p = 1.0 / (1.0 + np.exp(-(a * s + b)))
            error = weight * p - positives[k] * high - negatives[k] * low
            curvature = weight * p * (1.0 - p)
            ga += error * s
            gb += error
            haa += curvature * s * s
            hab += curvature * s
            hbb += curvature
        haa += 1e-9
        hbb += 1e-9
        determinant = haa * hbb - hab * hab
        da, db = -(hbb * ga - hab * gb) / determinant, -(haa * gb - hab * ga) / determinant
        if abs(ga) < 1e-7 and abs(gb) < 1e-7:
            break
        size = 1.0
        while size > 1e-8:
            trial = _loss(centres, positives, negatives, high, low, a + size * da, b + size * db)
            if trial < loss + 1e-4 * size * (ga * da + gb * db):
                a, b, loss = a + size * da, b + size * db, trial
                break
            size /= 2.0
        else:
            break
    if a >= MIN_SLOPE:
        return a, b
    # an inverted or flat label: keep the ranking and put the mean probability where it belongs
    return MIN_SLOPE, _intercept(centres, positives, negatives, high, low, MIN_SLOPE)


@njit(cache=True, error_model="numpy")
def _loss(centres, positives, negatives, high, low, a, b):
    total = 0.0
    for k in range(centres.size):
        weight = positives[k] + negatives[k]
        if weight > 0.0:
            z = a * centres[k] + b
            target = positives[k] * high + negatives[k] * low
            total += weight * (max(z, 0.0) + np.log1p(np.exp(-abs(z)))) - target * z
    return total


@njit(cache=True, error_model="numpy")
def _intercept(centres, positives, negatives, high, low, a):
    below, above = -100.0, 100.0
    for _ in range(80):
        b = (below + above) / 2.0
        excess = 0.0
        for k in range(centres.size):
            weight = positives[k] + negatives[k]
            if weight > 0.0:
                excess += weight / (1.0 + np.exp(-(a * centres[k] + b))) - positives[k] * high - negatives[k] * low
        if excess > 0.0:
            above = b
        else:
            below = b
    return (below + above) / 2.0


def probability(scores: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """sigmoid(a score + b), float64; scores (n, L), a and b (L,)."""
    z = scores.astype(np.float64) * a + b
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-z))
