"""Scores and gold -> P@k, nDCG@k, propensity-scored P@k, average precision, ROC AUC, calibration error.

Each function over a chunk of documents returns or fills integers that add (`exact`); `metrics` takes the ratios once.
Gold comes as in a CSR matrix (`counts`).  Labels are ordered by score descending, then by label id ascending, wherever
one order is needed; nDCG, LRAP, coverage and ranking loss treat tied labels together, as scikit-learn does.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from pipeline.kernels.counts import checked_gold, label_metrics, macro, set_metrics
from pipeline.kernels.exact import (
    FRACTION_BITS,
    SCALE,
    WORD_BITS,
    WORD_MASK,
    exact_sum,
    join_words,
    mean_of,
    to_fixed,
)

KS: Mapping[str, tuple[int, ...]] = {
    "p": (1, 3, 5),
    "r": (5, 10),
    "rp": (5,),
    "ndcg": (1, 3, 5),
    "psp": (1, 3, 5),
    "map": (5, 10),
}

# columns of the compiled loop over documents: at every cut-off, and of the whole ranking
AT_K = ("hits", "r", "rp", "ndcg", "psp", "psp_best", "map")
WHOLE = ("lrap", "coverage_error", "ranking_loss")
# what a chunk adds for a family of metrics; P@k stays a count of hits, so what it is divided by is decided at the end
ADDED = {"p": ("hits",), "psp": ("psp", "psp_best")}

# labels between two carries of the running fixed-point sums: 2**16 terms below 2**46 stay far inside int64
CARRY_EVERY = 1 << 16
GAP_BITS = 30  # of the calibration gaps of labels, which are plain int64


def inverse_propensity(train_support: ArrayLike, n_train: int, A: float = 0.55, B: float = 1.5) -> NDArray[np.float64]:
    """1 / p of every label, (L,), >= 1: how much a hit on it counts, given how often gold misses a label that rare.

    1 + C (support + B)**-A with C = (ln n - 1)(B + 1)**A (Jain, Prabhu and Varma, KDD 2016, section 4).  Below n = e
    documents C would turn negative; it is taken as 0, since no propensity exceeds 1.

    train_support: (L,) documents with the label among n_train >= 1.
    """
    support = np.asarray(train_support, dtype=np.float64)
    C = max(np.log(n_train) - 1.0, 0.0) * (B + 1.0) ** A
    return 1.0 + C * (support + B) ** -A


def _checked_scores(S: NDArray) -> NDArray:
    S = np.ascontiguousarray(S)
    if S.ndim != 2 or S.dtype not in (np.float32, np.float64):
        raise ValueError(f"scores are {S.dtype} with {S.ndim} axes; expected float32 or float64, (documents, labels)")
    # the minimum of anything with a NaN in it is NaN; no (m, L) temporary
    if S.size and np.isnan(S.min()):
        raise ValueError("scores contain NaN, which has no place in a ranking; expected numbers or infinities")
    return S


@njit(cache=True, error_model="numpy")
def _at_or_below(values, start, stop, x):
    """First index in start..stop whose value exceeds x, else stop; values ascending."""
    while start < stop:
        middle = (start + stop) >> 1
        if values[middle] <= x:
            start = middle + 1
        else:
            stop = middle
    return start


@njit(cache=True, error_model="numpy")
def _top(row, top_label, top_score):
    """Fill in the best labels in order; returns how many there are, at most top_label.size."""
    size = top_label.size
    filled = 0
    for j in range(row.size):
        s = row[j]
        if filled < size:
            p = filled
            filled += 1
        elif s > top_score[size - 1]:
            p = size - 1
        else:
            continue
        # strictly less: of two equal scores the label met first, the smaller id, stays ahead
        while p > 0 and top_score[p - 1] < s:
            top_score[p] = top_score[p - 1]
            top_label[p] = top_label[p - 1]
            p -= 1
        top_score[p] = s
        top_label[p] = j
    return filled


@njit(cache=True, error_model="numpy")
def _rank_documents(S, indptr, labels, inverse_p, discount, at_k, whole):
    m, n_labels = S.shape
    size = discount.size
    top_label = np.empty(size, np.int64)
    top_score = np.empty(size, S.dtype)
    gain = np.zeros(size)
    is_gold = np.zeros(n_labels, np.bool_)
    for i in range(m):
        row = S[i]
        gold = labels[indptr[i] : indptr[i + 1]]
        n_gold = gold.size
        if n_gold == 0:
            whole[i, 0] = 1.0
            continue
        for label in gold:
            is_gold[label] = True
        filled = _top(row, top_label, top_score)

        # nDCG: every label of a tie gets the mean gain of the tie, part of which may lie below the last place
        first = 0
        while first < filled:
            end = first + 1
            while end < filled and top_score[end] == top_score[first]:
                end += 1
            tied = end - first
            gold_tied = 0
            if end < filled:
                for p in range(first, end):
                    gold_tied += is_gold[top_label[p]]
            else:
                tied = 0
                for j in range(n_labels):
                    tied += row[j] == top_score[first]
                for label in gold:
                    gold_tied += row[label] == top_score[first]
            for p in range(first, end):
                gain[p] = gold_tied / tied
            first = end

        best = np.sort(inverse_p[gold])[::-1]
        hits = 0
        precisions = dcg = ideal = psp = psp_best = 0.0
        for p in range(size):
            if p < filled:
                dcg += discount[p] * gain[p]
                if is_gold[top_label[p]]:
                    hits += 1
                    precisions += hits / (p + 1)
                    psp += inverse_p[top_label[p]]
            if p < n_gold:
                ideal += discount[p]
                psp_best += best[p]
            reachable = min(p + 1, n_gold)
            at_k[i, 0, p] = hits
            at_k[i, 1, p] = hits / n_gold
            at_k[i, 2, p] = hits / reachable
            at_k[i, 3, p] = dcg / ideal
            at_k[i, 4, p] = psp
            at_k[i, 5, p] = psp_best
            at_k[i, 6, p] = precisions / reachable

        # ranks of the gold labels by counting: each score goes to the highest gold score it reaches; no sort of the row
        gold_score = np.sort(row[gold])
        reaching = np.zeros(n_gold, np.int64)
        lowest = gold_score[0]
        for j in range(n_labels):
            if row[j] >= lowest:
                reaching[_at_or_below(gold_score, 0, n_gold, row[j]) - 1] += 1
        rank = 0
        precision_at_gold = 0.0
        misordered = 0
        end = n_gold
        while end > 0:
            first = end - 1
            while first > 0 and gold_score[first - 1] == gold_score[end - 1]:
                first -= 1
            rank += reaching[end - 1]
            gold_rank = n_gold - first
            precision_at_gold += (end - first) * (gold_rank / rank)
            misordered += (end - first) * (rank - gold_rank)
            end = first
        whole[i, 0] = precision_at_gold / n_gold
        whole[i, 1] = rank
        if n_gold < n_labels:
            whole[i, 2] = misordered / (n_gold * (n_labels - n_gold))
        for label in gold:
            is_gold[label] = False


def ranking_values(
    S: NDArray,
    gold_indptr: ArrayLike,
    gold_labels: ArrayLike,
    inverse_propensity: ArrayLike,
    ks: Mapping[str, Sequence[int]] = KS,
) -> dict[str, NDArray[np.float64]]:
    """What each document of a chunk adds to the metrics that judge the ranking of its labels, (m,) each.

    S: (m, L) float32 or float64 scores, any strictly increasing function of them gives the same.
    inverse_propensity: (L,).
    ks: cut-offs of each family.

    Per document, with `hits` the gold labels among the first k:

        p     hits; divided by k in `ranking_metrics`
        r     hits / |gold|
        rp    hits / min(k, |gold|)  (Chalkidis et al. 2019)
        map   sum over hits of P at their place / min(k, |gold|)
        ndcg  gain 1, discount 1 / log2(1 + place), ties averaged  (McSherry and Najork, ECIR 2008)
        psp   sum of 1 / propensity over hits, and the same for the best ranking  (Jain, Prabhu and Varma, KDD 2016)
        lrap, coverage_error, ranking_loss  (Tsoumakas, Katakis and Vlahavas 2010), ranks of ties are their largest

    A document without gold labels adds 0 to all except lrap, where it adds 1; one with every label gold adds 0 to
    ranking_loss and 1 to lrap (scikit-learn's conventions).
    """
    S = _checked_scores(S)
    m, n_labels = S.shape
    indptr, labels = checked_gold(gold_indptr, gold_labels, m, n_labels)
    inverse_p = np.ascontiguousarray(inverse_propensity, dtype=np.float64)
    if inverse_p.shape != (n_labels,):
        raise ValueError(f"inverse_propensity has shape {inverse_p.shape}; expected ({n_labels},), one for each label")
    size = max(max(cuts) for cuts in ks.values())
    discount = 1.0 / np.log2(np.arange(size) + 2.0)
    at_k = np.zeros((m, len(AT_K), size))
    whole = np.zeros((m, len(WHOLE)))
    _rank_documents(S, indptr, labels, inverse_p, discount, at_k, whole)
    columns = [(column, k) for family, cuts in ks.items() for column in ADDED.get(family, (family,)) for k in cuts]
    found = {f"{column}_at_{k}": at_k[:, AT_K.index(column), k - 1] for column, k in columns}
    return found | dict(zip(WHOLE, whole.T, strict=True))


def ranking_sums(
    S: NDArray,
    gold_indptr: ArrayLike,
    gold_labels: ArrayLike,
    inverse_propensity: ArrayLike,
    ks: Mapping[str, Sequence[int]] = KS,
) -> dict[str, int]:
    """Sums of `ranking_values` over a chunk; they add, in units of 2**-40 (`exact`)."""
    values = ranking_values(S, gold_indptr, gold_labels, inverse_propensity, ks)
    return {name: exact_sum(to_fixed(of_documents)) for name, of_documents in values.items()}


def ranking_metrics(
    sums: Mapping[str, int],
    n: int,
    n_labels: int,
    ks: Mapping[str, Sequence[int]] = KS,
    if_undefined: float = 0.0,
    k_above_labels: Literal["k", "labels"] = "k",
) -> dict[str, float]:
    """Means of `ranking_sums` over n documents, those without gold included; PSP@k is a ratio of two sums.

    k_above_labels: P@k with k > L divides by k (so it stays below 1) or by the number of labels.
    No documents, or for PSP no gold at all: `if_undefined`.
    """
    found = {}
    for family, cuts in ks.items():
        for k in cuts:
            name = f"{family}_at_{k}"
            if family == "p":
                places = k if k_above_labels == "k" else min(k, n_labels)
                found[name] = mean_of(sums[f"hits_at_{k}"], n * places, if_undefined)
            elif family == "psp":
                best = sums[f"psp_best_at_{k}"]
                found[name] = sums[name] / best if best else if_undefined
            else:
                found[name] = mean_of(sums[name], n, if_undefined)
    return found | {name: mean_of(sums[name], n, if_undefined) for name in WHOLE}


class Cuts(NamedTuple):
    """The distinct scores of the positives of each curve, over the whole fold: where its precision and recall change.

    A curve is one label, or all labels pooled.  Curve c owns scores[indptr[c] : indptr[c + 1]], ascending; indptr is
    (curves + 1,) int64, positives (as scores) int64: how many positives have that score.  A label without positives is
    a curve without cuts and keeps its place.
    """

    scores: NDArray
    indptr: NDArray[np.int64]
    positives: NDArray[np.int64]


def positive_scores(S: NDArray, gold_indptr: ArrayLike, gold_labels: ArrayLike) -> tuple[NDArray[np.int64], NDArray]:
    """Label ids and scores of the gold pairs of a chunk, (pairs,) each: what `positive_cuts` needs of every chunk."""
    S = _checked_scores(S)
    indptr, labels = checked_gold(gold_indptr, gold_labels, *S.shape)
    return labels, S[np.repeat(np.arange(S.shape[0]), np.diff(indptr)), labels]


def positive_cuts(labels: ArrayLike, scores: NDArray, n_labels: int, pooled: bool = False) -> Cuts:
    """Cuts of every label, or of all labels pooled as one curve, from the scores of all positives of the fold.

    labels, scores: (pairs,), concatenated from `positive_scores` in any order.
    """
    curves = 1 if pooled else n_labels
    labels = np.zeros(len(scores), np.int64) if pooled else np.asarray(labels, dtype=np.int64)
    order = np.lexsort((scores, labels))
    labels, scores = labels[order], scores[order]
    new = np.ones(len(scores), dtype=bool)
    new[1:] = (np.diff(labels) > 0) | (scores[1:] > scores[:-1])
    starts = np.flatnonzero(new)
    indptr = np.searchsorted(labels[starts], np.arange(curves + 1)).astype(np.int64)
    return Cuts(scores[starts], indptr, np.diff(starts, append=len(scores)).astype(np.int64))


def no_negatives(cuts: Cuts) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Zeros for `count_negatives`: `between` (cuts + curves,) and `equal` (cuts,), int64.

    Interval k of curve c lies below its cut k, the last one above all; it stands at between[indptr[c] + c + k].
    """
    curves = cuts.indptr.size - 1
    return np.zeros(cuts.scores.size + curves, np.int64), np.zeros(cuts.scores.size, np.int64)


@njit(cache=True, error_model="numpy")
def _count_negatives(S, indptr, labels, scores, cut_indptr, between, equal):
    m, n_labels = S.shape
    pooled = cut_indptr.size == 2
    strangers = 0
    for i in range(m):
        g = indptr[i]
        for j in range(n_labels):
            s = S[i, j]
            curve = 0 if pooled else j
            start = cut_indptr[curve]
            k = start
            # most negatives lie below every positive: one comparison instead of a search
            if start < cut_indptr[curve + 1] and s >= scores[start]:
                k = _at_or_below(scores, start, cut_indptr[curve + 1], s)
            tied = k > start and scores[k - 1] == s
            if g < indptr[i + 1] and labels[g] == j:
                g += 1
                strangers += not tied
            elif tied:
                equal[k - 1] += 1
            else:
                between[k + curve] += 1
    return strangers


def count_negatives(
    S: NDArray,
    gold_indptr: ArrayLike,
    gold_labels: ArrayLike,
    cuts: Cuts,
    between: NDArray[np.int64],
    equal: NDArray[np.int64],
) -> None:
    """Add the negatives of a chunk to `between` and `equal` (from `no_negatives`), in place; the arrays of chunks add.

    S: (m, L), the very scores that the cuts were made from: a gold pair whose score is no cut is an error.
    cuts: one curve for each label, or one curve of all labels pooled.
    """
    S = _checked_scores(S)
    indptr, labels = checked_gold(gold_indptr, gold_labels, *S.shape)
    curves = cuts.indptr.size - 1
    if curves not in (1, S.shape[1]):
        raise ValueError(f"cuts has {curves} curves; expected {S.shape[1]}, one for each label, or 1 for all pooled")
    if between.size != cuts.scores.size + curves or equal.size != cuts.scores.size:
        raise ValueError("between and equal do not fit the cuts; expected the arrays of no_negatives(cuts)")
    strangers = _count_negatives(S, indptr, labels, cuts.scores, cuts.indptr, between, equal)
    if strangers:
        raise ValueError(
            f"{strangers} gold pairs have a score that is no cut; expected the same scores, bit for bit, in both passes"
        )


@njit(cache=True, error_model="numpy")
def _average_precision(indptr, positives, between, equal, found):
    for c in range(indptr.size - 1):
        n_positives = positives[indptr[c] : indptr[c + 1]].sum()
        if n_positives == 0:
            continue
        tp = fp = 0
        found[c] = 0.0
        for k in range(indptr[c + 1] - 1, indptr[c] - 1, -1):
            tp += positives[k]
            fp += between[k + 1 + c] + equal[k]
            found[c] += positives[k] / n_positives * (tp / (tp + fp))


def average_precision_from_counts(
    cuts: Cuts, between: NDArray[np.int64], equal: NDArray[np.int64], if_undefined: float = np.nan
) -> NDArray[np.float64]:
    """Average precision of every curve, (curves,): sum over cuts of (step in recall) x precision, no interpolation.

    between, equal: the counts of `count_negatives`, added over the fold.  No positives: `if_undefined`.
    """
    found = np.full(cuts.indptr.size - 1, if_undefined)
    _average_precision(cuts.indptr, cuts.positives, between, equal, found)
    return found


@njit(cache=True, error_model="numpy")
def _roc_auc(indptr, positives, between, equal, found):
    for c in range(indptr.size - 1):
        start, stop = indptr[c], indptr[c + 1]
        n_positives = positives[start:stop].sum()
        n_negatives = between[start + c : stop + c + 1].sum() + equal[start:stop].sum()
        if n_positives == 0 or n_negatives == 0:
            continue
        below = 0
        found[c] = 0.0
        for k in range(start, stop):
            below += between[k + c]
            # two ratios, not one of products: positives x negatives overflows int64 from 3e9 each
            found[c] += positives[k] / n_positives * ((below + 0.5 * equal[k]) / n_negatives)
            below += equal[k]


def roc_auc_from_counts(
    cuts: Cuts, between: NDArray[np.int64], equal: NDArray[np.int64], if_undefined: float = np.nan
) -> NDArray[np.float64]:
    """Area under the ROC curve of every curve, (curves,): P(positive above negative) + P(tie) / 2.

    between, equal: the counts of `count_negatives`, added over the fold.  No positives or no negatives: `if_undefined`.
    """
    found = np.full(cuts.indptr.size - 1, if_undefined)
    _roc_auc(cuts.indptr, cuts.positives, between, equal, found)
    return found


def curve_metrics(
    sums: Mapping[str, NDArray[np.int64]], label_cuts: Cuts, pooled_cuts: Cuts, if_undefined: float = 0.0
) -> dict[str, float]:
    """Averages of the curves.  Macro: over labels with a positive (AP), with a positive and a negative (AUC).

    sums: `between`, `equal` of the label curves, `pooled_between`, `pooled_equal` of the pooled one.
    No such label: `if_undefined`.
    """
    precision = average_precision_from_counts(label_cuts, sums["between"], sums["equal"])
    auc = roc_auc_from_counts(label_cuts, sums["between"], sums["equal"])
    pooled = average_precision_from_counts(pooled_cuts, sums["pooled_between"], sums["pooled_equal"], if_undefined)
    return {
        "average_precision_macro": macro(precision, ~np.isnan(precision), if_undefined),
        "average_precision_micro": float(pooled[0]),
        "roc_auc_macro": macro(auc, ~np.isnan(auc), if_undefined),
    }


@njit(cache=True, error_model="numpy")
def _add_probabilities(P, indptr, labels, pairs, positives, high, low, gaps_of_labels, of_documents):
    m, n_labels = P.shape
    bins = pairs.size
    eps = np.finfo(np.float64).eps
    scale, label_scale = np.float64(1 << FRACTION_BITS), np.float64(1 << GAP_BITS)
    for i in range(m):
        g = indptr[i]
        for start in range(0, n_labels, CARRY_EVERY):
            for j in range(start, min(start + CARRY_EVERY, n_labels)):
                p = P[i, j]
                b = min(np.int64(p * bins), bins - 1)
                pairs[b] += 1
                miss = p
                right = 1.0 - p
                gap = p
                if g < indptr[i + 1] and labels[g] == j:
                    g += 1
                    positives[b] += 1
                    miss = 1.0 - p
                    right = p
                    gap = p - 1.0
                nats = -np.log(min(max(right, eps), 1.0 - eps))
                low[b] += np.int64(np.rint(p * scale))
                low[bins] += np.int64(np.rint(miss * miss * scale))
                low[bins + 1] += np.int64(np.rint(nats * scale))
                gaps_of_labels[j, b] += np.int64(np.rint(gap * label_scale))
                of_documents[i, b] += gap
                of_documents[i, bins] += miss * miss
                of_documents[i, bins + 1] += nats
            for c in range(bins + 2):
                high[c] += low[c] >> WORD_BITS
                low[c] &= WORD_MASK


def probability_sums(
    P: NDArray, gold_indptr: ArrayLike, gold_labels: ArrayLike, bins: int = 15
) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Sums over the (document, label) pairs of a chunk that judge the probabilities; they add.  And those of documents.

    P: (m, L) probabilities, 0..1, used as float64.

    Returns a mapping: `bin_pairs`, `bin_positives` (bins,) int64, and in units of 2**-40 (`exact`) `bin_probability`
    (bins,) Python ints, `brier`, `log_loss`; `gaps_of_labels` (L, bins) int64, the sum of probabilities less the
    positives of each label and bin in units of 2**-GAP_BITS, which holds 2**33 documents.
    And (m, bins + 2): the gap in each bin, brier, log_loss of each document, sums over its labels.

    The bin of p is floor(p * bins), the last one also holds p = 1.  The log loss of a pair, in nats, clips
    probabilities to [eps, 1 - eps], eps = 2**-52, as scikit-learn does.
    """
    P = np.ascontiguousarray(P, dtype=np.float64)
    # written so that a NaN, which compares false, is refused too
    if P.size and not (P.min() >= 0.0 and P.max() <= 1.0):
        raise ValueError(f"probabilities span {P.min()}..{P.max()}; expected 0..1")
    indptr, labels = checked_gold(gold_indptr, gold_labels, *P.shape)
    pairs, positives = np.zeros((2, bins), np.int64)
    high, low = np.zeros((2, bins + 2), np.int64)
    gaps, of_documents = np.zeros((P.shape[1], bins), np.int64), np.zeros((P.shape[0], bins + 2))
    _add_probabilities(P, indptr, labels, pairs, positives, high, low, gaps, of_documents)
    total = join_words(high, low)
    sums = {
        "bin_pairs": pairs,
        "bin_positives": positives,
        "bin_probability": total[:bins],
        "brier": total[bins],
        "log_loss": total[bins + 1],
        "gaps_of_labels": gaps,
    }
    return sums, of_documents


def label_calibration_error(gaps_of_labels: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """Expected calibration error of each label over n documents, (L,): mean over bins of |sum of p - positives|."""
    return np.abs(gaps_of_labels * 2.0**-GAP_BITS).sum(axis=1) / max(n, 1)


def probability_metrics(sums: Mapping[str, Any], if_undefined: float = 0.0) -> dict[str, float]:
    """ECE, Brier score and log loss (nats) over all (document, label) pairs.  No pairs: `if_undefined`.

    ece: sum over bins of |positives - sum of probabilities| / pairs (Naeini, Cooper and Hauskrecht, AAAI 2015).
    """
    pairs = exact_sum(sums["bin_pairs"])
    gap = abs(sums["bin_positives"].astype(object) * SCALE - sums["bin_probability"]).sum()
    return {
        "ece": mean_of(gap, pairs, if_undefined),
        "brier": mean_of(sums["brier"], pairs, if_undefined),
        "log_loss": mean_of(sums["log_loss"], pairs, if_undefined),
    }


def metrics(
    sums: Mapping[str, Any],
    n: int,
    n_labels: int,
    label_cuts: Cuts,
    pooled_cuts: Cuts,
    ks: Mapping[str, Sequence[int]] = KS,
    if_undefined: float = 0.0,
    k_above_labels: Literal["k", "labels"] = "k",
) -> dict[str, float]:
    """Every metric of a fold of n documents and L labels.

    sums: the added sums of all chunks in one mapping: `tp`, `fp`, `fn` of `confusion`, those of `set_sums`,
    `ranking_sums`, `probability_sums`, and the four arrays of `curve_metrics`.
    """
    return {
        **label_metrics(sums["tp"], sums["fp"], sums["fn"], if_undefined),
        **set_metrics(sums, n, n_labels, if_undefined),
        **ranking_metrics(sums, n, n_labels, ks, if_undefined, k_above_labels),
        **curve_metrics(sums, label_cuts, pooled_cuts, if_undefined),
        **probability_metrics(sums, if_undefined),
    }
