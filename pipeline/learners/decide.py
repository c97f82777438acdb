"""Curves and histograms -> thresholds and probability maps, one row a label.

The objective of the cuts is `calibrate.rule`.  By label: f_beta, precision, recall, cost, youden, otsu, pcut, fixed.
Across labels: global, budget, joint.  By document (`document_rules`): rcut, samples_f1; their cuts are those of f_beta,
for reference.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute

from pipeline.kernels import thresholds as cuts
from pipeline.kernels.calibration import MIN_SLOPE
from pipeline.kernels.counts import label_metrics
from pipeline.kernels.thresholds import Curves, Goal, Histograms
from pipeline.learners.document_rules import BY_DOCUMENT
from pipeline.learners.ovr import POOLED
from pipeline.learners.probabilities import Lines, Maps, fit, maps, without_each
from pipeline.tables import TABLES

ALWAYS, NEVER = 0.0, float("inf")  # thresholds of constant models: their score is far above 0, or of no use
GOALS = {
    "f_beta": cuts.F_BETA,
    "joint": cuts.F_BETA,
    "precision": cuts.PRECISION,
    "recall": cuts.RECALL,
    "cost": cuts.COST,
    "youden": cuts.YOUDEN,
    "pcut": cuts.PCUT,
}
# what `nested` chooses among
GUARDS: tuple[dict, ...] = (
    {"guard": "none"},
    {"guard": "smoothed"},
    *({"guard": "fbr", "fbr": f} for f in (0.1, 0.2, 0.4)),
    *({"guard": "shrink", "shrink": s} for s in (3.0, 10.0, 30.0)),
    *({"guard": "peers", "peers": p} for p in (1.0, 2.0, 4.0, 8.0)),
)


class Evidence(NamedTuple):
    """What thresholds are chosen from: out-of-fold curves and histograms, pooled and by fold, and the maps."""

    curves: Curves
    pooled: Histograms
    folds: list[tuple[Curves, Histograms]]
    rests: list[Histograms]  # for each fold the others together; empty where there are fewer than two
    maps: Maps


def evidence(curve_table: pa.Table, histogram_table: pa.Table, labels: int, cfg) -> Evidence:
    """The tables `curves` and `histograms` as arrays, with the probability map of every label."""
    pooled = histograms_of(histogram_table, POOLED, labels)
    names = sorted(set(curve_table["fold"].unique().to_pylist()) - {POOLED})
    folds = [(curves_of(curve_table, f, labels), histograms_of(histogram_table, f, labels)) for f in names]
    histograms = [h for _, h in folds]
    rests = without_each(histograms)[1] if len(folds) > 1 else []
    return Evidence(curves_of(curve_table, POOLED, labels), pooled, folds, rests, maps(pooled, histograms, cfg))


def curves_of(table: pa.Table, fold: int, size: int) -> Curves:
    """The curves of one fold (-1: pooled); a label without a row has none."""
    rows, indptr = _rows_of(table, fold, size, "cut")
    return Curves(indptr, *(_flat(rows, name) for name in ("cut", "tp", "fp")))


def histograms_of(table: pa.Table, fold: int, size: int) -> Histograms:
    """The histograms of one fold (-1: pooled); a label without a row has none."""
    rows, indptr = _rows_of(table, fold, size, "bin")
    return Histograms(indptr, *(_flat(rows, name) for name in ("bin", "positives", "negatives")))


def choose(curve_table: pa.Table, histogram_table: pa.Table, status: Sequence[str], cfg) -> pa.Table:
    """One row of `thresholds` a label.

    Args:
        curve_table, histogram_table: `curves` and `histograms`; labels with a constant model have no rows.
        status: status of each label's model, by label_id.
        cfg: CalibrateConfig.

    A label without positives, or one whose training failed, is never tagged (threshold null).  One without negatives is
    always tagged: its constant score is far above 0.
    """
    return decide(evidence(curve_table, histogram_table, len(status), cfg), status, cfg)[0]


def decide(known: Evidence, status: Sequence[str], cfg) -> tuple[pa.Table, dict]:
    """The table `thresholds` (see `choose`), and facts: the guard that was used, calibration before and after."""
    size = len(status)
    cfg, tried = settled(known, cfg)
    cut, expected = label_cuts(known.curves, known.pooled, _lines(known.maps), cfg)
    of_folds = [label_cuts(c, h, _lines(known.maps), cfg)[0] for c, h in known.folds]
    by_fold = np.array(of_folds).reshape(len(known.folds), size)
    finite = np.isfinite(by_fold)
    spread = np.where(finite, by_fold, -np.inf).max(0, initial=-np.inf) - np.where(finite, by_fold, np.inf).min(
        0, initial=np.inf
    )
    constant = np.array([s == "no_negatives" for s in status], bool)
    trained = np.array([s.startswith(("ok", "not_converged")) for s in status], bool)
    threshold = np.where(constant, ALWAYS, np.where(trained, cut, NEVER))
    never = ~np.isfinite(threshold)
    columns = {
        "label_id": np.arange(size, dtype=np.int32),
        "threshold": pa.array(threshold, mask=never),
        "a": known.maps.a,
        "b": known.maps.b,
        "knot_score": pa.array(known.maps.knot_score, pa.list_(pa.float64())),
        "knot_log_odds": pa.array(known.maps.knot_log_odds, pa.list_(pa.float64())),
        "calibration": pa.array(known.maps.calibration, pa.string()),
        "objective": pa.array([cfg.rule] * size, pa.string()),
        "expected_f1": pa.array(expected, mask=never),
        "spread": pa.array(spread, mask=finite.sum(axis=0) < 2),
        "support": known.pooled.support(),
    }
    for name in ("brier", "log_loss", "ece"):
        for when in ("before", "after"):
            columns[f"{name}_{when}"] = pa.array(getattr(known.maps, f"{name}_{when}"), from_pandas=True)
    facts = {
        "rule": cfg.rule,
        "guard": {key: getattr(cfg, key) for key in ("guard", "peers", "fbr", "shrink")},
        "calibration": {k: None if np.isnan(v) else v for k, v in known.maps.pooled.items()},
        "calibration_out_of_fold": known.maps.out_of_fold,
        **({"guards_tried": tried} if tried else {}),
    }
    return pa.table(columns, schema=TABLES["thresholds"].schema), facts


def label_cuts(curves: Curves, histograms: Histograms, lines: Lines, cfg) -> tuple[np.ndarray, np.ndarray]:
    """Cut of every label under the configured rule and F1 (f_beta: F-beta) there, (L,) each; +inf without positives.

    For the rules by document these are the cuts of f_beta; where that would never tag a label with positives, the cut
    is the edge above its scores, because +inf would keep it from those rules too.

    lines: maps to probabilities, for the rules that compare labels by them.
    """
    if cfg.rule in BY_DOCUMENT:
        found, expected = label_cuts(curves, histograms, lines, cfg.model_copy(update={"rule": "f_beta"}))
        hidden = np.isinf(found) & (histograms.support() > 0)
        found[hidden] = cuts.ceilings(histograms)[hidden]
        return found, expected
    beta = cfg.beta if cfg.rule == "f_beta" else 1.0
    common, micro_f = cuts.global_cut(histograms, cfg.beta)

    def solved(**goal):
        order = np.argsort(-histograms.support(), kind="stable")
        return cuts.label_cuts(Goal(**goal), order, *curves, *histograms, *cuts.peers(histograms))

    if cfg.rule in GOALS:
        first, second = {
            "precision": (cfg.precision, 1.0),
            "recall": (cfg.recall, 1.0),
            "cost": (cfg.cost_fp, cfg.cost_fn),
        }.get(cfg.rule, (beta, 1.0))
        guard = cfg.peers if cfg.guard == "peers" else 0.0
        plain = {"kind": GOALS[cfg.rule], "first": float(first), "second": float(second)}
        if cfg.rule == "joint":
            return solved(**plain, joint=True, guard=guard, smooth=float(cfg.guard == "smoothed"))
        if cfg.rule == "f_beta":
            plain |= {"micro": cfg.micro, "micro_f": micro_f, "smooth": float(cfg.guard == "smoothed")}
        found, expected = solved(**plain, guard=guard)
        known = np.isfinite(found)
        if cfg.guard == "fbr" and cfg.rule == "f_beta":
            poor = known & (expected < cfg.fbr)
            found[poor] = cuts.ceilings(histograms)[poor]
        if cfg.guard == "shrink":
            share = histograms.support() / np.maximum(histograms.support() + cfg.shrink, 1e-300)
            found[known] = (share * np.where(known, found, 0.0) + (1 - share) * common)[known]
        if cfg.guard in ("fbr", "shrink"):
            return found, _expected(found, histograms, beta)
        return found, expected
    if cfg.rule == "otsu":
        found = cuts.otsu_cuts(histograms.indptr, histograms.bins, histograms.positives + histograms.negatives)
    elif cfg.rule == "global":
        found = np.full(histograms.size, common)
    else:
        at = float(np.log(cfg.at / (1 - cfg.at)))
        if cfg.rule == "budget":
            documents = int(histograms.rows().max(initial=0))
            tags = cfg.budget * documents if cfg.budget else float(histograms.support().sum())
            at = cuts.budget_cut(histograms, _log_odds(histograms, lines), tags)
        found = scores_at(at, lines)
    found = np.where(histograms.support() > 0, found, np.inf)
    return found, _expected(found, histograms, beta)


def _expected(found, histograms, beta):
    tp, fp = cuts.counts_at(found, *histograms)
    support = histograms.support()
    return (1 + beta**2) * tp / np.maximum(tp + fp + beta**2 * support, 1e-300)


def scores_at(log_odds: float, lines: Lines) -> np.ndarray:
    """Score of every label at which its calibrated log-odds are `log_odds`, (L,)."""
    found = (log_odds - lines.b) / lines.a
    for label in [k for k, knots in enumerate(lines.knot_score) if knots.size]:
        knots = lines.knot_log_odds[label]
        outside = log_odds - np.clip(log_odds, knots[0], knots[-1])
        found[label] = np.interp(log_odds, knots, lines.knot_score[label]) + outside / MIN_SLOPE
    return found


def _log_odds(histograms, lines):
    owner = histograms.owner()
    found = cuts.centres_of(histograms) * lines.a[owner] + lines.b[owner]
    for label in [k for k, knots in enumerate(lines.knot_score) if knots.size]:
        own = slice(histograms.indptr[label], histograms.indptr[label + 1])
        found[own] = lines.log_odds(label, cuts.centres_of(histograms)[own])
    return found


def _lines(found: Maps) -> Lines:
    return Lines(found.a, found.b, found.knot_score, found.knot_log_odds)


class Forecast(NamedTuple):
    """Counts that a rule would give on documents it was not chosen on, by label (L,) int64."""

    tp: np.ndarray
    fp: np.ndarray
    support: np.ndarray
    documents: int

    def metrics(self) -> dict[str, float]:
        """micro_precision, micro_recall, micro_f1, macro_f1, macro_f1_all and tags a document."""
        found = label_metrics(self.tp, self.fp, self.support - self.tp)
        found.pop("weighted_f1")
        return {**found, "tags": float((self.tp + self.fp).sum() / max(self.documents, 1))}


def forecast(known: Evidence, cfg) -> Forecast:
    """Cross-fitted: cuts from the histograms of all folds but one, counted on that one, and added up.

    Cuts are edges of bins here (1/32), so the histograms are enough.  With fewer than two folds the cuts are judged on
    the rows they were chosen on.
    """
    size = known.pooled.size
    kind = np.array(known.maps.calibration, dtype=object)
    parts = [h for _, h in known.folds] if known.rests else [known.pooled]
    rests = known.rests or [known.pooled]
    tp, fp = np.zeros(size, np.int64), np.zeros(size, np.int64)
    by_probability = cfg.rule in ("budget", "fixed")
    for part, rest in zip(parts, rests, strict=True):
        lines = fit(rest, kind, cfg.pooling, start=_lines(known.maps)) if by_probability else _lines(known.maps)
        found, _ = label_cuts(Curves.none(size), rest, lines, cfg)
        more = cuts.counts_at(found, *part)
        tp, fp = tp + more[0], fp + more[1]
    return Forecast(tp, fp, known.pooled.support(), int(known.pooled.rows().max(initial=0)))


def settled(known: Evidence, cfg) -> tuple[Any, list[dict]]:
    """cfg with a guard to go by: where it says nested, the one that `nested` chooses, and what it tried."""
    return nested(known, cfg) if cfg.guard == "nested" else (cfg, [])


def nested(known: Evidence, cfg) -> tuple[Any, list[dict]]:
    """cfg with the guard whose cross-fitted micro F1 + macro F1 is largest, and what each of them gave."""
    tried = []
    for guard in GUARDS:
        found = forecast(known, cfg.model_copy(update=guard)).metrics()
        tried.append({**guard, "micro_f1": found["micro_f1"], "macro_f1": found["macro_f1"]})
    best = int(np.argmax([t["micro_f1"] + t["macro_f1"] for t in tried]))
    return cfg.model_copy(update=GUARDS[best]), tried


def side_by_side(known: Evidence, cfg) -> dict[str, dict[str, float]]:
    """What each rule, with the other settings as they are, would give: `Forecast.metrics` by rule."""
    rules = ("f_beta", "joint", "global", "budget", "precision", "recall", "cost", "youden", "otsu", "pcut", "fixed")
    return {rule: forecast(known, settled(known, cfg.model_copy(update={"rule": rule}))[0]).metrics() for rule in rules}


def _rows_of(table, fold, size, column):
    rows = table.filter(pa.compute.equal(table["fold"], fold)).sort_by("label_id").combine_chunks()
    lengths = np.zeros(size + 1, np.int64)
    lengths[rows["label_id"].to_numpy() + 1] = pa.compute.list_value_length(rows[column]).to_numpy()
    return rows, np.cumsum(lengths)


def _flat(rows, column):
    return pa.compute.list_flatten(rows[column]).to_numpy()
