"""Intervals of the metrics by resampling test documents, and paired differences of two runs.

Every aggregate metric is a function of sums over documents, so a replicate is a weighting of documents: no score is
looked at again.  Weights depend on (seed, number of the replicate) alone; two runs judged on the same documents get the
same ones, and what makes a document hard for both cancels in the difference.

R replicates, U units (groups of documents that are drawn together), M columns of sums, K metrics.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from pipeline.kernels.counts import checked_gold
from pipeline.kernels.lanes import uniform

ECE_BINS = 15
UNITS = 10_000  # units at most
CHUNK = 128  # replicates at once: accumulators of a label stay in the first-level cache

# what a document adds, in the order of the column `measures` of the table test_documents; names as in `ranking`.
# brier, log_loss: sums over the document's labels.  ece_b: sum of probabilities less positives in bin b of 15.
# The last three are influence values, mean zero over the fold: a replicate is the metric plus their weighted mean.
MEASURES = (
    *(f"{name}_at_{k}" for name in ("hits",) for k in (1, 3, 5)),
    *(f"r_at_{k}" for k in (5, 10)),
    "rp_at_5",
    *(f"{name}_at_{k}" for name in ("ndcg", "psp", "psp_best") for k in (1, 3, 5)),
    *(f"map_at_{k}" for k in (5, 10)),
    "lrap",
    "coverage_error",
    "ranking_loss",
    "brier",
    "log_loss",
    *(f"ece_{b}" for b in range(ECE_BINS)),
    "average_precision_macro",
    "average_precision_micro",
    "roc_auc_macro",
)
# columns of `Units.sums`; hamming_loss: wrong pairs of the document
SUMS = (*MEASURES, "samples_f1", "subset_accuracy", "hamming_loss", "jaccard_samples")
INFLUENCES = MEASURES[-3:]

LABEL_METRICS = ("micro_f1", "micro_precision", "micro_recall", "macro_f1", "macro_f1_all", "weighted_f1")
MEANS = (
    *("samples_f1", "jaccard_samples", "subset_accuracy"),
    *("r_at_5", "r_at_10", "rp_at_5", "ndcg_at_1", "ndcg_at_3", "ndcg_at_5"),
    *("map_at_5", "map_at_10", "lrap", "coverage_error", "ranking_loss"),
)
MEANS_OF_PAIRS = ("hamming_loss", "brier", "log_loss")
P_AT, PSP_AT = ("p_at_1", "p_at_3", "p_at_5"), ("psp_at_1", "psp_at_3", "psp_at_5")
METRICS = (*LABEL_METRICS, *MEANS, *MEANS_OF_PAIRS, *P_AT, *PSP_AT, "ece", *INFLUENCES)
LOWER_IS_BETTER = frozenset(("hamming_loss", "coverage_error", "ranking_loss", "ece", "brier", "log_loss"))

Values = NDArray[np.float64]


class Units(NamedTuple):
    """A test fold as the bootstrap sees it.

    documents: (U,) int64, documents of each unit.
    sums: (U, M) float64, columns `SUMS`.
    indptr: (L + 1,) int64.  The cells of label j are indptr[j]:indptr[j + 1]: the units where it is gold or a tag.
    unit, tp, fp, fn: (cells,) int32, ascending in unit within a label.
    """

    documents: NDArray[np.int64]
    sums: Values
    indptr: NDArray[np.int64]
    unit: NDArray[np.int32]
    tp: NDArray[np.int32]
    fp: NDArray[np.int32]
    fn: NDArray[np.int32]


def units_of(
    gold_indptr: ArrayLike,
    gold_labels: ArrayLike,
    tag_indptr: ArrayLike,
    tag_labels: ArrayLike,
    measures: ArrayLike,
    n_labels: int,
    if_undefined: float = 0.0,
    most: int = UNITS,
) -> Units:
    """Units of n documents in the order of `row`: document i belongs to unit i modulo min(n, most).

    Rows are ordered by a hash, so documents are exchangeable and a unit is a random group of them.  Sums over random
    groups have the variance of sums over documents (random groups: Wolter, Introduction to Variance Estimation, 2007,
    chapter 2); what groups lose is degrees of freedom, and 10,000 are plenty.  Memory and time stop growing with n.

    gold, tags: as in a CSR matrix, label ids ascending in a document.  measures: (n, len(MEASURES)).
    F1 and Jaccard of a document with neither gold nor tags are 0/0 = `if_undefined`.
    """
    n = len(gold_indptr) - 1
    if n < 1 or len(tag_indptr) != n + 1:
        raise ValueError(f"gold of {n} documents, tags of {len(tag_indptr) - 1}; expected the same number, at least 1")
    gold_indptr, gold_labels = checked_gold(gold_indptr, gold_labels, n, n_labels)
    tag_indptr, tag_labels = checked_gold(tag_indptr, tag_labels, n, n_labels)
    measures = np.asarray(measures, np.float64)
    if measures.shape != (n, len(MEASURES)) or not np.isfinite(measures).all():
        raise ValueError(f"measures are {measures.shape}; expected finite ({n}, {len(MEASURES)}), columns MEASURES")
    count = min(n, most)
    gold_row, tag_row = (np.repeat(np.arange(n), np.diff(p)) for p in (gold_indptr, tag_indptr))
    # a pair as one number, ascending: a tag is a hit where gold has the same number
    pairs, said = gold_row * n_labels + gold_labels, tag_row * n_labels + tag_labels
    missed, right = ~np.isin(pairs, said, assume_unique=True), np.isin(said, pairs, assume_unique=True)
    hits = np.bincount(tag_row[right], minlength=n)
    gold, tags = np.diff(gold_indptr), np.diff(tag_indptr)
    either = gold + tags
    sets = (
        np.where(either > 0, 2 * hits / np.maximum(either, 1), if_undefined),
        either == 2 * hits,
        either - 2 * hits,
        np.where(either > 0, hits / np.maximum(either - hits, 1), if_undefined),
    )
    of_document = np.arange(n) % count
    per_document = np.column_stack([measures, *sets])
    sums = np.zeros((count, per_document.shape[1]))
    for start in range(0, n, count):  # a round of the units at a time: np.add.at takes ten times as long
        part = per_document[start : start + count]
        sums[: len(part)] += part

    labels = np.concatenate([tag_labels, gold_labels[missed]])
    units = of_document[np.concatenate([tag_row, gold_row[missed]])]
    cells, place = np.unique(labels * count + units, return_inverse=True)
    kinds = np.concatenate([np.where(right, 0, 1), np.full(int(missed.sum()), 2)])
    tp, fp, fn = (np.bincount(place[kinds == kind], minlength=cells.size).astype(np.int32) for kind in range(3))
    return Units(
        np.bincount(of_document, minlength=count),
        sums,
        np.searchsorted(cells, np.arange(n_labels + 1) * count).astype(np.int64),
        (cells % count).astype(np.int32),
        *(tp, fp, fn),
    )


@njit(cache=True, nogil=True)
def _draw(seed, first, drawn):
    replicates, units = drawn.shape
    for r in range(replicates):
        key = np.uint64(uniform(seed, first + r) * 2.0**53)
        for i in range(units):
            drawn[r, np.int64(uniform(key, i) * units)] += 1


def weights(seed: int, replicates: range, units: int) -> NDArray[np.uint16]:
    """How often each unit is drawn, (len(replicates), units): `units` draws with replacement.  Rows sum to `units`.

    A replicate's weights are a function of (seed, number of the replicate, units) alone, so tasks may share the
    replicates out in any way.  replicates: consecutive numbers.  units: 1 to 65,535.
    """
    if not 1 <= units <= np.iinfo(np.uint16).max or replicates.step != 1 or replicates.start < 0:
        raise ValueError(f"weights of {replicates}, {units} units; expected consecutive replicates, 1 to 65535 units")
    drawn = np.zeros((len(replicates), units), np.uint16)
    _draw(np.uint64(seed % 2**64), replicates.start, drawn)
    return drawn


@njit(cache=True, nogil=True)
def _label_counts(unit, cell_tp, cell_fp, cell_fn, drawn, tp, fp, fn):
    """Counts of one label in every replicate.  drawn: (U, R), so that the inner loop is contiguous."""
    tp[:] = 0
    fp[:] = 0
    fn[:] = 0
    for c in range(unit.size):
        w = drawn[unit[c]]
        # nearly every cell is of one kind
        if cell_tp[c]:
            for r in range(w.size):
                tp[r] += np.int64(w[r]) * cell_tp[c]
        if cell_fp[c]:
            for r in range(w.size):
                fp[r] += np.int64(w[r]) * cell_fp[c]
        if cell_fn[c]:
            for r in range(w.size):
                fn[r] += np.int64(w[r]) * cell_fn[c]


@njit(cache=True, nogil=True, error_model="numpy")
def _add_labels(indptr, unit, cell_tp, cell_fp, cell_fn, drawn, if_undefined, found):
    """found: (6, R), summed over labels: tp, fp, fn, F1 of labels with gold in the replicate, how many those are, and F1
    times support.  Returns (R,) the sum of F1 over labels without gold in the fold, and how many have some."""
    replicates = drawn.shape[1]
    tp, fp, fn = np.zeros((3, replicates), np.int64)
    without = np.zeros(replicates)
    seen = 0
    for j in range(indptr.size - 1):
        start, stop = indptr[j], indptr[j + 1]
        if start == stop:
            without += if_undefined
            continue
        in_fold = cell_tp[start:stop].any() or cell_fn[start:stop].any()
        seen += in_fold
        _label_counts(
            unit[start:stop], cell_tp[start:stop], cell_fp[start:stop], cell_fn[start:stop], drawn, tp, fp, fn
        )
        for r in range(replicates):
            support = tp[r] + fn[r]
            denominator = tp[r] + fp[r] + support
            f1 = 2 * tp[r] / denominator if denominator else if_undefined
            found[0, r] += tp[r]
            found[1, r] += fp[r]
            found[2, r] += fn[r]
            found[5, r] += f1 * support
            if support:
                found[3, r] += f1
                found[4, r] += 1
            elif not in_fold:
                without[r] += f1
    return without, seen


@njit(cache=True, nogil=True)
def _add_sums(sums, drawn, found):
    """found: (R, M).  A product of matrices by hand: BLAS rounds a row by how many rows it is given."""
    for r in range(drawn.shape[0]):
        for u in range(drawn.shape[1]):
            if drawn[r, u]:
                w = np.float64(drawn[r, u])
                for m in range(sums.shape[1]):
                    found[r, m] += w * sums[u, m]


def replicate_metrics(
    units: Units, n_labels: int, point: Mapping[str, float], drawn: NDArray, if_undefined: float = 0.0
) -> Values:
    """Every aggregate metric of every replicate, (R, len(METRICS)); columns METRICS.

    point: the fold's own average_precision_macro, average_precision_micro and roc_auc_macro, which replicates move by
    the mean of their influence values.  drawn: (R, U) weights, a row with some weight; all ones give the metrics of the
    fold.

    macro_f1 averages over labels with a gold positive in the replicate, as the metric does in its fold; in macro_f1_all
    that mean stands for every label with one in the fold.  A replicate lacks a third of the labels of one document,
    which says nothing about them: counted as F1 0 they would pull every replicate below the fold.  0/0 is
    `if_undefined`.  O(cells + L) a replicate; no (R, L) array.
    """
    if units.indptr.size != n_labels + 1 or drawn.shape[1] != units.documents.size:
        raise ValueError(
            f"{units.indptr.size - 1} labels and {units.documents.size} units; expected {n_labels} and {drawn.shape[1]}"
        )
    found = [_replicate_metrics(units, n_labels, point, part, if_undefined) for part in _chunks(drawn)]
    return np.concatenate([np.empty((0, len(METRICS))), *found])


def _chunks(drawn) -> Iterator[NDArray]:
    return (drawn[start : start + CHUNK] for start in range(0, len(drawn), CHUNK))


def _replicate_metrics(units, n_labels, point, drawn, if_undefined):
    def ratio(numerator, denominator):
        return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), if_undefined)

    by_label = np.zeros((6, len(drawn)))
    cells = units.unit, units.tp, units.fp, units.fn
    without, seen = _add_labels(units.indptr, *cells, np.ascontiguousarray(drawn.T), float(if_undefined), by_label)
    tp, fp, fn, f1, with_gold, weighted = by_label
    macro_f1 = ratio(f1, with_gold)
    added = np.zeros((len(drawn), len(SUMS)))
    _add_sums(units.sums, np.ascontiguousarray(drawn), added)
    sums = dict(zip(SUMS, added.T, strict=True))
    n = drawn @ units.documents.astype(np.float64)

    gaps = sum(np.abs(sums[f"ece_{b}"]) for b in range(ECE_BINS))
    values = {
        "micro_precision": ratio(tp, tp + fp),
        "micro_recall": ratio(tp, tp + fn),
        "micro_f1": ratio(2 * tp, 2 * tp + fp + fn),
        "macro_f1": macro_f1,
        "macro_f1_all": (seen * macro_f1 + without) / n_labels,
        "weighted_f1": ratio(weighted, tp + fn),
        **{name: sums[name] / n for name in MEANS},
        **{name: ratio(sums[name], n * n_labels) for name in MEANS_OF_PAIRS},
        # k places even where there are fewer labels, as metrics.json has it
        **{name: sums[f"hits_at_{k}"] / (n * k) for name, k in zip(P_AT, (1, 3, 5), strict=True)},
        **{name: ratio(sums[name], sums[f"psp_best_at_{k}"]) for name, k in zip(PSP_AT, (1, 3, 5), strict=True)},
        "ece": ratio(gaps, n * n_labels),
        **{name: point[name] + sums[name] / n for name in INFLUENCES},
    }
    return np.column_stack([values[name] for name in METRICS])


def fold_metrics(units: Units, n_labels: int, point: Mapping[str, float], if_undefined: float = 0.0) -> Values:
    """The metrics of the fold itself, (len(METRICS),): every unit counts once."""
    return replicate_metrics(units, n_labels, point, np.ones((1, units.documents.size), np.uint16), if_undefined)[0]


def _quantiles(replicates, shares):
    """(2, K): quantile shares[side, k] of column k of (R, K), linear between order statistics."""
    ordered = np.sort(replicates, axis=0)
    place = shares * (len(ordered) - 1)
    low = np.floor(place).astype(np.int64)
    high = np.minimum(low + 1, len(ordered) - 1)
    column = np.arange(ordered.shape[1])
    below, above = ordered[low, column], ordered[high, column]
    return below + (place - low) * (above - below)


def percentile(replicates: Values, point: Values, confidence: float) -> Values:
    """Quantiles of the replicates (Efron)."""
    tail = (1 - confidence) / 2
    return _quantiles(replicates, np.full((2, point.size), [[tail], [1 - tail]])).T


def basic(replicates: Values, point: Values, confidence: float) -> Values:
    """Quantiles of the replicates mirrored at the point (Davison and Hinkley 1997, section 5.2)."""
    return (2 * point[:, None] - percentile(replicates, point, confidence))[:, ::-1]


def bias_corrected(replicates: Values, point: Values, confidence: float) -> Values:
    """Quantiles moved by twice the median bias (Efron and Tibshirani 1993, section 14.3, acceleration 0)."""
    below = (replicates < point).mean(axis=0) + 0.5 * (replicates == point).mean(axis=0)
    # a point beyond all replicates has no normal quantile; half a replicate stands for none
    bias = ndtri(np.clip(below, 0.5 / len(replicates), 1 - 0.5 / len(replicates)))
    z = ndtri((1 + confidence) / 2)
    return _quantiles(replicates, ndtr(2 * bias + np.array([[-z], [z]]))).T
