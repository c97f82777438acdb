"""Histograms -> maps from scores to probabilities, and what they are worth on rows they were not fitted to."""

from typing import NamedTuple

import numpy as np

from pipeline.kernels import calibration
from pipeline.kernels.curves import BINS, bin_centres
from pipeline.kernels.thresholds import Histograms, peers, prior

NO_KNOTS = np.empty(0)
TOLERANCE = 1e-10  # nats of the whole loss: parameters within 1e-5 of their standard error, wherever the fit starts
MEASURES = ("brier", "log_loss", "ece")


class Maps(NamedTuple):
    """Maps of L labels; the names are the columns of `thresholds`."""

    a: np.ndarray  # (L,) float64; with knots: Platt's map, for who wants one line
    b: np.ndarray
    knot_score: list[np.ndarray]  # empty unless isotonic
    knot_log_odds: list[np.ndarray]
    calibration: list[str]  # platt, isotonic, temperature or none: the map a label got
    # (L,) float64, means over a label's rows; nan for a label without positives
    brier_before: np.ndarray
    brier_after: np.ndarray
    log_loss_before: np.ndarray  # nats
    log_loss_after: np.ndarray
    ece_before: np.ndarray
    ece_after: np.ndarray
    pooled: dict[str, float]  # the six over all (row, label) pairs of labels with positives; nan without any
    out_of_fold: bool  # False: fewer than two folds, so `after` judges the maps on the rows they were fitted to


class Lines(NamedTuple):
    """Maps alone: sigmoid(a score + b), or of the lines through the knots."""

    a: np.ndarray
    b: np.ndarray
    knot_score: list[np.ndarray]
    knot_log_odds: list[np.ndarray]

    def log_odds(self, label: int, scores: np.ndarray) -> np.ndarray:
        if self.knot_score[label].size:
            return calibration.log_odds_at(scores, self.knot_score[label], self.knot_log_odds[label])
        return scores * self.a[label] + self.b[label]


def maps(pooled: Histograms, folds: list[Histograms], cfg) -> Maps:
    """A map a label, fitted to the pooled histogram and judged fold by fold on maps fitted without that fold.

    Args:
        pooled: out-of-fold scores of all folds; a label without rows (constant model) has a = 1, b = 0.
        folds: the same, one a fold.
        cfg: CalibrateConfig.

    Before calibration the probability is sigmoid(score).  A label without positives keeps that.
    """
    support = pooled.support()
    kind = np.where(support > 0, cfg.calibration, "none").astype(object)
    if cfg.calibration == "isotonic":
        kind[(support > 0) & (support < cfg.isotonic_positives)] = "platt"
    final = fit(pooled, kind, cfg.pooling)

    out_of_fold = len(folds) > 1
    if out_of_fold:
        whole, rests = without_each(folds)
        judged = [(h, fit(rest, kind, cfg.pooling, start=final)) for h, rest in zip(folds, rests, strict=True)]
    else:
        whole, judged = pooled, [(pooled, final)]
    known = np.flatnonzero(support > 0)
    same = Lines(np.ones(pooled.size), np.zeros(pooled.size), [NO_KNOTS] * pooled.size, [NO_KNOTS] * pooled.size)
    before, mean_before = _quality(whole, [(whole, same)], known)
    after, mean_after = _quality(whole, judged, known)
    columns = {f"{m}_before": before[i] for i, m in enumerate(MEASURES)}
    columns |= {f"{m}_after": after[i] for i, m in enumerate(MEASURES)}
    means = {f"{m}_before": float(mean_before[i]) for i, m in enumerate(MEASURES)}
    means |= {f"{m}_after": float(mean_after[i]) for i, m in enumerate(MEASURES)}
    return Maps(*final, calibration=kind.tolist(), **columns, pooled=means, out_of_fold=out_of_fold)


