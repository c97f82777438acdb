"""One-vs-rest: a block of labels -> their models, curves and histograms.

    block of labels + X, folds, positives  ->  label_models, curves, histograms

Each label takes one lane for the final model and one for every fold left out; labels share a group of sixteen lanes as
far as they fit.  With a single held-out fold (train.folds = 0) one lane serves as both.
"""

import logging
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.kernels import curves, lockstep
from pipeline.kernels.lockstep import Rows
from pipeline.kernels.simd import LANES
from pipeline.tables import TABLES

log = logging.getLogger(__name__)

POOLED = -1  # `fold` of a curve over all folds


class Gold(NamedTuple):
    """Which training rows carry which label, and the fold of each row."""

    indptr: np.ndarray  # (L + 1,) int64
    rows: np.ndarray  # (assignments,) int32, ascending within a label
    fold: np.ndarray  # (n,) int8

    def positives(self, label_id: int) -> np.ndarray:
        return self.rows[self.indptr[label_id] : self.indptr[label_id + 1]]


def left_out(folds: int) -> list[int | None]:
    """The fold that each lane of a label leaves out; the first lane is the model that is kept.

    >>> left_out(3)
    [None, 0, 1, 2]
    >>> left_out(0)
    [0]
    """
    return [None, *range(folds)] if folds else [0]


def fit_block(label_ids, X: Rows, gold: Gold, cfg, at_label=lambda: None) -> dict[str, pa.Table]:
    """Solve the lanes of some labels.

    Args:
        label_ids: ids of the labels; order decides which of them share a group.
        X: training rows.
        cfg: TrainConfig.
        at_label: called after each label, for progress.

    Returns:
        Tables label_models, curves and histograms with one row a label (and fold).  A label without positives or
        without negatives gets a constant model; one that fails gets a row with the cause in `status`.
    """
    models: list[dict] = []
    curve_rows: list[dict] = []
    histogram_rows: list[dict] = []
    lanes = left_out(cfg.folds)
    solvable = []
    for label_id in label_ids:
        positives = gold.positives(label_id)
        used = X.size if lanes[0] is None else int(np.count_nonzero(gold.fold != lanes[0]))
        kept = positives.size if lanes[0] is None else int(np.count_nonzero(gold.fold[positives] != lanes[0]))
        if 0 < kept < used:
            solvable.append(label_id)
        else:
            models.append(_constant(label_id, kept, used, cfg))
            at_label()
    per_group = LANES // len(lanes)
    for start in range(0, len(solvable), per_group):
        group = solvable[start : start + per_group]
        try:
            parts = _fit_group(group, X, gold, cfg, lanes)
        except (ArithmeticError, MemoryError, ValueError) as error:
            log.warning("labels %s failed: %s", group, error)
            parts = [_failed(label_id, error, X, gold, cfg) for label_id in group], [], []
        for into, part in zip((models, curve_rows, histogram_rows), parts, strict=True):
            into.extend(part)
        for _ in group:
            at_label()
    return {
        name: pa.Table.from_pylist(rows, schema=TABLES[name].schema).sort_by(
            [(k, "ascending") for k in TABLES[name].key]
        )
        for name, rows in (("label_models", models), ("curves", curve_rows), ("histograms", histogram_rows))
    }


def lane_signs(group, gold: Gold, lanes) -> np.ndarray:
    """(n * 16,) int8: +1, -1, or 0 where the row is left out; lanes that serve no label are 0 throughout."""
    sign = np.zeros((gold.fold.size, LANES), np.int8)
    for j, label_id in enumerate(group):
        for k, fold in enumerate(lanes):
            lane = j * len(lanes) + k
            sign[:, lane] = -1
            sign[gold.positives(label_id), lane] = 1
            if fold is not None:
                sign[gold.fold == fold, lane] = 0
    return sign.ravel()


