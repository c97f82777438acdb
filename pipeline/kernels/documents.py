"""Decisions by document: how many of its most probable labels are said.

Nothing here is documents x labels x labels: what depends on the number of tags is computed for the few dozen most
probable labels of a document, and what is left of it counts as one Poisson variable.
"""

import math

import numpy as np
from numba import njit

TOLERANCE = 1e-5  # of an expected F1, for taking the labels of small probability together
MOST = 1_000  # tags of a document that `samples_f1` considers, and labels that it takes one by one
FIRST_FLOOR = 1e-3  # probability below which a label is not looked at by itself, unless it has to be


@njit(cache=True, nogil=True, error_model="numpy")
def keep_most_probable(tagged, Z, n):
    """Take all but the n tags of largest log-odds from every document, in place; ties: smaller label ids stay.

    tagged (m, L) bool; Z (m, L) float64, NaN counts as -inf; n >= 1.
    """
    falling, ids = np.empty(Z.shape[1]), np.empty(Z.shape[1], np.int64)
    for i in range(Z.shape[0]):
        count = 0
        for j in range(Z.shape[1]):
            if tagged[i, j]:
                falling[count] = -Z[i, j] if Z[i, j] == Z[i, j] else np.inf
                ids[count] = j
                count += 1
        if count <= n:
            continue
        last = np.partition(falling[:count], n - 1)[n - 1]
        left = n
        for k in range(count):
            left -= falling[k] < last
        for k in range(count):
            if falling[k] == last and left > 0:
                left -= 1
            elif falling[k] >= last:
                tagged[i, ids[k]] = False


@njit(cache=True, nogil=True, error_model="numpy")
def tag_at_least_one(tagged, Z, may, gap):
    """Give every document without a tag its label of largest log-odds, in place; ties: the smaller label id.

    Only labels of the mask `may` (L,) bool with Z above -inf.  With gap > 0 only where that label leads the second one
    by at least `gap` in log-odds; a label without a second one leads it.
    """
    for i in range(Z.shape[0]):
        best, first, second = -1, -np.inf, -np.inf
        for j in range(Z.shape[1]):
            if tagged[i, j]:
                best = -1
                break
            if may[j] and Z[i, j] > first:
                best, first, second = j, Z[i, j], first
            elif may[j] and Z[i, j] > second:
                second = Z[i, j]
        if best >= 0 and (gap <= 0.0 or first - second >= gap):
            tagged[i, best] = True


@njit(cache=True, nogil=True, error_model="numpy")
def _reciprocals(mean, s):
    """s[x] = E 1 / (x + T) of a Poisson variable T, for x = 1, 2, ...; s[0] is left at 0."""
    s[:] = 0.0
    spread = 12.0 * math.sqrt(mean) + 24.0
    logarithm = math.log(max(mean, 1e-300))
    for t in range(max(0, int(mean - spread)), int(mean + spread) + 1):
        weight = math.exp(t * logarithm - mean - math.lgamma(t + 1.0))
        if weight < 1e-18:
            if t > mean:
                break
            continue
        for x in range(1, s.size):
            s[x] += weight / (x + t)


@njit(cache=True, nogil=True, error_model="numpy")
def expected_f1(p, rest, if_undefined):
    """Expected F1 of a document for which the first k of its labels are said, k = 0 to m: (m + 1,) float64 in 0..1.

    F1 is 2 hits / (k + gold labels).  Labels are independent; p (m,) are the probabilities of those that may be said,
    in the order in which they are.  The others, which are not said, have a Poisson number of gold labels with mean
    `rest`.  Where nothing is said and nothing is gold F1 is 0/0 = if_undefined.

    O(m^2): Ye, Chai, Lee and Chieu, ICML 2012, algorithm 1, with the tail put where they start from 1 / x.
    """
    m = p.size
    hits = np.zeros((m + 1, m + 1))  # row k: distribution of the gold labels among the first k
    hits[0, 0] = 1.0
    for k in range(1, m + 1):
        for h in range(k + 1):
            hits[k, h] = (1.0 - p[k - 1]) * hits[k - 1, h]
            if h > 0:
                hits[k, h] += p[k - 1] * hits[k - 1, h - 1]
    f = np.zeros(m + 1)
    f[0] = if_undefined * hits[m, 0] * math.exp(-rest)
    s = np.empty(2 * m + 1)
    _reciprocals(rest, s)
    for k in range(m, 0, -1):
        # s[x] is now the expectation of 1 / (x + gold labels beyond the first k), exact for x <= 2 k
        for h in range(1, k + 1):
            f[k] += hits[k, h] * 2.0 * h * s[k + h]
        for x in range(1, 2 * k - 1):
            s[x] += p[k - 1] * (s[x + 1] - s[x])
    return f


