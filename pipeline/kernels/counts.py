"""tp, fp, fn -> precision, recall, F1; micro, macro, weighted, and per document.

Gold comes as in a CSR matrix: the labels of document i are gold_labels[gold_indptr[i] : gold_indptr[i + 1]], ascending.
"""

from collections.abc import Mapping

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

from pipeline.kernels.exact import exact_sum, mean_of, to_fixed

Counts = NDArray[np.int64]
Values = NDArray[np.float64]


def checked_gold(gold_indptr: ArrayLike, gold_labels: ArrayLike, m: int, n_labels: int) -> tuple[Counts, Counts]:
    """Gold as two int64 arrays, (m + 1,) and (pairs,), or an error: the compiled loops index with them unchecked."""
    indptr = np.ascontiguousarray(gold_indptr, dtype=np.int64)
    labels = np.ascontiguousarray(gold_labels, dtype=np.int64)
    if indptr.size != m + 1 or indptr[0] != 0 or indptr[-1] != labels.size or np.any(np.diff(indptr) < 0):
        raise ValueError(
            f"gold_indptr has {indptr.size} entries for {m} documents and {labels.size} pairs; "
            f"expected {m + 1}, ascending, from 0 to {labels.size}"
        )
    if labels.size and (labels.min() < 0 or labels.max() >= n_labels):
        raise ValueError(f"gold_labels has ids {labels.min()}..{labels.max()}; expected 0..{n_labels - 1}")
    descents = np.flatnonzero(np.diff(labels) <= 0) + 1
    if not np.isin(descents, indptr).all():
        raise ValueError("gold_labels repeats or descends within a document; expected distinct ids, ascending")
    return indptr, labels


@njit(cache=True, error_model="numpy")
def _count(tagged, indptr, labels):
    m, n_labels = tagged.shape
    tp = np.zeros(n_labels, np.int64)
    tags_of_label = np.zeros(n_labels, np.int64)
    hits = np.zeros(m, np.int64)
    tags_of_document = np.zeros(m, np.int64)
    for i in range(m):
        row = tagged[i]
        tags = 0
        for j in range(n_labels):
            said = np.int64(row[j] != 0)
            tags_of_label[j] += said
            tags += said
        tags_of_document[i] = tags
        for g in range(indptr[i], indptr[i + 1]):
            said = np.int64(row[labels[g]] != 0)
            tp[labels[g]] += said
            hits[i] += said
    return tp, tags_of_label, hits, tags_of_document


def _checked_tagged(tagged: NDArray) -> NDArray[np.uint8]:
    tagged = np.asarray(tagged)
    if tagged.ndim != 2 or tagged.dtype not in (np.bool_, np.uint8):
        raise ValueError(
            f"tagged is {tagged.dtype} with {tagged.ndim} axes; expected bool or uint8, (documents, labels)"
        )
    return np.ascontiguousarray(tagged).view(np.uint8)


def confusion(tagged: NDArray, gold_indptr: ArrayLike, gold_labels: ArrayLike) -> tuple[Counts, Counts, Counts]:
    """Confusion counts of a chunk of documents; they add.

    tagged: (m, L) bool or uint8, nonzero where the label was emitted.

    Returns tp, fp, fn, each (L,) int64: a label that nobody has and nobody emitted keeps its place with 0, 0, 0.
    """
    tagged = _checked_tagged(tagged)
    indptr, labels = checked_gold(gold_indptr, gold_labels, *tagged.shape)
    tp, tags, _, _ = _count(tagged, indptr, labels)
    support = np.bincount(labels, minlength=tagged.shape[1])
    return tp, tags - tp, support - tp


def set_sums(
    tagged: NDArray, gold_indptr: ArrayLike, gold_labels: ArrayLike, if_undefined: float = 0.0
) -> dict[str, int]:
    """Sums over the documents of a chunk that compare the set of tags with the set of gold labels; they add.

    tagged: (m, L) bool or uint8.  Sums are in units of 2**-40 (`exact`).  F1 and Jaccard of a document with neither
    tags nor gold are 0/0 = `if_undefined` (scikit-learn: zero_division); such a document is an exact match.
    """
    tagged = _checked_tagged(tagged)
    indptr, labels = checked_gold(gold_indptr, gold_labels, *tagged.shape)
    _, _, hits, tags = _count(tagged, indptr, labels)
    gold = np.diff(indptr)
    per_document = set_values(hits, tags, gold, if_undefined)
    return {name: exact_sum(to_fixed(values)) for name, values in per_document.items()}