def _fit_group(group, X, gold, cfg, lanes):
    sign = lane_signs(group, gold, lanes)
    cost = np.full(LANES, cfg.C, np.float32)
    solution = lockstep.solve(X, sign, cost, cost, cfg.gap, cfg.max_epochs, cfg.seed)
    columns = solution.W.reshape(-1, LANES)
    if not np.isfinite(solution.primal).all():
        raise ArithmeticError("the weights are not finite; the features hold values too large for float32")
    finals = [j * len(lanes) for j in range(len(group))]
    cuts = lockstep.prune_cuts(X, solution, finals, sign, cost, cost, cfg.prune)
    for j, cut in enumerate(cuts):
        for lane in range(finals[j], finals[j] + len(lanes)):
            lockstep.drop_small(columns, lane, cut)
    # scores, objective and gap are those of the weights that are kept
    lockstep.margins(X.indptr, X.indices, X.data, solution.W, solution.Z)
    scores = solution.Z.reshape(-1, LANES)
    primal = lockstep.squared_norms(solution.W) / 2 + lockstep.losses(solution.Z, sign, cost, cost)
    gaps = lockstep.relative_gap(primal, solution.dual)
    # lane of a label that did not see a row's fold
    blind = np.full(int(gold.fold.max(initial=0)) + 1, -1)
    for k, fold in enumerate(lanes):
        if fold is not None and fold < blind.size:
            blind[fold] = k
    held = np.flatnonzero(blind[gold.fold] >= 0)
    models, curve_rows, histogram_rows = [], [], []
    for j, label_id in enumerate(group):
        final = finals[j]
        kept = np.flatnonzero(columns[:-1, final]).astype(np.int32)
        solved = solution.gaps[final : final + len(lanes)].max() <= cfg.gap
        models.append(
            {
                "label_id": label_id,
                "bias": columns[-1, final],
                "indices": kept,
                "weights": columns[kept, final],
                "C": cfg.C,
                "epochs": solution.epochs,
                "gap": float(gaps[final]),
                "objective": float(primal[final]),
                "status": "ok" if solved else "not_converged",
            }
        )
        positive = np.zeros(X.size, np.bool_)
        positive[gold.positives(label_id)] = True
        positive, own = positive[held], scores[held, final + blind[gold.fold[held]]]
        for fold in (POOLED, *(f for f in lanes if f is not None)):
            inside = slice(None) if fold == POOLED else gold.fold[held] == fold
            curve_rows.append(_curve_row(label_id, fold, own[inside], positive[inside]))
            histogram_rows.append(_histogram_row(label_id, fold, own[inside], positive[inside]))
    return models, curve_rows, histogram_rows


def _curve_row(label_id, fold, scores, positive):
    cut, tp, fp = curves.curve(scores, positive)
    count = int(positive.sum())
    return {
        "label_id": label_id,
        "fold": fold,
        "positives": count,
        "negatives": positive.size - count,
        "cut": cut,
        "tp": tp,
        "fp": fp,
    }


def _histogram_row(label_id, fold, scores, positive):
    positives, negatives = curves.histogram(scores, positive)
    bins = np.flatnonzero(positives + negatives)
    return {
        "label_id": label_id,
        "fold": fold,
        "bin": bins.astype(np.int32),
        "positives": positives[bins],
        "negatives": negatives[bins],
    }


def _constant(label_id, positives, rows, cfg):
    """The log-odds of the smoothed base rate: the label is on none, or on all, of the training rows."""
    bias = float(np.log((positives + 0.5) / (rows - positives + 0.5)))
    status = "no_positives" if positives == 0 else "no_negatives"
    return _weightless(label_id, bias, status, cfg)


def _failed(label_id, error, X, gold, cfg):
    """The base rate, so that the ranking of the other labels is not disturbed."""
    model = _constant(label_id, gold.positives(label_id).size, X.size, cfg)
    return {**model, "status": f"failed: {type(error).__name__}: {error}"}


def _weightless(label_id, bias, status, cfg):
    return {
        "label_id": label_id,
        "bias": bias,
        "indices": [],
        "weights": [],
        "C": cfg.C,
        "epochs": 0,
        "gap": 0.0,
        "objective": 0.0,
        "status": status,
    }