@njit(cache=True, nogil=True, error_model="numpy")
def samples_f1(Z, may, if_undefined):
    """Tags (m, L) bool with the largest expected F1 of each document, its labels taken as independent.

    Of all sets of one size the most probable labels have the largest expected F1 (Lewis 1995), so only the size is
    chosen, the smallest among equals, up to MOST.  Ties of log-odds: smaller label ids come first.

    How little is looked at and what it costs:

    * Labels of small probability count together, as a Poisson number of gold labels, while the sum of their squared
      probabilities is at most 12 TOLERANCE.  Replacing a Bernoulli variable by a Poisson one of the same mean moves the
      expectation of g by at most p^2 / 2 times the largest second difference of g, and that of 2 h / (k + h + r) in r
      is at most 1/6 for h <= k; so the expected F1 is within TOLERANCE.  Without tags it is exact.  Beyond
      the MOST first labels all count together, whatever their probability.
    * With u_k the sum of the k largest probabilities, F1 <= 2 hits / (k + hits), concave in hits, gives an expected F1
      of at most 2 u_k / (k + u_k) for k tags, which falls in k: larger sets are not tried once that is no more than the
      best so far.

    Args:
        Z (m, L) float64: calibrated log-odds; NaN counts as -inf.
        may (L,) bool: the others are never said and taken for not gold.
        if_undefined: value of 0/0.  0: every document gets a tag; 1: none where nothing is likely.
    """
    out = np.zeros(Z.shape, np.bool_)
    n_labels = Z.shape[1]
    p, ids = np.empty(n_labels), np.empty(n_labels, np.int64)
    for i in range(Z.shape[0]):
        for j in range(n_labels):
            p[j] = 1.0 / (1.0 + math.exp(-Z[i, j])) if may[j] and Z[i, j] == Z[i, j] else 0.0
        nothing = 1.0  # probability that no label is gold, for which Poisson would not be close enough
        if if_undefined > 0.0:
            for j in range(n_labels):
                nothing *= 1.0 - p[j]
        floor, m = FIRST_FLOOR, 1
        while True:
            count, rest, squares, highest = 0, 0.0, 0.0, 0.0
            for j in range(n_labels):
                if p[j] >= floor:
                    ids[count] = j
                    count += 1
                elif p[j] > 0.0:
                    rest += p[j]
                    squares += p[j] * p[j]
                    highest = max(highest, p[j])
            if highest > 0.0 and count < MOST and (count < m or squares > 12.0 * TOLERANCE):
                floor = highest / 16.0
                continue
            if count == 0:
                break
            chosen = ids[:count]
            # by log-odds, because probabilities of confident labels are equal
            order = chosen[np.argsort(-Z[i][chosen], kind="mergesort")]
            likely = p[order]
            size = min(count, MOST)
            beyond, square = rest + likely[size:].sum(), squares
            while size > m and square + likely[size - 1] ** 2 <= 12.0 * TOLERANCE:
                size -= 1
                square += likely[size] ** 2
                beyond += likely[size]
            f = expected_f1(likely[:size], beyond, 0.0)
            f[0] = if_undefined * nothing
            best = np.argmax(f)
            following = likely[size] if size < count else highest
            largest = likely[:size].sum() + following
            if following == 0.0 or size >= MOST or f[best] >= 2.0 * largest / (size + 1 + largest):
                for k in range(best):
                    out[i, order[k]] = True
                break
            m = min(2 * size + 8, MOST)
    return out