def set_values(hits: Counts, tags: Counts, gold: Counts, if_undefined: float = 0.0) -> dict[str, NDArray]:
    """What each document adds to `set_sums`, (m,), from how many tags it has, how many gold labels, and both."""
    wrong = tags + gold - 2 * hits
    return {
        "samples_f1": _ratio(2 * hits, tags + gold, if_undefined),
        "subset_accuracy": wrong == 0,
        "hamming_loss": wrong,
        "jaccard_samples": _ratio(hits, tags + gold - hits, if_undefined),
    }


def set_metrics(sums: Mapping[str, int], n: int, n_labels: int, if_undefined: float = 0.0) -> dict[str, float]:
    """Means of `set_sums` over n documents, for Hamming over n * L pairs.  No documents: `if_undefined`."""
    pairs = {"hamming_loss": n * n_labels}
    names = ("samples_f1", "subset_accuracy", "hamming_loss", "jaccard_samples")
    return {name: mean_of(sums[name], pairs.get(name, n), if_undefined) for name in names}


def _ratio(numerator, denominator, if_undefined):
    return np.where(denominator > 0, numerator / np.maximum(denominator, 1), if_undefined)


def precision_recall_f1(
    tp: ArrayLike, fp: ArrayLike, fn: ArrayLike, if_undefined: float = 0.0
) -> tuple[Values, Values, Values]:
    """Precision, recall and F1 per label, each (L,) in 0..1, from (L,) counts below 2**60.

    `if_undefined` is the value for 0/0 (scikit-learn: zero_division); F1 is 0/0 only when tp, fp and fn are all 0.
    """
    tp, fp, fn = (np.asarray(count, dtype=np.int64) for count in (tp, fp, fn))
    return (
        _ratio(tp, tp + fp, if_undefined),
        _ratio(tp, tp + fn, if_undefined),
        _ratio(2 * tp, 2 * tp + fp + fn, if_undefined),
    )


def micro(tp: ArrayLike, fp: ArrayLike, fn: ArrayLike, if_undefined: float = 0.0) -> tuple[float, float, float]:
    """Precision, recall and F1 of all (document, label) pairs pooled.  0/0 is `if_undefined`."""
    tp, fp, fn = (exact_sum(count) for count in (tp, fp, fn))

    def ratio(numerator, denominator):
        return numerator / denominator if denominator else if_undefined

    return ratio(tp, tp + fp), ratio(tp, tp + fn), ratio(2 * tp, 2 * tp + fp + fn)


def macro(values: ArrayLike, over: ArrayLike | None = None, if_undefined: float = 0.0) -> float:
    """Mean of per-label values (L,) over the labels in the mask `over` (L,); None: all.  No label: `if_undefined`."""
    values = np.asarray(values, dtype=np.float64)
    if over is not None:
        values = values[np.asarray(over, dtype=bool)]
    return float(values.mean()) if values.size else if_undefined


def weighted(values: ArrayLike, weights: ArrayLike, if_undefined: float = 0.0) -> float:
    """Mean of per-label values (L,) with int weights (L,) such as gold supports.  No weight at all: `if_undefined`."""
    total = exact_sum(weights)
    return float(np.sum(np.asarray(values) * (np.asarray(weights) / total))) if total else if_undefined


def label_metrics(tp: ArrayLike, fp: ArrayLike, fn: ArrayLike, if_undefined: float = 0.0) -> dict[str, float]:
    """The averages of P, R and F1 from (L,) counts over the whole fold.

    macro_f1 averages over labels with at least one gold positive (tp + fn > 0), macro_f1_all over every label;
    weighted_f1 weighs by gold support.
    """
    support = np.asarray(tp, dtype=np.int64) + np.asarray(fn, dtype=np.int64)
    _, _, f1 = precision_recall_f1(tp, fp, fn, if_undefined)
    micro_precision, micro_recall, micro_f1 = micro(tp, fp, fn, if_undefined)
    return {
        "micro_precision": micro_precision,
        "micro_recall": micro_recall,
        "micro_f1": micro_f1,
        "macro_f1": macro(f1, support > 0, if_undefined),
        "macro_f1_all": macro(f1, None, if_undefined),
        "weighted_f1": weighted(f1, support, if_undefined),
    }


HEAD, TORSO = 0.5, 0.9  # shares of all training positives that head, and head with torso, hold


def support_groups(train_support: ArrayLike) -> dict[str, Counts]:
    """Label ids of head, torso and tail, each by descending support, then by label id.

    The head is the most frequent labels that hold half of all training positives, the torso the next that bring it to
    90 %, the tail the rest.  Without any positive all labels are tail.
    """
    support = np.asarray(train_support, dtype=np.int64)
    order = np.argsort(-support, kind="stable")
    held = np.cumsum(support[order])
    ends = [int(np.searchsorted(held, part * held[-1])) + 1 if held.size and held[-1] else 0 for part in (HEAD, TORSO)]
    return dict(zip(("head", "torso", "tail"), np.split(order, ends), strict=True))
