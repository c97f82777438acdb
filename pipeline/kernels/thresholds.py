"""Curves -> cuts: one a label under an objective, with a guard for rare labels, or across labels.

A label with three positives has a curve of three points; the cut that maximises its F1 is luck (and may tag
everything). The default guard is empirical Bayes: pseudo-positives are added that behave as the positives of labels of
similar support do.  A frequent label keeps its own optimum, a rare one gets what is best for its kind.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from pipeline.kernels.curves import BINS, LOW, WIDTH, bin_centres, bin_edges

PER_OCTAVE = 4  # buckets of support in which curves are pooled
BANDWIDTH = 0.7  # standard deviation, in natural logarithms of support, of what counts as similar

# objectives of one label; larger is better, among equals the highest cut wins
F_BETA, PRECISION, RECALL, COST, YOUDEN, PCUT = range(6)


class Curves(NamedTuple):
    """(cut, tp, fp) of L labels, ragged like `Histograms`; cuts descend within a label."""

    indptr: np.ndarray  # (L + 1,) int64
    cut: np.ndarray  # float64
    tp: np.ndarray  # int64
    fp: np.ndarray  # int64

    @classmethod
    def none(cls, labels: int) -> "Curves":
        """No exact cuts: only the edges of bins are left to choose from."""
        return cls(np.zeros(labels + 1, np.int64), np.empty(0), np.empty(0, np.int64), np.empty(0, np.int64))


class Histograms(NamedTuple):
    """Out-of-fold scores of L labels in bins, ragged: the filled bins of label l are indptr[l] to indptr[l + 1]."""

    indptr: np.ndarray  # (L + 1,) int64
    bins: np.ndarray  # int32, ascending within a label
    positives: np.ndarray  # int64
    negatives: np.ndarray  # int64

    @property
    def size(self) -> int:
        return self.indptr.size - 1

    def totals(self) -> tuple[np.ndarray, np.ndarray]:
        """Counts of all labels together: positives (1024,), negatives (1024,) int64."""
        return (
            np.bincount(self.bins, self.positives, BINS).astype(np.int64),
            np.bincount(self.bins, self.negatives, BINS).astype(np.int64),
        )

    def support(self) -> np.ndarray:
        """Positives of each label, (L,) int64."""
        return _per_label(self.indptr, self.positives)

    def rows(self) -> np.ndarray:
        """Documents of each label, (L,) int64; 0 where nothing is known of it."""
        return _per_label(self.indptr, self.positives + self.negatives)

    def owner(self) -> np.ndarray:
        """Label of each filled bin."""
        return np.repeat(np.arange(self.size), np.diff(self.indptr))


def _per_label(indptr, counts):
    sums = np.concatenate([[0], np.cumsum(counts)])
    return sums[indptr[1:]] - sums[indptr[:-1]]


def at_or_above(counts: np.ndarray) -> np.ndarray:
    """counts (..., 1024) per bin -> (..., 1025) how many lie at or above each bin edge."""
    tail = np.cumsum(counts[..., ::-1], axis=-1)[..., ::-1]
    return np.concatenate([tail, np.zeros_like(tail[..., :1])], axis=-1)


def global_cut(histograms: Histograms, beta: float = 1.0) -> tuple[float, float]:
    """The one bin edge that maximises micro F-beta over all labels, and that F.  (+inf, 0) where there is no positive.

    Among equals the lowest edge is taken.
    """
    positives, negatives = histograms.totals()
    tp, fp = at_or_above(positives), at_or_above(negatives)
    if tp[0] == 0:
        return float("inf"), 0.0
    f = (1 + beta**2) * tp / (tp + fp + beta**2 * tp[0])
    best = int(np.argmax(f))
    return float(bin_edges()[best]), float(f[best])


def budget_cut(histograms: Histograms, log_odds: np.ndarray, tags: float) -> float:
    """The cut on calibrated log-odds at which about `tags` (row, label) pairs of all are tagged, never more.

    Of all ways to give so many tags this one holds the most positives, as far as the probabilities are right.

    log_odds: of each filled bin, at its centre.
    """
    counts = histograms.positives + histograms.negatives
    order = np.argsort(-log_odds, kind="stable")
    reached = np.cumsum(counts[order])
    place = int(np.searchsorted(reached, tags, side="right"))  # bins that fit whole
    if place == 0:
        return float("inf")
    if place == order.size:
        return float(log_odds[order[-1]])
    above, below = log_odds[order[place - 1]], log_odds[order[place]]
    return float(above if above == below else (above + below) / 2)


@njit(cache=True, error_model="numpy")
def otsu_cuts(indptr, bins, counts):
    """Otsu's cut of each label's scores, (L,): the bin edge with the largest variance between the two sides.

    Otsu 1979, equation 14; labels play no part.  +inf where all scores are in one bin.
    """
    cuts = np.full(indptr.size - 1, np.inf)
    for label in range(indptr.size - 1):
        total = weighted = 0.0
        for k in range(indptr[label], indptr[label + 1]):
            total += counts[k]
            weighted += counts[k] * (bins[k] + 0.5)
        below = below_weighted = best = 0.0
        for k in range(indptr[label], indptr[label + 1] - 1):
            below += counts[k]
            below_weighted += counts[k] * (bins[k] + 0.5)
            above = total - below
            if below > 0.0 and above > 0.0:
                distance = below_weighted / below - (weighted - below_weighted) / above
                spread = below * above * distance * distance
                if spread > best:
                    # halfway through the empty bins
                    best, cuts[label] = spread, LOW + WIDTH * ((bins[k] + 1 + bins[k + 1]) // 2)
    return cuts


def peers(histograms: Histograms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What labels of similar support look like.

    Returns:
        bucket (L,) int64 of each label's support, -1 without positives; per bucket the smoothed sums of positives and
        of negatives (buckets, 1024) float64.  The weight of a label at distance x in log support is exp(-(x / 0.7)^2 /
        2).
    """
    support = histograms.support()
    bucket = np.where(support > 0, np.round(PER_OCTAVE * np.log2(np.maximum(support, 1))), -1).astype(np.int64)
    count = int(bucket.max(initial=0)) + 1
    owner = np.repeat(bucket, np.diff(histograms.indptr))
    known = owner >= 0
    place = owner[known] * BINS + histograms.bins[known]
    distance = np.subtract.outer(np.arange(count), np.arange(count)) * np.log(2.0) / PER_OCTAVE / BANDWIDTH
    kernel = np.exp(-0.5 * distance**2)
    sums = (
        np.bincount(place, counts[known], count * BINS).reshape(count, BINS)
        for counts in (histograms.positives, histograms.negatives)
    )
    # not `@`: BLAS adds in an order that depends on the processor
    positives, negatives = (np.einsum("ij,jk->ik", kernel, s, optimize=False) for s in sums)
    return bucket, positives, negatives