def fit(histograms: Histograms, kind: np.ndarray, pooling: float, start: Lines | None = None) -> Lines:
    """A map a label, fitted to its own counts and `pooling` pseudo-positives of its peers.

    Args:
        kind (L,) of str: platt, isotonic, temperature or none.
        start: maps of nearly the same counts.  The answer is the same to 1e-5 of a standard error, in a third of the
            time, but without a and b for labels that get knots.
    """
    centres = bin_centres()
    size = histograms.size
    a, b = np.ones(size), np.zeros(size)
    knot_score, knot_log_odds = [NO_KNOTS] * size, [NO_KNOTS] * size
    if (kind == "temperature").any():
        positives, negatives = histograms.totals()
        a[kind == "temperature"] = calibration.temperature(centres, positives * 1.0, negatives * 1.0)
    bucket, peer_p, peer_n = peers(histograms)
    for label in np.flatnonzero((kind == "platt") | (kind == "isotonic")):
        own = slice(histograms.indptr[label], histograms.indptr[label + 1])
        p, n = (_dense(histograms.bins[own], c[own]) for c in (histograms.positives, histograms.negatives))
        like = _like(histograms, label, bucket[label], peer_p, peer_n)
        if like is not None:
            p, n = p + pooling * like[0], n + pooling * like[1]
        if bucket[label] < 0 and not p.any():
            continue  # all its positives are held out, and nothing is alike
        if kind[label] == "isotonic":
            knot_score[label], knot_log_odds[label] = calibration.isotonic(centres, p, n)
        if start is None:
            a[label], b[label] = calibration.platt(centres, p, n)
        elif kind[label] == "platt":
            a[label], b[label] = calibration.platt(centres, p, n, start.a[label], start.b[label], TOLERANCE)
    return Lines(a, b, knot_score, knot_log_odds)


def without_each(folds: list[Histograms]) -> tuple[Histograms, list[Histograms]]:
    """The sum of all folds, and for each fold the sum of the others (with the bins of all, some of them empty)."""
    keys = [np.repeat(np.arange(h.size) * BINS, np.diff(h.indptr)) + h.bins for h in folds]
    every, place = np.unique(np.concatenate(keys), return_inverse=True)
    at = np.split(place, np.cumsum([k.size for k in keys])[:-1])
    indptr = np.searchsorted(every, np.arange(folds[0].size + 1) * BINS)
    counts = np.zeros((len(folds), 2, every.size), np.int64)
    for of_fold, h, p in zip(counts, folds, at, strict=True):
        of_fold[:, p] = h.positives, h.negatives
    whole = counts.sum(axis=0)
    bins = (every % BINS).astype(np.int32)
    return Histograms(indptr, bins, *whole), [Histograms(indptr, bins, *(whole - of_fold)) for of_fold in counts]


def _like(histograms, label, bucket, peer_p, peer_n):
    if bucket >= 0:
        return prior(histograms, label, bucket, peer_p, peer_n)
    # its positives are all held out: the rarest labels are the nearest, and it is not one of them
    total = peer_p[0].sum()
    return None if total < 1e-6 else (peer_p[0] / total, peer_n[0] / total)


def _quality(whole: Histograms, parts: list[tuple[Histograms, Lines]], known: np.ndarray):
    """Each part judged by its own map: (3, L) means over a label's rows, and (3,) over the rows of all `known` labels.

    The groups of the ECE are those of all parts together: a fold alone would show more of its noise.
    """
    centres = bin_centres()
    sums, rows = np.full((3, whole.size), np.nan), np.zeros(whole.size)
    for label in known:
        own = slice(whole.indptr[label], whole.indptr[label + 1])
        expected = np.zeros(BINS)
        squares = nats = 0.0
        for h, lines in parts:
            at = slice(h.indptr[label], h.indptr[label + 1])
            filled = h.bins[at]
            says = lines.log_odds(label, centres[filled])
            part = calibration.losses(h.positives[at], h.negatives[at], says)
            squares, nats = squares + part[0], nats + part[1]
            expected[filled] += part[2]
        p, n = whole.positives[own], whole.negatives[own]
        rows[label] = p.sum() + n.sum()
        error = calibration.calibration_error(p, n, expected[whole.bins[own]])
        sums[:, label] = squares, nats, error * rows[label]
    with np.errstate(invalid="ignore"):
        return sums / rows, sums[:, known].sum(axis=1) / rows[known].sum()


def _dense(bins, counts):
    out = np.zeros(BINS)
    out[bins] = counts
    return out
