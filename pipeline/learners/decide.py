"""Curves and histograms -> thresholds and probability maps, one row a label."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from pipeline.kernels import calibration
from pipeline.kernels.curves import BINS, bin_centres
from pipeline.kernels.thresholds import Histograms, at_or_above, global_cut, guarded_f1_cut, peers, prior
from pipeline.learners.ovr import POOLED
from pipeline.tables import TABLES


class Curves(NamedTuple):
    """(cut, tp, fp) of L labels, ragged like `Histograms`."""

    indptr: np.ndarray
    cut: np.ndarray
    tp: np.ndarray
    fp: np.ndarray


def curves_of(table: pa.Table, fold: int, size: int) -> Curves:
    """The curves of one fold (-1: pooled); a label without a row has none."""
    rows, indptr = _rows_of(table, fold, size, "cut")
    return Curves(indptr, *(_flat(rows, name) for name in ("cut", "tp", "fp")))


def histograms_of(table: pa.Table, fold: int, size: int) -> Histograms:
    """The histograms of one fold (-1: pooled); a label without a row has none."""
    rows, indptr = _rows_of(table, fold, size, "bin")
    return Histograms(indptr, *(_flat(rows, name) for name in ("bin", "positives", "negatives")))


def choose(curve_table: pa.Table, histogram_table: pa.Table, status: list[str], cfg) -> pa.Table:
    """One row of `thresholds` a label.

    Args:
        curve_table, histogram_table: `curves` and `histograms`; labels with a constant model have no rows.
        status: status of each label's model, by label_id.
        cfg: CalibrateConfig.

    A label without positives, or one whose training failed, is never tagged (threshold null).  One without negatives is
    always tagged: its constant score is far above 0.
    """
    size = len(status)
    pooled = histograms_of(histogram_table, POOLED, size)
    folds = sorted(set(curve_table["fold"].unique().to_pylist()) - {POOLED})
    cut, expected = _cuts(curves_of(curve_table, POOLED, size), pooled, cfg)
    by_fold = np.array(
        [
            _cuts(curves_of(curve_table, fold, size), histograms_of(histogram_table, fold, size), cfg)[0]
            for fold in folds
        ]
    ).reshape(len(folds), size)
    a, b = _maps(pooled, cfg.pooling)
    support = pooled.support()
    rows = []
    for label_id in range(size):
        known = by_fold[np.isfinite(by_fold[:, label_id]), label_id]
        threshold = float(cut[label_id])
        if status[label_id] == "no_negatives":
            threshold = 0.0
        elif not status[label_id].startswith(("ok", "not_converged")):
            threshold = float("inf")
        rows.append(
            {
                "label_id": label_id,
                "threshold": threshold if np.isfinite(threshold) else None,
                "a": a[label_id],
                "b": b[label_id],
                "objective": cfg.rule,
                "expected_f1": float(expected[label_id]) if np.isfinite(threshold) else None,
                "spread": float(np.ptp(known)) if known.size > 1 else None,
                "support": int(support[label_id]),
            }
        )
    return pa.Table.from_pylist(rows, schema=TABLES["thresholds"].schema)


def _cuts(curves: Curves, histograms: Histograms, cfg):
    """Cut and expected F1 of every label under the configured rule; +inf for labels without positives."""
    size = histograms.size
    cuts, expected = np.full(size, np.inf), np.zeros(size)
    common, micro_f1 = global_cut(histograms)
    bucket, peer_p, peer_n = peers(histograms)
    support = histograms.support()
    for label in np.flatnonzero(support > 0):
        own = slice(histograms.indptr[label], histograms.indptr[label + 1])
        own_p, own_n = (_dense(histograms.bins[own], c[own]) for c in (histograms.positives, histograms.negatives))
        own_p, own_n = at_or_above(own_p), at_or_above(own_n)
        if cfg.rule == "per_label":
            mine = slice(curves.indptr[label], curves.indptr[label + 1])
            like = prior(histograms, label, bucket[label], peer_p, peer_n)
            guard = cfg.guard if like is not None else 0.0
            like_p, like_n = map(at_or_above, like) if like is not None else (np.zeros(BINS + 1), np.zeros(BINS + 1))
            curve = (curves.cut[mine], curves.tp[mine], curves.fp[mine])
            shares = (float(support[label]), own_p, own_n, like_p, like_n)
            weights = (guard, cfg.micro, micro_f1)
            cuts[label], expected[label] = guarded_f1_cut(*curve, *shares, *weights)
        else:
            cuts[label] = common if cfg.rule == "global" else 0.0
            k = int(np.clip(np.ceil((cuts[label] + 16.0) * 32.0), 0, BINS))
            expected[label] = 2.0 * own_p[k] / (own_p[k] + own_n[k] + support[label])
    return cuts, expected


def _maps(histograms: Histograms, pooling: float):
    """Platt's a and b per label, fitted to its own counts and `pooling` pseudo-positives of its peers."""
    centres = bin_centres()
    bucket, peer_p, peer_n = peers(histograms)
    a, b = np.ones(histograms.size), np.zeros(histograms.size)
    for label in np.flatnonzero(histograms.support() > 0):
        own = slice(histograms.indptr[label], histograms.indptr[label + 1])
        p, n = (_dense(histograms.bins[own], c[own]) for c in (histograms.positives, histograms.negatives))
        like = prior(histograms, label, bucket[label], peer_p, peer_n)
        if like is not None:
            p, n = p + pooling * like[0], n + pooling * like[1]
        a[label], b[label] = calibration.platt(centres, p, n)
    return a, b


def _dense(bins, counts):
    out = np.zeros(BINS)
    out[bins] = counts
    return out


def _rows_of(table, fold, size, column):
    rows = table.filter(pa.compute.equal(table["fold"], fold)).sort_by("label_id").combine_chunks()
    lengths = np.zeros(size + 1, np.int64)
    lengths[rows["label_id"].to_numpy() + 1] = pa.compute.list_value_length(rows[column]).to_numpy()
    return rows, np.cumsum(lengths)


def _flat(rows, column):
    return pa.compute.list_flatten(rows[column]).to_numpy()