def prior(histograms: Histograms, label, bucket, positives: np.ndarray, negatives: np.ndarray):
    """Peers of one label without itself, per positive: positives and negatives (1024,) float64; None without peers."""
    own = slice(histograms.indptr[label], histograms.indptr[label + 1])
    p, n = positives[bucket].copy(), negatives[bucket].copy()
    p[histograms.bins[own]] -= histograms.positives[own]
    n[histograms.bins[own]] -= histograms.negatives[own]
    total = p.sum()
    if total < 1e-6:
        return None
    return np.maximum(p, 0.0) / total, np.maximum(n, 0.0) / total


class Goal(NamedTuple):
    """What a label's cut is chosen for, and the guard."""

    kind: int = F_BETA
    first: float = 1.0  # beta; floor of precision or recall; cost of a wrong tag
    second: float = 1.0  # cost of a missed tag
    guard: float = 0.0  # pseudo-positives that behave as the label's peers
    smooth: float = 0.0  # added to the numerator of F, twice that to its denominator
    micro: float = 0.0  # weight of the label's part in micro F beside its own F
    micro_f: float = 0.0  # micro F that one global cut reaches
    joint: bool = False  # F of the label plus micro F of the labels so far


@njit(cache=True, error_model="numpy")
def _value(goal, p, n, P, N, TP, FP, FN):
    """The goal's value with p of P positives and n of N negatives tagged; TP, FP, FN: of the labels before (joint)."""
    if goal.kind == PRECISION:
        return p / P if p + n > 0.0 and p / (p + n) >= goal.first else -np.inf
    if goal.kind == RECALL:
        return p / (p + n) if p > 0.0 and p / P >= goal.first else -np.inf
    if goal.kind == COST:
        return -goal.first * n - goal.second * (P - p)
    if goal.kind == YOUDEN:
        return p / P - n / max(N, 1e-300)
    if goal.kind == PCUT:
        return -abs(p + n - P)
    square = goal.first * goal.first
    f = ((1.0 + square) * p + goal.smooth) / (p + n + square * P + 2.0 * goal.smooth)
    if goal.joint:
        return f + 2.0 * (TP + p) / (2.0 * (TP + p) + FP + n + FN + P - p)
    # raising 2 TP - F (TP + FP) is what raises a ratio of sums above F
    return f + goal.micro * ((1.0 + square) * p - goal.micro_f * (p + n)) / P


