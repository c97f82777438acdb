"""One-vs-rest: a block of labels -> their models, curves and histograms, and the gold that their scores doubt.

    block of labels + X, folds, positives  ->  label_models, curves, histograms, suspicious

Labels are solved in groups of sixteen: once for the final models, once for every fold left out, all lanes of a group
leaving out the same fold, so that rows of that fold cost nothing.  Where train.C or train.positive_weight is a list, a
group is solved for each value, and every label keeps the one whose out-of-fold scores are best.  With a single
held-out fold (train.folds = 0) one lane serves as final model and for the scores.
"""

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy.special import expit

from pipeline.host import alone
from pipeline.kernels import calibration, curves, lanes, lockstep, pruning
from pipeline.kernels.lockstep import LOSSES, Lanes, Rows
from pipeline.kernels.simd import LANES, aligned
from pipeline.tables import TABLES

log = logging.getLogger(__name__)

POOLED = -1  # `fold` of a curve over all folds
LEAST_NEGATIVES = 1_000  # of a label whose negatives are sampled

# `row` counts the training rows here; who calls knows their names
SUSPICIOUS = pa.schema([field for field in TABLES["suspicious"].schema if field.name not in ("label", "doc_id")])
SCHEMAS = {name: TABLES[name].schema for name in ("label_models", "curves", "histograms")} | {"suspicious": SUSPICIOUS}


class Gold(NamedTuple):
    """Which training rows carry which label, and the fold of each row."""

    indptr: np.ndarray  # (L + 1,) int64
    rows: np.ndarray  # (assignments,) int32, ascending within a label
    fold: np.ndarray  # (n,) int8

    def positives(self, label_id: int) -> np.ndarray:
        return self.rows[self.indptr[label_id] : self.indptr[label_id + 1]]


class Extras(NamedTuple):
    """What else is known of each label."""

    keys: np.ndarray  # (L,) uint64: seeds of random draws; from the label's name, so that they outlive its id
    positive: np.ndarray  # (L,) float64: factor of C for positives
    negative: np.ndarray  # (L,) float64: factor of C for negatives

    @classmethod
    def plain(cls, labels: int) -> "Extras":
        return cls(np.arange(labels, dtype=np.uint64), np.ones(labels), np.ones(labels))


class Start(NamedTuple):
    """Earlier models, by label: the solver starts from them."""

    indptr: np.ndarray  # (L + 1,) int64
    indices: np.ndarray  # (nnz,) int32
    weights: np.ndarray  # (nnz,) float32
    bias: np.ndarray  # (L,) float32; NaN: there is no earlier model

    def weights_of(self, group: Sequence[int], features: int) -> np.ndarray:
        """The earlier weights of a group as the solver has them: ((d + 1) * 16,) float32, bias NaN where unknown."""
        W = aligned((features + 1) * LANES)
        columns = W.reshape(-1, LANES)
        columns[-1] = np.nan
        for j, label_id in enumerate(group):
            inside = slice(self.indptr[label_id], self.indptr[label_id + 1])
            columns[self.indices[inside], j] = self.weights[inside]
            columns[-1, j] = self.bias[label_id]
        return W


class Candidate(NamedTuple):
    """One choice among those that train.C and train.positive_weight list."""

    C: float
    positive_weight: float | None  # None: balanced


def candidates(cfg) -> list[Candidate]:
    """All combinations, smallest C first."""
    weights = (None,) if cfg.positive_weight == "balanced" else cfg.positive_weight
    return [Candidate(*pair) for pair in itertools.product(cfg.C, weights)]


def left_out(folds: int) -> list[int | None]:
    """The fold that each lane of a label leaves out; the first lane is the model that is kept.

    >>> left_out(3)
    [None, 0, 1, 2]
    >>> left_out(0)
    [0]
    """
    return [None, *range(folds)] if folds else [0]


def groups(label_ids: Sequence[int], labels_per_block: int) -> list[list[int]]:
    """Labels that are solved together: what a group holds decides its bits, so it never depends on the block."""
    size = min(LANES, labels_per_block)
    return [list(label_ids[start : start + size]) for start in range(0, len(label_ids), size)]


