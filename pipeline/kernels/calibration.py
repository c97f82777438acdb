"""Maps from scores to probabilities, fitted to binned counts, and how good they are.

Every map rises strictly, so calibration never changes the ranking within a label.
"""

import numpy as np
from numba import njit

MIN_SLOPE = 0.05  # log-odds per unit of score, of every map that is one line; of lines through knots: outside them
KNOT_SLOPE = 1e-3 * MIN_SLOPE  # between knots
ECE_GROUPS = 15


@njit(cache=True, error_model="numpy")
def platt(centres, positives, negatives, a=1.0, b=np.nan, tolerance=-np.inf):
    """a, b of sigmoid(a score + b) that maximise the likelihood of binned counts (Platt 1999; Lin, Lin, Weng 2007).

    Newton's method with halving; the targets are smoothed as Platt has it, so the answer is finite for separable
    counts.

    Args:
        centres (m,) float64 scores; positives, negatives (m,) float64 >= 0, pseudo-counts allowed.
        a, b: where to start; by default, and where another start leads nowhere, (1, log-odds of the share of
            positives).
        tolerance: nats of the whole loss that a step must promise; by default, as far as rounding allows.

    Returns:
        a >= 0.05, b.  (1, 0) where there is no count.
    """
    total_p, total_n = positives.sum(), negatives.sum()
    if total_p + total_n <= 0.0:
        return 1.0, 0.0
    high, low = (total_p + 1.0) / (total_p + 2.0), 1.0 / (total_n + 2.0)
    base = np.log((total_p + 1.0) / (total_n + 1.0))
    given = not np.isnan(b)
    a, b, done = _newton(centres, positives, negatives, high, low, a, b if given else base, tolerance)
    if given and not done:
        # from where every probability is 0 or 1 there is no curvature to find the way by
        a, b, done = _newton(centres, positives, negatives, high, low, 1.0, base, tolerance)
    if a >= MIN_SLOPE:
        return a, b
    # an inverted or flat label: keep the ranking and put the mean probability where it belongs
    return MIN_SLOPE, _intercept(centres, positives, negatives, high, low, MIN_SLOPE)


@njit(cache=True, error_model="numpy")
def _newton(centres, positives, negatives, high, low, a, b, tolerance):
    """a, b, and whether the loss promises no further step."""
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
        if (abs(ga) < 1e-7 and abs(gb) < 1e-7) or -(ga * da + gb * db) < tolerance:
            return a, b, True
        size = 1.0
        while size > 1e-8:
            trial = _loss(centres, positives, negatives, high, low, a + size * da, b + size * db)
            if trial < loss + 1e-4 * size * (ga * da + gb * db):
                a, b, loss = a + size * da, b + size * db, trial
                break
            size /= 2.0
        else:
            break
    return a, b, False


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


@njit(cache=True, error_model="numpy")
def temperature(centres, positives, negatives):
    """a of sigmoid(a score) that maximises the likelihood of binned counts (Guo et al. 2017; a is 1 / temperature).

    The slope of the convex loss is followed to its zero, by Newton's method where that stays in the bracket and by
    halves where not.  Targets are smoothed as in `platt`, so the answer is finite for separable counts.

    Args:
        centres (m,) float64 scores; positives, negatives (m,) float64 >= 0.

    Returns:
        a >= 0.05.  1 where there is no count.
    """
    total_p, total_n = positives.sum(), negatives.sum()
    if total_p + total_n <= 0.0:
        return 1.0
    high, low = (total_p + 1.0) / (total_p + 2.0), 1.0 / (total_n + 2.0)
    below, above = MIN_SLOPE, 1.0
    if _slope(centres, positives, negatives, high, low, below)[0] >= 0.0:
        return MIN_SLOPE
    while _slope(centres, positives, negatives, high, low, above)[0] < 0.0 and above < 1e9:
        below, above = above, 2.0 * above
    a = (below + above) / 2.0
    for _ in range(100):
        slope, curvature = _slope(centres, positives, negatives, high, low, a)
        if slope > 0.0:
            above = a
        else:
            below = a
        step = a - slope / curvature if curvature > 0.0 else below
        if not below < step < above:
            step = (below + above) / 2.0
        if abs(step - a) <= 1e-13 * a:
            return step
        a = step
    return a


@njit(cache=True, error_model="numpy")
def _slope(centres, positives, negatives, high, low, a):
    """First and second derivative of the loss of sigmoid(a score)."""
    slope = curvature = 0.0
    for k in range(centres.size):
        weight = positives[k] + negatives[k]
        if weight > 0.0:
            p = 1.0 / (1.0 + np.exp(-a * centres[k]))
            slope += centres[k] * (weight * p - positives[k] * high - negatives[k] * low)
            curvature += centres[k] * centres[k] * weight * p * (1.0 - p)
    return slope, curvature


@njit(cache=True, error_model="numpy")
def pool_violators(centres, positives, negatives):
    """Isotonic regression of the share of positives on the score (pool adjacent violators; Barlow et al. 1972).

    Args:
        centres (m,) float64 ascending; positives, negatives (m,) float64 >= 0; empty bins are passed over.

    Returns:
        Blocks, (k,) float64 each: mean score, positives, negatives; the share of positives rises strictly.
    """
    score, p, n = np.empty(centres.size), np.empty(centres.size), np.empty(centres.size)
    k = 0
    for j in range(centres.size):
        if positives[j] + negatives[j] > 0.0:
            score[k], p[k], n[k] = centres[j], positives[j], negatives[j]
            k += 1
            # shares compared as products: p / (p + n) rises with p / n, and n may be 0
            while k > 1 and p[k - 2] * n[k - 1] >= p[k - 1] * n[k - 2]:
                _merge(score, p, n, k - 2)
                k -= 1
    return score[:k].copy(), p[:k].copy(), n[:k].copy()


