"""Curves -> cuts: one for all labels, or one a label with a guard for rare labels.

A label with three positives has a curve of three points; the cut that maximises its F1 is luck (and may tag
everything). The guard is empirical Bayes: pseudo-positives are added that behave as the positives of labels of similar
support do.  A frequent label keeps its own optimum, a rare one gets what is best for its kind.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from pipeline.kernels.curves import BINS, LOW, WIDTH, bin_edges

PER_OCTAVE = 4  # buckets of support in which curves are pooled
BANDWIDTH = 0.7  # standard deviation, in natural logarithms of support, of what counts as similar


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
        sums = np.concatenate([[0], np.cumsum(self.positives)])
        return sums[self.indptr[1:]] - sums[self.indptr[:-1]]


def at_or_above(counts: np.ndarray) -> np.ndarray:
    """counts (..., 1024) per bin -> (..., 1025) how many lie at or above each bin edge."""
    tail = np.cumsum(counts[..., ::-1], axis=-1)[..., ::-1]
    return np.concatenate([tail, np.zeros_like(tail[..., :1])], axis=-1)


def global_cut(histograms: Histograms) -> tuple[float, float]:
    """The one bin edge that maximises micro F1 over all labels, and that F1.  (+inf, 0) where there is no positive."""
    positives, negatives = histograms.totals()
    tp, fp = at_or_above(positives), at_or_above(negatives)
    if tp[0] == 0:
        return float("inf"), 0.0
    f1 = 2.0 * tp / (tp + fp + tp[0])
    best = int(np.argmax(f1))
    return float(bin_edges()[best]), float(f1[best])


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


@njit(cache=True, error_model="numpy")
def guarded_f1_cut(cut, tp, fp, support, own_p, own_n, prior_p, prior_n, guard, micro, micro_f1):
    """The cut with the largest F1 when `guard` pseudo-positives that behave like `prior` are added to the label's own.

    With `micro` > 0 the label's part in micro F1 counts too: F1 + micro (2 tp - micro_f1 (tp + fp)) / support, where
    micro_f1 is the best that one global cut reaches (raising 2 TP - F (TP + FP) is what raises a ratio of sums above
    F). Candidates are the label's own cuts and every bin edge.  Among equals the highest is taken.

    Args:
        cut, tp, fp (m,): the label's curve, cuts descending.
        support: positives of the label.
        own_p, own_n (1025,) float64: the label's positives and negatives at or above each bin edge.
        prior_p, prior_n (1025,) float64: the same of its peers, per positive.

    Returns:
        The cut, and F1 there, pseudo-positives included.
    """
    best, best_value, best_f1 = np.inf, -np.inf, 0.0
    total = support + guard
    for j in range(cut.size):
        at = min(max((cut[j] - LOW) / WIDTH, 0.0), np.float64(BINS))
        k = min(int(at), BINS - 1)
        part = at - k
        p = tp[j] + guard * (prior_p[k] + part * (prior_p[k + 1] - prior_p[k]))
        n = fp[j] + guard * (prior_n[k] + part * (prior_n[k + 1] - prior_n[k]))
        f1 = 2.0 * p / (p + n + total)
        value = f1 + micro * (2.0 * p - micro_f1 * (p + n)) / total
        if value > best_value or (value == best_value and cut[j] > best):
            best, best_value, best_f1 = cut[j], value, f1
    if guard > 0.0:
        for k in range(BINS, -1, -1):
            p, n = own_p[k] + guard * prior_p[k], own_n[k] + guard * prior_n[k]
            f1 = 2.0 * p / (p + n + total)
            value = f1 + micro * (2.0 * p - micro_f1 * (p + n)) / total
            edge = LOW + WIDTH * k
            if value > best_value or (value == best_value and edge > best):
                best, best_value, best_f1 = edge, value, f1
    return best, best_f1