def fit_block(
    label_ids: Sequence[int],
    X: Rows,
    gold: Gold,
    cfg,
    extras: Extras | None = None,
    start: Start | None = None,
    over: Callable[[], bool] = lambda: False,
    after_group: Callable[[list[int], float], None] = lambda group, seconds: None,
) -> dict[str, pa.Table]:
    """Solve the lanes of some labels.

    Args:
        label_ids: ids of the labels; sixteen that follow one another are a group.
        X: training rows.
        cfg: TrainConfig.
        extras: weights and seeds by label; None: weight 1.
        start: earlier models to start from.
        over: asked before each group; when true, the labels left get the status `out_of_time`.
        after_group: called with the labels of each group and its seconds.

    Returns:
        Tables label_models, curves and histograms with one row a label (and fold), and `suspicious` without the
        columns label and doc_id, whose row counts the training rows.  A label without positives or without negatives
        gets a constant model; one that fails gets a row with the cause in `status`.
    """
    extras = extras or Extras.plain(gold.indptr.size - 1)
    rows: tuple[list[dict], ...] = ([], [], [], [])
    inside = np.ones(X.size, bool) if cfg.sample == 1 else lanes.sample(X.size, np.uint64(cfg.seed), cfg.sample)
    trained = inside if cfg.folds else inside & (gold.fold != 0)
    used = int(np.count_nonzero(trained))
    for group in groups(label_ids, cfg.labels_per_block):
        began = time.perf_counter()
        late = over()
        solvable = []
        for label_id in group:
            kept = int(np.count_nonzero(trained[gold.positives(label_id)]))
            if late:
                rows[0].append(_constant(label_id, kept, used, "out_of_time"))
            elif 0 < kept < used:
                solvable.append(label_id)
            else:
                rows[0].append(_constant(label_id, kept, used))
        if solvable:
            for into, part in zip(rows, _isolated(solvable, X, gold, cfg, extras, start, inside), strict=True):
                into.extend(part)
        after_group(group, time.perf_counter() - began)
    return {name: _table(name, part) for name, part in zip(SCHEMAS, rows, strict=True)}


def _table(name: str, rows: list[dict]) -> pa.Table:
    """Rows in the order of their key; lists come as arrays and stay arrays."""
    rows = sorted(rows, key=lambda row: tuple(row[k] for k in TABLES[name].key))
    columns = []
    for field in SCHEMAS[name]:
        values = [row[field.name] for row in rows]
        if pa.types.is_list(field.type):
            flat = np.concatenate([np.empty(0, field.type.value_type.to_pandas_dtype()), *values]).astype(
                field.type.value_type.to_pandas_dtype(), copy=False
            )
            offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
            columns.append(pa.ListArray.from_arrays(offsets, flat).cast(field.type))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=SCHEMAS[name])


def failed_block(label_ids: Sequence[int], gold: Gold, cause: str) -> dict[str, pa.Table]:
    """The tables of a block that could not be solved at all: base rates, with the cause as status."""
    return {
        "label_models": constant_rows(sorted(label_ids), np.diff(gold.indptr), gold.fold.size, f"failed: {cause}"),
        **{name: schema.empty_table() for name, schema in SCHEMAS.items() if name != "label_models"},
    }


def constant_rows(label_ids: Sequence[int], support: np.ndarray, rows: int, status: str) -> pa.Table:
    """Rows of label_models for labels that are not trained, at their base rate."""
    models = [_constant(label_id, int(support[label_id]), rows, status) for label_id in label_ids]
    return _table("label_models", models)


_warm: list[float] = []