@njit(cache=True, error_model="numpy")
def label_cuts(goal, order, curve_indptr, cut, tp, fp, indptr, bins, positives, negatives, bucket, peer_p, peer_n):
    """Cut of each label and F-beta there (of beta 1 for other goals), pseudo-positives included, (L,) float64 each.

    Candidates are the label's own cuts, tagging nothing (+inf), and, with a guard or for PCUT, every bin edge; among
    equals the highest is taken.  Labels without positives get +inf and 0.

    Joint micro and macro F (Lin and Lin, CIKM 2023): labels are visited in the given order, and each takes the cut with
    the largest sum of its own F and the micro F of all labels so far.

    Args:
        goal: Goal.
        order (L,): labels in the order of the visit.
        curve_indptr, cut, tp, fp: Curves.  indptr, bins, positives, negatives: Histograms.
        bucket, peer_p, peer_n: of `peers`.
    """
    cuts, expected = np.full(order.size, np.inf), np.zeros(order.size)
    own_p, own_n, like_p, like_n = np.zeros(BINS + 1), np.zeros(BINS + 1), np.zeros(BINS + 1), np.zeros(BINS + 1)
    TP = FP = FN = 0.0
    for label in order:
        own_p[:] = 0.0
        own_n[:] = 0.0
        support = others = 0.0
        for k in range(indptr[label], indptr[label + 1]):
            own_p[bins[k]] = positives[k]
            own_n[bins[k]] = negatives[k]
            support += positives[k]
            others += negatives[k]
        if support == 0.0:
            continue
        guard = 0.0
        if goal.guard > 0.0:
            total = 0.0
            for k in range(BINS):
                like_p[k] = max(peer_p[bucket[label], k] - own_p[k], 0.0)
                like_n[k] = max(peer_n[bucket[label], k] - own_n[k], 0.0)
                total += peer_p[bucket[label], k] - own_p[k]
            like_p[BINS] = like_n[BINS] = 0.0
            if total >= 1e-6:
                guard = goal.guard
                like_p /= total
                like_n /= total
        for k in range(BINS - 1, -1, -1):
            own_p[k] += own_p[k + 1]
            own_n[k] += own_n[k + 1]
            if guard > 0.0:
                like_p[k] += like_p[k + 1]
                like_n[k] += like_n[k + 1]
        P, N = support + guard, others + (guard * like_n[0] if guard > 0.0 else 0.0)
        best, best_p, best_n = np.inf, 0.0, 0.0
        best_value = _value(goal, 0.0, 0.0, P, N, TP, FP, FN)
        for j in range(curve_indptr[label], curve_indptr[label + 1]):
            p, n = np.float64(tp[j]), np.float64(fp[j])
            if guard > 0.0:
                at = min(max((cut[j] - LOW) / WIDTH, 0.0), np.float64(BINS))
                k = min(int(at), BINS - 1)
                part = at - k
                p += guard * (like_p[k] + part * (like_p[k + 1] - like_p[k]))
                n += guard * (like_n[k] + part * (like_n[k + 1] - like_n[k]))
            value = _value(goal, p, n, P, N, TP, FP, FN)
            if value > best_value or (value == best_value and best < np.inf and cut[j] > best):
                best, best_value, best_p, best_n = cut[j], value, p, n
        if guard > 0.0 or goal.kind == PCUT or curve_indptr[label + 1] == curve_indptr[label]:
            for k in range(BINS, -1, -1):
                p, n = own_p[k], own_n[k]
                if guard > 0.0:
                    p += guard * like_p[k]
                    n += guard * like_n[k]
                value = _value(goal, p, n, P, N, TP, FP, FN)
                edge = LOW + WIDTH * k
                if value > best_value or (value == best_value and best < np.inf and edge > best):
                    best, best_value, best_p, best_n = edge, value, p, n
        beta = goal.first if goal.kind == F_BETA else 1.0
        cuts[label] = best
        expected[label] = (1.0 + beta * beta) * best_p / (best_p + best_n + beta * beta * P)
        TP += best_p
        FP += best_n
        FN += P - best_p
    return cuts, expected


@njit(cache=True, error_model="numpy")
def counts_at(cuts, indptr, bins, positives, negatives):
    """Positives and negatives of each label at or above its cut, (L,) int64 each; cuts are rounded to bin edges."""
    tp, fp = np.zeros(cuts.size, np.int64), np.zeros(cuts.size, np.int64)
    for label in range(cuts.size):
        # clamped as a float: +inf does not fit an integer
        first = int(min(max(np.ceil((cuts[label] - LOW) / WIDTH - 0.5), 0.0), BINS))
        for k in range(indptr[label], indptr[label + 1]):
            if bins[k] >= first:
                tp[label] += positives[k]
                fp[label] += negatives[k]
    return tp, fp


def ceilings(histograms: Histograms) -> np.ndarray:
    """Upper edge of each label's highest filled bin, (L,): at or above all its scores (below the open last bin)."""
    last = np.where(np.diff(histograms.indptr) > 0, histograms.indptr[1:] - 1, 0)
    top = histograms.bins[last] if histograms.bins.size else np.zeros(histograms.size)
    return np.where(np.diff(histograms.indptr) > 0, LOW + WIDTH * (top + 1.0), np.inf)


def centres_of(histograms: Histograms) -> np.ndarray:
    """Score at the middle of each filled bin."""
    return bin_centres()[histograms.bins]