@njit(cache=True, error_model="numpy")
def _merge(score, p, n, j):
    """Block j + 1 into block j."""
    left, right = p[j] + n[j], p[j + 1] + n[j + 1]
    score[j] += (score[j + 1] - score[j]) * (right / (left + right))
    p[j] += p[j + 1]
    n[j] += n[j + 1]


@njit(cache=True, error_model="numpy")
def isotonic(centres, positives, negatives, worth=1.0):
    """Knots of a strictly rising map through the blocks of isotonic regression on binned counts.

    Neighbouring blocks are merged while that costs less than `worth` nats of likelihood: 1 is what a parameter costs
    in Akaike's criterion.  What is left gets half a positive and half a negative each, so no probability is 0 or 1.

    Args:
        centres (m,) float64 ascending; positives, negatives (m,) float64 >= 0, pseudo-counts allowed.

    Returns:
        knot_score, knot_log_odds (k,) float64, both strictly ascending; k = 0 where there is no count.
    """
    score, p, n = pool_violators(centres, positives, negatives)
    k = score.size
    while k > 1:
        cheapest, at = np.inf, 0
        for j in range(k - 1):
            cost = _entropy(p[j] + p[j + 1], n[j] + n[j + 1]) - _entropy(p[j], n[j]) - _entropy(p[j + 1], n[j + 1])
            if cost < cheapest:
                cheapest, at = cost, j
        if cheapest >= worth:
            break
        _merge(score, p, n, at)
        k -= 1
        for j in range(at + 1, k):
            score[j], p[j], n[j] = score[j + 1], p[j + 1], n[j + 1]
    # halves may turn the order of small blocks
    score, p, n = pool_violators(score[:k], p[:k] + 0.5, n[:k] + 0.5)
    log_odds = np.log(p / n)
    for j in range(1, score.size):
        log_odds[j] = max(log_odds[j], log_odds[j - 1] + KNOT_SLOPE * (score[j] - score[j - 1]))
    return score, log_odds


@njit(cache=True, error_model="numpy")
def _entropy(p, n):
    """Nats of p positives and n negatives under their own share; 0 log 0 = 0."""
    total = p + n
    return -(p * np.log(p / total) if p > 0.0 else 0.0) - (n * np.log(n / total) if n > 0.0 else 0.0)


def log_odds_at(scores: np.ndarray, knot_score: np.ndarray, knot_log_odds: np.ndarray) -> np.ndarray:
    """Log-odds on the lines through the knots, with slope 0.05 outside; scores of any shape, float64.

    The knots are of one label, at least one, as `isotonic` makes them.
    """
    scores = np.asarray(scores, np.float64)
    outside = scores - np.clip(scores, knot_score[0], knot_score[-1])
    return np.interp(scores, knot_score, knot_log_odds) + MIN_SLOPE * outside


@njit(cache=True, error_model="numpy")
def losses(positives, negatives, log_odds):
    """What a map costs on binned counts, as sums that add over folds and labels.

    Args:
        positives, negatives (m,) >= 0; log_odds (m,) float64: what the map says in each bin.

    Returns:
        Sum of squared errors of the probability; sum of log losses, nats; expected positives (m,) float64.
    """
    squares = nats = 0.0
    expected = np.empty(log_odds.size)
    for k in range(log_odds.size):
        z = log_odds[k]
        q = 1.0 / (1.0 + np.exp(-z))
        # 1 - q would lose what is left of a probability near 1
        complement = 1.0 / (1.0 + np.exp(z))
        squares += positives[k] * complement * complement + negatives[k] * q * q
        nats += positives[k] * max(-z, 0.0) + negatives[k] * max(z, 0.0)
        nats += (positives[k] + negatives[k]) * np.log1p(np.exp(-abs(z)))
        expected[k] = (positives[k] + negatives[k]) * q
    return squares, nats, expected


@njit(cache=True, error_model="numpy")
def calibration_error(positives, negatives, expected, groups=ECE_GROUPS):
    """Expected calibration error of binned counts over groups of about equal mass (Nguyen, O'Connor 2015).

    From the lowest bin up, a group is closed when it holds its part of what is left, so one full bin (most rows are
    plain negatives) does not leave the other groups empty.  Bins are not split.

    Args:
        positives, negatives (m,) >= 0, by ascending score; expected (m,) float64: positives that the map expects.

    Returns:
        sum over groups of |positives - expected| / rows, in [0, 1]; nan where there is no count.
    """
    left = np.float64(positives.sum() + negatives.sum())
    total = left
    error = gap = mass = 0.0
    for k in range(expected.size):
        mass += positives[k] + negatives[k]
        gap += positives[k] - expected[k]
        if mass > 0.0 and mass * groups >= left:
            error += abs(gap)
            left -= mass
            groups = max(groups - 1, 1)
            gap = mass = 0.0
    return (error + abs(gap)) / total


def quality(positives: np.ndarray, negatives: np.ndarray, log_odds: np.ndarray) -> tuple[float, float, float]:
    """Brier score, log loss (nats) and ECE of one label, means over its rows; arrays (m,) by ascending score.

    nan where there is no count.
    """
    squares, nats, expected = losses(positives, negatives, log_odds)
    total = float(positives.sum() + negatives.sum()) or np.nan
    return squares / total, nats / total, calibration_error(positives, negatives, expected)


def probability(scores: np.ndarray, a: np.ndarray | float = 1.0, b: np.ndarray | float = 0.0) -> np.ndarray:
    """sigmoid(a score + b), float64; scores (n, L), a and b (L,) or one number for all."""
    z = scores.astype(np.float64) * a + b
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-z))