def warm_up(lock_folder: Path, cfg) -> float:
    """Have every kernel compiled, or read from numba's cache; seconds that this process took, 0 the second time.

    One process of a host compiles, under a lock, and the others read what it has cached.
    """
    if _warm:
        return 0.0
    began = time.perf_counter()
    n = 8
    X = Rows(np.arange(n + 1), np.zeros(n, np.int32), np.ones(n, np.float32), np.full(n, 2, np.float32), 1)
    gold = Gold(np.array([0, n // 2]), np.arange(n // 2, dtype=np.int32), (np.arange(n) % 2).astype(np.int8))
    for array in (*X[:4], *gold):
        array.setflags(write=False)  # as arrays that are mapped: numba compiles for either kind apart
    with alone(lock_folder / "compile.lock"):
        fit_block([0], X, gold, cfg.model_copy(update={"C": (1.0, 2.0), "folds": 2, "sample": 0.99, "max_epochs": 4}))
    _warm.append(time.perf_counter() - began)
    return _warm[0]


def _isolated(group, X, gold, cfg, extras, start, inside):
    """The rows of a group; where it fails, its labels one by one, so that one bad label costs only itself."""
    try:
        return _fit_group(group, X, gold, cfg, extras, start, inside)
    except Exception as error:
        log.warning("labels %s failed together: %s: %s", group, type(error).__name__, error)
        if len(group) == 1:
            model = _constant(group[0], gold.positives(group[0]).size, X.size, _cause(error))
            return [model], [], [], []
    alone = [_isolated([label_id], X, gold, cfg, extras, start, inside) for label_id in group]
    return tuple(list(itertools.chain.from_iterable(part)) for part in zip(*alone, strict=True))


def _cause(error):
    return f"failed: {type(error).__name__}: {error}"


class _Fitted(NamedTuple):
    """A group's final models and out-of-fold scores under one candidate."""

    W: np.ndarray  # (d + 1, 16), pruned
    held: np.ndarray  # (rows held out, 16) float32: scores by the model that did not see the row
    C: np.ndarray  # (16,) and so are the following
    positive_weight: np.ndarray
    epochs: np.ndarray
    primal: np.ndarray
    gap: np.ndarray  # relative, after pruning
    solver_gap: np.ndarray  # relative, before pruning, the largest over the label's lanes
    quality: np.ndarray  # smaller is better


def _fit_group(group, X, gold, cfg, extras, start, inside):
    held = np.flatnonzero(gold.fold >= 0 if cfg.folds else gold.fold == 0).astype(np.int32)
    positive = np.zeros((len(group), held.size), np.bool_)
    place = np.full(X.size, -1, np.int64)
    place[held] = np.arange(held.size)
    for j, label_id in enumerate(group):
        found = place[gold.positives(label_id)]
        positive[j, found[found >= 0]] = True
    best = None
    for candidate in candidates(cfg):
        fitted = _fit_candidate(group, X, gold, cfg, extras, start, inside, candidate, held, place)
        if len(candidates(cfg)) > 1:
            quality = [QUALITIES[cfg.choose](fitted.held[:, j], positive[j]) for j in range(len(group))]
            fitted = fitted._replace(quality=np.array(quality + [np.inf] * (LANES - len(group))))
        best = fitted if best is None else _better(best, fitted)
    models, curve_rows, histogram_rows, doubts = [], [], [], []
    trained = inside if cfg.folds else inside & (gold.fold != 0)
    used = int(np.count_nonzero(trained))
    columns = lockstep.nonzeros(best.W.ravel())
    own = np.ascontiguousarray(best.held.T)
    seen = {f: np.flatnonzero(gold.fold[held] == f) for f in left_out(cfg.folds) if f is not None}
    for j, label_id in enumerate(group):
        features, weights = columns[j]
        kept = int(np.count_nonzero(trained[gold.positives(label_id)]))
        models.append(
            {
                "label_id": label_id,
                "bias": best.W[-1, j],
                "indices": features,
                "weights": weights,
                "C": best.C[j],
                "positive_weight": best.positive_weight[j]
                if candidates(cfg)[0].positive_weight
                else (used - kept) / kept,
                "epochs": int(best.epochs[j]),
                "gap": best.gap[j],
                "solver_gap": best.solver_gap[j],
                "objective": best.primal[j],
                "status": "ok" if best.solver_gap[j] <= cfg.gap else "not_converged",
            }
        )
        pooled = _histogram_row(label_id, POOLED, own[j], positive[j])
        curve_rows.append(_curve_row(label_id, POOLED, own[j], positive[j]))
        histogram_rows.append(pooled)
        for fold, rows in seen.items():
            curve_rows.append(_curve_row(label_id, fold, own[j, rows], positive[j, rows]))
            histogram_rows.append(_histogram_row(label_id, fold, own[j, rows], positive[j, rows]))
        if cfg.suspicious:
            counts = curves.bin_centres()[pooled["bin"]], pooled["positives"], pooled["negatives"]
            doubts += suspicious(label_id, own[j], positive[j], held, counts, cfg.suspicious)
    return models, curve_rows, histogram_rows, doubts


def _better(best: _Fitted, other: _Fitted) -> _Fitted:
    """Lane by lane the fit of better quality; the earlier one where they are equal."""
    take = other.quality < best.quality
    return _Fitted(*(np.where(take, new, old) for old, new in zip(best, other, strict=True)))


def _fit_candidate(group, X, gold, cfg, extras, start, inside, candidate, held, place):
    scores = np.zeros((held.size, LANES), np.float32)
    solver_gap = np.zeros(LANES)
    earlier = None if start is None else start.weights_of(group, X.features)
    for fold in left_out(cfg.folds):
        rows = inside if fold is None else inside & (gold.fold != fold)
        problem = group_lanes(group, gold, cfg, extras, candidate, rows)
        solution = lockstep.solve(X, problem, cfg.gap, cfg.max_epochs, cfg.seed, earlier)
        if not np.isfinite(solution.primal).all():
            raise ArithmeticError("the weights are not finite; the features hold values too large for float32")
        solver_gap = np.maximum(solver_gap, solution.gaps)
        if fold is None or not cfg.folds:
            pruned = pruning.prune(X, problem, solution, cfg.prune)
            final = solution._replace(W=pruned.cuts, A=pruned.cuts)  # its numbers, without the arrays
            kept = pruned.W
        else:
            kept = np.empty_like(solution.W)
            pruning.keep_large(solution.W, pruned.cuts, kept)
        if fold is not None:
            unseen = held[gold.fold[held] == fold]
            Z = np.empty(unseen.size * LANES, np.float32)
            lockstep.margins(X.indptr, X.indices, X.data, unseen, kept, Z)
            scores[place[unseen]] = Z.reshape(-1, LANES)
        del solution, kept, problem  # before the next ones are made
    return _Fitted(
        W=pruned.W.reshape(-1, LANES),
        held=scores,
        C=np.full(LANES, candidate.C),
        positive_weight=np.full(LANES, candidate.positive_weight or np.nan),
        epochs=np.full(LANES, final.epochs),
        primal=pruned.primal,
        gap=lockstep.relative(pruned.primal - final.primal + final.gap, pruned.primal),
        solver_gap=solver_gap,
        quality=np.zeros(LANES),
    )


def group_lanes(group, gold: Gold, cfg, extras: Extras, candidate: Candidate, inside: np.ndarray) -> Lanes:
    """The lanes of up to sixteen labels over the rows that are `inside`."""
    n = int(np.count_nonzero(inside))
    positives = [gold.positives(label_id) for label_id in group]
    count = np.array([np.count_nonzero(inside[rows]) for rows in positives], np.float64)
    keep = np.ones(len(group))
    if cfg.negatives:
        wanted = np.maximum(cfg.negatives * count, LEAST_NEGATIVES)
        keep = np.minimum(wanted / np.maximum(n - count, 1), 1.0)
    keys = extras.keys[list(group)] + np.uint64(cfg.seed)
    sign = lanes.signs(inside, positives, keep, keys)
    # a sampled negative stands for those that were not drawn
    drawn = lockstep.tally(sign)[1][: len(group)]
    stands_for = np.where(drawn > 0, (n - count) / np.maximum(drawn, 1), 1.0)
    c_pos, c_neg = np.ones(LANES), np.ones(LANES)
    c_pos[: len(group)] = candidate.C * extras.positive[list(group)]
    c_neg[: len(group)] = candidate.C * extras.negative[list(group)] * stands_for
    if candidate.positive_weight is None:  # as scikit-learn's class_weight="balanced"
        c_pos[: len(group)] *= n / (2 * np.maximum(count, 1))
        c_neg[: len(group)] *= n / (2 * np.maximum(n - count, 1))
    else:
        c_pos[: len(group)] *= candidate.positive_weight
    return Lanes(sign, c_pos.astype(np.float32), c_neg.astype(np.float32), LOSSES[cfg.loss])


def calibrated_log_loss(scores: np.ndarray, positive: np.ndarray) -> float:
    """Mean log loss after Platt's map fitted to the same scores, from their histogram; nats a row."""
    positives, negatives = (c.astype(np.float64) for c in curves.histogram(scores, positive))
    centres = curves.bin_centres()
    a, b = calibration.platt(centres, positives, negatives)
    z = a * centres + b
    loss = positives * np.logaddexp(0, -z) + negatives * np.logaddexp(0, z)
    return float(loss.sum() / max(scores.size, 1))


def best_f1_loss(scores: np.ndarray, positive: np.ndarray) -> float:
    """1 - the best F1 of any cut, smoothed as (2 tp + 1) / (2 tp + fp + fn + 2)."""
    _, tp, fp = curves.curve(scores, positive)
    if tp.size == 0:
        return 1.0
    return float(1 - np.max((2 * tp + 1) / (tp + fp + np.count_nonzero(positive) + 2)))


QUALITIES = {"log_loss": calibrated_log_loss, "f1": best_f1_loss}


def suspicious(
    label_id: int,
    scores: np.ndarray,
    positive: np.ndarray,
    rows: np.ndarray,
    counts: tuple[np.ndarray, np.ndarray, np.ndarray],
    most: int,
) -> list[dict]:
    """The rows whose gold the scores of a label doubt most, up to `most` of each kind, for the table `suspicious`.

    Args:
        scores (n,) float32 out of fold, positive (n,) bool, rows (n,) ascending.
        counts: centres, positives and negatives of the bins of these scores.

    Probabilities are those of Platt's map.  A row without the label is doubted (kind `missing`) where the label is
    probable: above 0.5, and that is the doubt.  A row with the label (kind `wrong`) is doubted where the score makes
    the label less probable than it is on average; the doubt leaves the base rate out, as if the label were on every
    other document, because who gave a rare label had reasons that its base rate does not know.  Else every positive of
    a label with too few of them to learn from would be doubted.  Of equal scores the smaller row comes first.
    """
    positives, negatives = (c.astype(np.float64) for c in counts[1:])
    if positives.sum() == 0 or negatives.sum() == 0:
        return []
    a, b = calibration.platt(counts[0], positives, negatives)
    prior = np.log(positives.sum() / negatives.sum())
    found = []
    for kind, gold, sign, base in (("missing", ~positive, 1, 0.0), ("wrong", positive, -1, prior)):
        # as scores: there are many more rows than doubtful ones
        places = np.flatnonzero(gold & (sign * scores > sign * (base - b) / a))
        # stable: equal scores stay in the order of their rows
        places = places[np.argsort(-sign * scores[places], kind="stable")[:most]]
        logits = a * scores[places].astype(np.float64) + b
        for i, probability, doubt in zip(places, expit(logits), expit(sign * (logits - base)), strict=True):
            found.append(
                {
                    "label_id": label_id,
                    "row": int(rows[i]),
                    "kind": kind,
                    "score": float(scores[i]),
                    "probability": float(probability),
                    "doubt": float(doubt),
                }
            )
    return found


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


def _constant(label_id, positives, rows, status=None):
    """The log-odds of the smoothed base rate, so that the ranking of the other labels is not disturbed."""
    return {
        "label_id": label_id,
        "bias": float(np.log((positives + 0.5) / (rows - positives + 0.5))),
        "indices": [],
        "weights": [],
        "C": 0.0,
        "positive_weight": 0.0,
        "epochs": 0,
        "gap": 0.0,
        "solver_gap": 0.0,
        "objective": 0.0,
        "status": status or ("no_positives" if positives == 0 else "no_negatives"),
    }
