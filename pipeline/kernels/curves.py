"""Out-of-fold scores of one label -> curve (exact triples) and histogram (fixed bins)."""

import numpy as np
from numba import njit

BINS, LOW, WIDTH = 1024, -16.0, 1.0 / 32.0  # histogram of log-odds; the outer bins are open


@njit(cache=True, nogil=True)
def curve(scores, positive):
    """(cut, tp, fp) just below every distinct score of a positive, from the highest score down.

    A cut lies strictly between two distinct scores, half way, so ties are never separated: rows with score >= cut are
    tp positives and fp negatives.  The F1-optimal cut is always one of these.  Below the lowest score of all, the cut
    is that score - 1.

    Args:
        scores (n,) float32, positive (n,) bool.

    Returns:
        cut (m,) float64 descending, tp (m,) int64, fp (m,) int64; m is the number of distinct scores of positives.
    """
    ranked = np.sort(scores[positive])
    levels = np.empty(ranked.size, np.float32)
    reached = np.zeros(ranked.size, np.int64)  # positives at the level or above
    m = 0
    for j in range(ranked.size - 1, -1, -1):
        if m == 0 or ranked[j] != levels[m - 1]:
            levels[m] = ranked[j]
            m += 1
        reached[m - 1] = ranked.size - j
    ascending = levels[:m][::-1].copy()
    between = np.zeros(m + 1, np.int64)  # negatives with exactly k levels at or below their score
    below = np.full(m + 1, -np.inf, np.float32)  # the highest negative among them
    for i in range(scores.size):
        if not positive[i]:
            # most negatives score below every positive
            k = 0 if m == 0 or scores[i] < ascending[0] else np.searchsorted(ascending, scores[i], side="right")
            between[k] += 1
            if k == 0 or scores[i] != ascending[k - 1]:
                below[k] = max(below[k], scores[i])
    cut, tp, fp = np.empty(m), np.empty(m, np.int64), np.empty(m, np.int64)
    above = 0
    for j in range(m):
        k = m - 1 - j  # place of this level in ascending order
        above += between[k + 1]
        # the next score down: a negative between the two levels, else the level below
        lower = max(below[k], ascending[k - 1] if k else np.float32(-np.inf))
        level = np.float64(ascending[k])
        cut[j] = (level + np.float64(lower)) / 2 if lower > -np.inf else level - 1.0
        tp[j], fp[j] = reached[j], above
    return cut, tp, fp


@njit(cache=True, nogil=True)
def histogram(scores, positive):
    """Positives and negatives per bin, (1024,) int64 each.  Bin b holds scores in [-16 + b/32, -16 + (b+1)/32)."""
    positives, negatives = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    for i in range(scores.size):
        # floor before the shift, which would round a score just below an edge up; clamped as a float: a huge score
        # does not fit an integer
        b = int(min(max(np.floor(np.float64(scores[i]) / WIDTH) - LOW / WIDTH, 0.0), BINS - 1.0))
        if positive[i]:
            positives[b] += 1
        else:
            negatives[b] += 1
    return positives, negatives


def bin_edges() -> np.ndarray:
    """(1025,) float64: bin b holds scores in [edges[b], edges[b + 1])."""
    return LOW + WIDTH * np.arange(BINS + 1)


def bin_centres() -> np.ndarray:
    """(1024,) float64."""
    return LOW + WIDTH * (np.arange(BINS) + 0.5)
