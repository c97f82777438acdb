"""What each document adds to average precision and ROC AUC, to first order: their influence values.

A bootstrap that weighs documents would have to sort every curve again for every replicate.  The curves are smooth
functions of the weights, so the metric plus the weighted mean of the influence values is enough (the infinitesimal
jackknife: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 20.2; for AUC: DeLong, DeLong and
Clarke-Pearson, Biometrics 44, 1988).
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from pipeline.kernels.counts import checked_gold
from pipeline.kernels.ranking import Cuts, average_precision_from_counts, roc_auc_from_counts

Values = NDArray[np.float64]


class Steps(NamedTuple):
    """A function of (score, gold or not) for each curve of some cuts, constant between its cuts.

    positive, equal: (cuts,) for a positive and a negative whose score is a cut.
    between: (cuts + curves,) for other negatives, laid out as by `ranking.no_negatives`.
    """

    positive: Values
    equal: Values
    between: Values


def average_precision_steps(cuts: Cuts, between: ArrayLike, equal: ArrayLike, n: int) -> Steps:
    """Influence of one (document, label) pair on the mean average precision of the curves with a positive.

    between, equal: negatives of the fold, from `ranking.count_negatives`.  n: documents of the fold.

    With TP and FP the pairs at or above a cut, P the positives of the curve and precision = TP / (TP + FP), a positive
    at score s moves AP by n / P (precision(s) - AP + sum of FP / (TP + FP)^2 over the positives at or below s), a
    negative by -n / P (sum of TP / (TP + FP)^2 over the same).  Over a fold the values sum to 0.
    """
    found = average_precision_from_counts(cuts, np.asarray(between), np.asarray(equal))
    curves = max(int((~np.isnan(found)).sum()), 1)
    steps = _no_steps(cuts)
    _fill_average_precision(cuts.indptr, cuts.positives, between, equal, found, float(n) / curves, *steps)
    return steps


def roc_auc_steps(cuts: Cuts, between: ArrayLike, equal: ArrayLike, n: int) -> Steps:
    """The same for the mean ROC AUC of the curves with a positive and a negative.

    A positive moves AUC by n / P (share of negatives below it - AUC), a negative by n / N (share of positives above
    it - AUC), ties by half.
    """
    found = roc_auc_from_counts(cuts, np.asarray(between), np.asarray(equal))
    curves = max(int((~np.isnan(found)).sum()), 1)
    steps = _no_steps(cuts)
    _fill_roc_auc(cuts.indptr, cuts.positives, between, equal, found, float(n) / curves, *steps)
    return steps


def _no_steps(cuts):
    size, curves = cuts.scores.size, cuts.indptr.size - 1
    return Steps(np.zeros(size), np.zeros(size), np.zeros(size + curves))


@njit(cache=True, error_model="numpy")
def _fill_average_precision(indptr, positives, between, equal, found, scale, at_positive, at_equal, at_between):
    for c in range(indptr.size - 1):
        start, stop = indptr[c], indptr[c + 1]
        if start == stop:
            continue
        total = positives[start:stop].sum()
        tp = fp = 0
        for k in range(stop - 1, start - 1, -1):  # counts at or above each cut, kept where the values will stand
            tp += positives[k]
            fp += between[k + 1 + c] + equal[k]
            at_positive[k], at_equal[k] = tp, fp
        above = right = 0.0  # sums of FP and of TP over (TP + FP)^2, over the positives up to this cut
        for k in range(start, stop):
            both = at_positive[k] + at_equal[k]
            precision = at_positive[k] / both
            above += positives[k] * at_equal[k] / both / both
            right += positives[k] * precision / both
            at_positive[k] = scale / total * (precision - found[c] + above)
            at_equal[k] = -scale / total * right
            at_between[k + c + 1] = at_equal[k]


@njit(cache=True, error_model="numpy")
def _fill_roc_auc(indptr, positives, between, equal, found, scale, at_positive, at_equal, at_between):
    for c in range(indptr.size - 1):
        if np.isnan(found[c]):
            continue
        start, stop = indptr[c], indptr[c + 1]
        P = positives[start:stop].sum()
        N = between[start + c : stop + c + 1].sum() + equal[start:stop].sum()
        left = P
        below = 0
        for k in range(start, stop):
            at_between[k + c] = scale / N * (left / P - found[c])
            below += between[k + c]
            at_positive[k] = scale / P * ((below + 0.5 * equal[k]) / N - found[c])
            at_equal[k] = scale / N * ((left - 0.5 * positives[k]) / P - found[c])
            below += equal[k]
            left -= positives[k]
        at_between[stop + c] = -scale / N * found[c]


@njit(cache=True, error_model="numpy")
def _add(S, indptr, labels, scores, cut_indptr, positive, equal, between, found):
    m, n_labels = S.shape
    pooled = cut_indptr.size == 2
    for i in range(m):
        g = indptr[i]
        for j in range(n_labels):
            s = S[i, j]
            curve = 0 if pooled else j
            start = k = cut_indptr[curve]
            # most negatives lie below every positive: one comparison instead of a search
            if start < cut_indptr[curve + 1] and s >= scores[start]:
                k += np.searchsorted(scores[start : cut_indptr[curve + 1]], s, "right")
            tied = k > start and scores[k - 1] == s
            if g < indptr[i + 1] and labels[g] == j:
                g += 1
                found[i] += positive[k - 1]
            elif tied:
                found[i] += equal[k - 1]
            else:
                found[i] += between[k + curve]


def of_documents(S: NDArray, gold_indptr: ArrayLike, gold_labels: ArrayLike, cuts: Cuts, steps: Steps) -> Values:
    """Sum of the steps over each document's labels, (m,).

    S: (m, L), the very scores that the cuts were made from.  cuts: one curve for each label, or one for all pooled.
    """
    indptr, labels = checked_gold(gold_indptr, gold_labels, *S.shape)
    found = np.zeros(S.shape[0])
    _add(S, indptr, labels, cuts.scores, cuts.indptr, *steps, found)
    return found
