"""Intervals of the metrics by resampling test documents, and paired differences of two runs.

Every aggregate metric is a function of sums over documents, so a replicate is a weighting of documents: no score is
looked at again.  Weights depend on (seed, number of the replicate) alone; two runs judged on the same documents get the
same ones, and what makes a document hard for both cancels in the difference.

R replicates, U units (groups of documents that are drawn together), M columns of sums, K metrics.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr

from pipeline.kernels.counts import checked_gold, precision_recall_f1, set_values
from pipeline.kernels.lanes import uniform

ECE_BINS = 15
UNITS, CELLS = 10_000, 20_000_000  # units at most, and where labels are many: units x labels
CHUNK = 128  # replicates at once: accumulators of a label stay in the first-level cache
LABELS_AT_ONCE = 256  # whose F1 in every replicate is held

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
SETS = ("samples_f1", "subset_accuracy", "hamming_loss", "jaccard_samples")
SUMS = (*MEASURES, *SETS)
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
UNBOUNDED = frozenset(("coverage_error", "log_loss"))  # the others end at 1

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


class Documents(NamedTuple):
    """Some documents in the order of `row`: gold and tags as in a CSR matrix, label ids ascending in a document.

    measures: (m, len(MEASURES)) float64.
    """

    gold_indptr: ArrayLike
    gold_labels: ArrayLike
    tag_indptr: ArrayLike
    tag_labels: ArrayLike
    measures: ArrayLike


def most_units(n_labels: int) -> int:
    """Units at most: 10,000, and fewer above 2,000 labels, since a unit may have a cell of each; at least 1,000."""
    return int(np.clip(CELLS // max(n_labels, 1), 1_000, UNITS))


def units_of(
    gold_indptr: ArrayLike,
    gold_labels: ArrayLike,
    tag_indptr: ArrayLike,
    tag_labels: ArrayLike,
    measures: ArrayLike,
    n_labels: int,
    if_undefined: float = 0.0,
    most: int = 0,
) -> Units:
    """Units of n documents at once: see `units_of_parts`."""
    documents = Documents(gold_indptr, gold_labels, tag_indptr, tag_labels, measures)
    return units_of_parts([documents], len(gold_indptr) - 1, n_labels, if_undefined, most)


def units_of_parts(
    parts: Iterable[Documents], n: int, n_labels: int, if_undefined: float = 0.0, most: int = 0
) -> Units:
    """Units of n documents that come in parts, in the order of `row`: document i belongs to unit i modulo min(n, most).

    Rows are ordered by a hash, so documents are exchangeable and a unit is a random group of them.  Sums over random
    groups have the variance of sums over documents (random groups: Wolter, Introduction to Variance Estimation, 2007,
    chapter 2); what groups lose is degrees of freedom, and 1,000 are plenty.  Memory and time stop growing with n: a
    part, `most` x len(SUMS) sums, and a cell for each (unit, label) with gold or a tag.

    F1 and Jaccard of a document with neither gold nor tags are 0/0 = `if_undefined`.  most: 0 for `most_units`.
    """
    if n < 1:
        raise ValueError(f"{n} documents; expected at least 1")
    count = min(n, most or most_units(n_labels))
    sums = np.zeros((count, len(SUMS)))
    cells, counted = np.empty(0, np.int64), np.empty((3, 0), np.int64)
    first = 0
    for part in parts:
        values, key, kinds = _documents(part, first, count, n_labels, if_undefined)
        for at in range(0, len(values), count):  # a round of the units at a time: np.add.at takes ten times as long
            piece = values[at : at + count]
            place = (first + at + np.arange(len(piece))) % count
            sums[place] += piece
        cells, place = np.unique(np.concatenate([cells, key]), return_inverse=True)
        known = counted.shape[1]
        more = [np.bincount(place[known:][kinds == kind], minlength=cells.size) for kind in range(3)]
        of_before = [np.bincount(place[:known], c, cells.size).astype(np.int64) for c in counted]
        counted = np.array(more) + np.array(of_before)
        first += len(values)
    if first != n:
        raise ValueError(f"the parts hold {first} documents; expected {n}")
    return Units(
        np.bincount(np.arange(n) % count, minlength=count),
        sums,
        np.searchsorted(cells, np.arange(n_labels + 1) * count).astype(np.int64),
        (cells % count).astype(np.int32),
        *counted.astype(np.int32),
    )


def _documents(part, first, count, n_labels, if_undefined):
    """Sums of each document, (m, len(SUMS)); the cells of its gold and tags, and whether each is TP, FP or FN."""
    n = len(part.gold_indptr) - 1
    if len(part.tag_indptr) != n + 1:
        raise ValueError(f"gold of {n} documents, tags of {len(part.tag_indptr) - 1}; expected the same number")
    gold_indptr, gold_labels = checked_gold(part.gold_indptr, part.gold_labels, n, n_labels)
    tag_indptr, tag_labels = checked_gold(part.tag_indptr, part.tag_labels, n, n_labels)
    measures = np.asarray(part.measures, np.float64)
    if measures.shape != (n, len(MEASURES)) or not np.isfinite(measures).all():
        raise ValueError(f"measures are {measures.shape}; expected finite ({n}, {len(MEASURES)}), columns MEASURES")
    gold_row, tag_row = (np.repeat(np.arange(n), np.diff(p)) for p in (gold_indptr, tag_indptr))
    # a pair as one number, ascending: a tag is a hit where gold has the same number
    pairs, said = gold_row * n_labels + gold_labels, tag_row * n_labels + tag_labels
    missed, right = ~np.isin(pairs, said, assume_unique=True), np.isin(said, pairs, assume_unique=True)
    hits = np.bincount(tag_row[right], minlength=n)
    sets = set_values(hits, np.diff(tag_indptr), np.diff(gold_indptr), if_undefined)
    labels = np.concatenate([tag_labels, gold_labels[missed]])
    units = (first + np.concatenate([tag_row, gold_row[missed]])) % count
    kinds = np.concatenate([np.where(right, 0, 1), np.full(int(missed.sum()), 2)])
    return np.column_stack([measures, *(sets[name] for name in SETS)]), labels * count + units, kinds


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
    """found: (6, R), summed over labels: tp, fp, fn, F1 where the replicate has gold, F1, F1 x support.

    Returns how many labels have gold in the fold.
    """
    replicates = drawn.shape[1]
    tp, fp, fn = np.zeros((3, replicates), np.int64)
    seen = 0
    for j in range(indptr.size - 1):
        start, stop = indptr[j], indptr[j + 1]
        if start == stop:
            found[4] += if_undefined
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
            if support:  # a label that the replicate lost adds 0, not `if_undefined`
                found[3, r] += f1
            found[4, r] += f1
            found[5, r] += f1 * support
    return seen


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

    macro_f1 averages over labels with a gold positive in the fold; one that the replicate has lost counts 0.  Labels
    vanish from a replicate as labels of the population vanish from the fold, and `intervals` puts that right.  0/0 is
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
    seen = _add_labels(units.indptr, *cells, np.ascontiguousarray(drawn.T), float(if_undefined), by_label)
    tp, fp, fn, f1, f1_all, weighted = by_label
    added = np.zeros((len(drawn), len(SUMS)))
    _add_sums(units.sums, np.ascontiguousarray(drawn), added)
    sums = dict(zip(SUMS, added.T, strict=True))
    n = drawn @ units.documents.astype(np.float64)

    gaps = sum(np.abs(sums[f"ece_{b}"]) for b in range(ECE_BINS))
    values = {
        "micro_precision": ratio(tp, tp + fp),
        "micro_recall": ratio(tp, tp + fn),
        "micro_f1": ratio(2 * tp, 2 * tp + fp + fn),
        "macro_f1": f1 / seen if seen else np.full(len(drawn), float(if_undefined)),
        "macro_f1_all": f1_all / n_labels,
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


def percentile(replicates: Values, confidence: float) -> Values:
    """The middle `confidence` of the columns of (R, K), (K, 2)."""
    tail = (1 - confidence) / 2
    return np.quantile(replicates, [tail, 1 - tail], axis=0).T


def _with_point(found, point):
    return np.column_stack([np.minimum(found[:, 0], point), np.maximum(found[:, 1], point)])


def intervals(replicates: Values, point: Values, confidence: float) -> Values:
    """Intervals (K, 2) of the metrics METRICS, point (K,), from their replicates (R, K): the basic bootstrap.

    Quantiles of the replicates mirrored at the point (Davison and Hinkley 1997, section 5.2).  Labels get lost from a
    replicate as they get lost from the fold, so the replicates of macro F1 lie as far below the fold as the fold lies
    below the truth; percentiles look on the wrong side.  Cut to the range of the metric, and always with the point in
    it, to which it is extended where that bias is larger than the spread.
    """
    low, high = percentile(replicates, confidence).T
    found = np.column_stack([2 * point - high, 2 * point - low])
    most = np.array([np.inf if name in UNBOUNDED else 1.0 for name in METRICS])
    return _with_point(np.clip(found, 0.0, most[:, None]), point)


def difference_intervals(replicates: Values, point: Values, confidence: float) -> Values:
    """Intervals (K, 2) of paired differences, point (K,), from replicates (R, K): percentiles.

    The bias of `intervals` is common to both runs and cancels.  Always with the point in it.  A label of few documents
    is missing from many replicates, whose difference is then 0, so that chance on one document cannot exclude 0.
    """
    return _with_point(percentile(replicates, confidence), point)


def metric_intervals(
    units: Units,
    n_labels: int,
    point: Mapping[str, float],
    replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    if_undefined: float = 0.0,
) -> dict[str, tuple[float, float]]:
    """Interval of every metric of METRICS.  point: as in `replicate_metrics`."""
    drawn = weights(seed, range(replicates), units.documents.size)
    found = replicate_metrics(units, n_labels, point, drawn, if_undefined)
    fold = fold_metrics(units, n_labels, point, if_undefined)
    low, high = intervals(found, fold, confidence).T.tolist()
    return dict(zip(METRICS, zip(low, high, strict=True), strict=True))


class Comparison(NamedTuple):
    """Run B less run A.  Metrics (K,), columns METRICS; labels (L,).

    p: two-sided.  tested: labels with gold on which the runs decide differently somewhere.  better, worse: of the
    tested, those whose interval excludes 0.  holds: of those, the ones that remain when a share of 5 % may be false
    (Benjamini and Hochberg 1995).  by_chance: tested labels that would be better or worse if the runs were equal.
    """

    a: Values
    b: Values
    difference: Values
    interval: Values  # (K, 2)
    p: Values
    support: NDArray[np.int64]
    f1_a: Values
    f1_b: Values
    label_difference: Values
    label_interval: Values  # (L, 2)
    label_p: Values
    tested: NDArray[np.bool_]
    better: NDArray[np.bool_]
    worse: NDArray[np.bool_]
    holds: NDArray[np.bool_]
    by_chance: float


def compare(
    a: Units,
    b: Units,
    n_labels: int,
    point_a: Mapping[str, float],
    point_b: Mapping[str, float],
    replicates: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
    if_undefined: float = 0.0,
) -> Comparison:
    """Paired comparison of two runs on the same documents in the same order, with the same labels.

    Both get the same weights.  p of a metric: twice the share of replicates on the other side of zero, the fold itself
    counted as one.  p of a label: `label_p_values`, as replicates cannot show a p below 2 / R and thousands of labels
    ask for less.  Memory: R x U weights, twice.
    """
    if not np.array_equal(a.documents, b.documents):
        raise ValueError(f"units of {a.documents.sum()} and of {b.documents.sum()} documents; expected the same")
    drawn = weights(seed, range(replicates), a.documents.size)
    runs = (a, point_a), (b, point_b)
    of_a, of_b = (replicate_metrics(units, n_labels, point, drawn, if_undefined) for units, point in runs)
    fold_a, fold_b = (fold_metrics(units, n_labels, point, if_undefined) for units, point in runs)
    moved = of_b - of_a
    difference = fold_b - fold_a
    side = np.minimum((moved <= 0).sum(axis=0), (moved >= 0).sum(axis=0))

    counts_a, counts_b = _label_totals(a), _label_totals(b)
    support = counts_a[0] + counts_a[2]
    if not np.array_equal(support, counts_b[0] + counts_b[2]):
        raise ValueError("gold differs between the runs; expected the same")
    f1_a, f1_b = (precision_recall_f1(*counts, if_undefined)[2] for counts in (counts_a, counts_b))
    p, differ = label_p_values(a, b)
    tested = differ & (support > 0)
    by_unit = np.ascontiguousarray(drawn.T)
    interval = np.zeros((n_labels, 2))
    chosen = np.flatnonzero(tested)
    for start in range(0, chosen.size, LABELS_AT_ONCE):
        labels = chosen[start : start + LABELS_AT_ONCE]
        values = label_f1(b, labels, by_unit, if_undefined) - label_f1(a, labels, by_unit, if_undefined)
        interval[labels] = difference_intervals(values.T, (f1_b - f1_a)[labels], confidence)
    better, worse = tested & (interval[:, 0] > 0), tested & (interval[:, 1] < 0)
    holds = np.zeros(n_labels, bool)
    holds[chosen] = false_discoveries(p[chosen])
    return Comparison(
        fold_a,
        fold_b,
        difference,
        difference_intervals(moved, difference, confidence),
        np.minimum(2 * (1 + side) / (1 + replicates), 1.0),
        support,
        f1_a,
        f1_b,
        f1_b - f1_a,
        interval,
        p,
        tested,
        better,
        worse,
        holds & (better | worse),
        float((1 - confidence) * chosen.size),
    )


def _label_totals(units):
    """tp, fp, fn of every label, (L,) int64 each."""
    label = np.repeat(np.arange(units.indptr.size - 1), np.diff(units.indptr))
    return [np.bincount(label, kind, units.indptr.size - 1).astype(np.int64) for kind in (units.tp, units.fp, units.fn)]


@njit(cache=True, nogil=True, error_model="numpy")
def _fill_label_f1(indptr, unit, cell_tp, cell_fp, cell_fn, labels, drawn, if_undefined, found):
    replicates = drawn.shape[1]
    tp, fp, fn = np.zeros((3, replicates), np.int64)
    for k in range(labels.size):
        start, stop = indptr[labels[k]], indptr[labels[k] + 1]
        _label_counts(
            unit[start:stop], cell_tp[start:stop], cell_fp[start:stop], cell_fn[start:stop], drawn, tp, fp, fn
        )
        for r in range(replicates):
            denominator = 2 * tp[r] + fp[r] + fn[r]
            found[k, r] = 2 * tp[r] / denominator if denominator else if_undefined


def label_f1(units: Units, labels: ArrayLike, by_unit: NDArray, if_undefined: float = 0.0) -> Values:
    """F1 of some labels in every replicate, (labels, R).  by_unit: (U, R), the weights transposed."""
    labels = np.asarray(labels, np.int64)
    found = np.empty((labels.size, by_unit.shape[1]))
    cells = units.indptr, units.unit, units.tp, units.fp, units.fn
    _fill_label_f1(*cells, labels, by_unit, float(if_undefined), found)
    return found


@njit(cache=True, nogil=True, error_model="numpy")
def _score_labels(indptr_a, unit_a, tp_a, fp_a, fn_a, indptr_b, unit_b, tp_b, fp_b, fn_b, units, z, differ):
    d_tp, d_fp = np.zeros((2, units), np.int64)
    for j in range(indptr_a.size - 1):
        cells_a, cells_b = range(indptr_a[j], indptr_a[j + 1]), range(indptr_b[j], indptr_b[j + 1])
        numerator = denominator = 0
        for c in cells_a:
            d_tp[unit_a[c]] -= tp_a[c]
            d_fp[unit_a[c]] -= fp_a[c]
            numerator += 2 * tp_a[c]
            denominator += 2 * tp_a[c] + fp_a[c] + fn_a[c]
        for c in cells_b:
            d_tp[unit_b[c]] += tp_b[c]
            d_fp[unit_b[c]] += fp_b[c]
            numerator += 2 * tp_b[c]
            denominator += 2 * tp_b[c] + fp_b[c] + fn_b[c]
        f1 = numerator / denominator if denominator else 0.0
        total = squares = 0.0
        # a unit may be in the cells of both: what it adds is taken once
        for side in range(2):
            for c in cells_a if side == 0 else cells_b:
                u = unit_a[c] if side == 0 else unit_b[c]
                if d_tp[u] or d_fp[u]:
                    differ[j] = True
                    moved = 2 * d_tp[u] - f1 * (d_tp[u] + d_fp[u])
                    total += moved
                    squares += moved * moved
                d_tp[u] = d_fp[u] = 0
        z[j] = total / np.sqrt(squares) if squares > 0 else 0.0


def label_p_values(a: Units, b: Units) -> tuple[Values, NDArray[np.bool_]]:
    """p of equal F1, two-sided, (L,), and whether the runs decide a label differently anywhere, (L,).

    If the runs were alike, swapping them on any document would change nothing but signs.  F1 moves by (2 dtp -
    F1 (dtp + dfp)) / denominator where a document changes by dtp and dfp, F1 that of both runs pooled; the sum of these
    over the root of the sum of their squares is compared with the normal distribution.  m documents that differ give at
    most sqrt(m), so few documents never give a small p.
    """
    z = np.zeros(a.indptr.size - 1)
    differ = np.zeros(z.size, bool)
    _score_labels(*a[2:], *b[2:], a.documents.size, z, differ)
    return 2 * ndtr(-np.abs(z)), differ


def false_discoveries(p: ArrayLike, share: float = 0.05) -> NDArray[np.bool_]:
    """Which of the p (m,) are below the largest p_(k) <= share k / m, that one included (Benjamini, Hochberg 1995)."""
    p = np.asarray(p, np.float64)
    ordered = np.sort(p)
    below = np.flatnonzero(ordered <= share * np.arange(1, p.size + 1) / max(p.size, 1))
    return p <= ordered[below[-1]] if below.size else np.zeros(p.size, bool)
