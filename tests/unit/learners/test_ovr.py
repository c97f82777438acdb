import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose, assert_array_equal

from pipeline.config import TrainConfig
from pipeline.kernels import lockstep
from pipeline.kernels.curves import BINS
from pipeline.kernels.lockstep import Rows
from pipeline.kernels.simd import LANES
from pipeline.learners import ovr
from pipeline.learners.ovr import POOLED, Gold, fit_block, lane_signs, left_out
from pipeline.tables import TABLES
from tests.reference import counts_at, logistic_objective, logistic_optimum

MIDDLE = BINS // 2  # the first bin of scores >= 0
TIGHT = {"gap": 1e-4, "max_epochs": 500, "C": 5.0, "prune": 0.0}


def rows_of(X):
    X = sp.csr_array(np.asarray(X, np.float32))
    squares = np.asarray(X.multiply(X).sum(axis=1)).ravel() + 1
    return Rows(X.indptr.astype(np.int64), X.indices.astype(np.int32), X.data, squares.astype(np.float32), X.shape[1])


def gold_of(Y, fold):
    """Dense gold (n, L), fold (n,) -> Gold."""
    label, row = np.nonzero(np.transpose(Y))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(label, minlength=np.shape(Y)[1]))])
    return Gold(indptr.astype(np.int64), row.astype(np.int32), np.asarray(fold, np.int8))


def problem(n=120, d=40, L=11, folds=3, seed=0):
    """Dense X, Y and fold; every fold holds positives and negatives of every label."""
    rng = np.random.default_rng(seed)
    X = rng.random((n, d)) * (rng.random((n, d)) < 0.25)
    X /= np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-9)
    fold = np.arange(n) % max(folds, 2)
    Y = X @ rng.normal(size=(d, L)) > 0.5
    for f in range(max(folds, 2)):
        Y[np.flatnonzero(fold == f)[:2]] = [[True], [False]]
    return X, Y, fold


def fit(X, Y, fold, labels=None, **settings):
    cfg = TrainConfig(**{**TIGHT, **settings})
    return fit_block(range(np.shape(Y)[1]) if labels is None else labels, rows_of(X), gold_of(Y, fold), cfg)


def by_key(table, *key):
    return {tuple(row[k] for k in key): row for row in table.to_pylist()}


def dense_model(row, d):
    w = np.zeros(d + 1)
    w[row["indices"]] = row["weights"]
    w[-1] = row["bias"]
    return w


def test_the_first_lane_leaves_nothing_out_unless_one_fold_is_held():
    assert left_out(3) == [None, 0, 1, 2]
    assert left_out(15) == [None, *range(15)]
    assert left_out(0) == [0]


def test_lane_signs_are_gold_outside_the_fold_left_out():
    _, Y, fold = problem(L=5)
    sign = lane_signs([4, 1], gold_of(Y, fold), left_out(3))
    assert sign.dtype == np.int8
    sign = sign.reshape(-1, LANES)
    for j, label_id in enumerate((4, 1)):
        for k, out in enumerate((None, 0, 1, 2)):
            want = np.where(Y[:, label_id], 1, -1) * (fold != out if out is not None else 1)
            assert_array_equal(sign[:, 4 * j + k], want)
    assert_array_equal(sign[:, 8:], 0)


def test_models_are_the_optimum_of_each_label():
    X, Y, fold = problem(L=4)
    dense = np.hstack([X.astype(np.float32), np.ones((X.shape[0], 1))])
    tables = fit(X, Y, fold)
    c = np.full(X.shape[0], TIGHT["C"])
    for row in tables["label_models"].to_pylist():
        y = np.where(Y[:, row["label_id"]], 1, -1)
        best = logistic_objective(dense, y, c, logistic_optimum(dense, y, c))
        w = dense_model(row, X.shape[1])
        assert row["status"] == "ok"
        assert_allclose(row["objective"], logistic_objective(dense, y, c, w), rtol=1e-6)
        assert best * (1 - 1e-6) <= row["objective"] <= best * (1 + TIGHT["gap"])
        assert -1e-6 <= row["gap"] <= TIGHT["gap"]
        assert row["C"] == TIGHT["C"]


def out_of_fold_scores(X, Y, fold, label_id, folds):
    """Each fold scored by an optimum over the rows outside it."""
    dense = np.hstack([X.astype(np.float32), np.ones((X.shape[0], 1))])
    y = np.where(Y[:, label_id], 1, -1)
    S = np.full(X.shape[0], np.nan)
    for f in folds:
        c = TIGHT["C"] * (fold != f)
        S[fold == f] = dense[fold == f] @ logistic_optimum(dense, y, c)
    return S


@pytest.mark.parametrize("folds", [0, 2, 3, 5, 7, 15])
def test_curves_are_of_scores_by_the_model_that_left_the_fold_out(folds):
    X, Y, fold = problem(n=60, L=3, folds=folds)
    tables = fit(X, Y, fold, folds=folds, gap=1e-5)
    curves = by_key(tables["curves"], "label_id", "fold")
    held = range(folds) if folds else [0]
    assert set(curves) == {(j, f) for j in range(3) for f in (POOLED, *held)}
    for j in range(3):
        S = out_of_fold_scores(X, Y, fold, j, held)
        for f in (POOLED, *held):
            inside = (fold == f) if f != POOLED else ~np.isnan(S)
            row = curves[j, f]
            # a cut that no score is near: the counts above it must be the same for both solutions
            for cut, tp, fp in zip(row["cut"], row["tp"], row["fp"], strict=True):
                if np.abs(S[inside] - cut).min() > 0.02:
                    assert (tp, fp) == counts_at(S[inside], Y[inside, j], cut)
            levels = np.unique(S[inside & Y[:, j]])
            assert abs(len(row["cut"]) - levels.size) <= 1
            assert row["tp"][-1] == row["positives"]


@pytest.mark.parametrize("folds", [2, 3, 5, 15])
def test_no_row_is_scored_by_a_model_that_saw_it(folds):
    """Every row has a feature of its own: a model that saw the row knows its gold, one that did not scores the bias."""
    n = 90
    rng = np.random.default_rng(1)
    Y = rng.random((n, 7)) < 0.4
    fold = np.arange(n) % folds
    for f in range(folds):
        Y[np.flatnonzero(fold == f)[:2]] = [[True], [False]]
    tables = fit(np.eye(n), Y, fold, folds=folds, C=100.0)
    for row in tables["label_models"].to_pylist():
        S = dense_model(row, n)[:-1] + row["bias"]
        assert S[Y[:, row["label_id"]]].min() > S[~Y[:, row["label_id"]]].max()
    for (j, f), row in by_key(tables["curves"], "label_id", "fold").items():
        if f != POOLED:
            assert (row["tp"], row["fp"]) == ([Y[fold == f, j].sum()], [(~Y[fold == f, j]).sum()])


def test_with_folds_0_the_held_out_rows_are_not_trained_on():
    n = 60
    Y = (np.arange(n)[:, None] // 2) % 2 == 0
    fold = np.arange(n) % 4 > 0
    tables = fit(np.eye(n), Y, fold, folds=0)
    w = dense_model(tables["label_models"].to_pylist()[0], n)[:-1]
    assert_array_equal(w[fold == 0], 0)
    assert (w[fold == 1] != 0).all()
    rows = tables["curves"].to_pylist()
    assert [row["fold"] for row in rows] == [POOLED, 0]
    assert {**rows[0], "fold": 0} == rows[1]
    assert rows[0]["positives"] + rows[0]["negatives"] == (fold == 0).sum()


@pytest.mark.parametrize("folds", [0, 3, 5])
def test_pooled_counts_are_the_sum_over_folds(folds):
    X, Y, fold = problem(folds=folds)
    tables = fit(X, Y, fold, folds=folds)
    curves, histograms = (by_key(tables[name], "label_id", "fold") for name in ("curves", "histograms"))
    held = range(folds) if folds else [0]
    for j in range(Y.shape[1]):
        for kind, gold in (("positives", Y[:, j]), ("negatives", ~Y[:, j])):
            for f in held:
                assert curves[j, f][kind] == (gold & (fold == f)).sum()
            assert curves[j, POOLED][kind] == sum(curves[j, f][kind] for f in held)
            pooled = np.zeros(BINS, np.int64)
            for f in held:
                row = histograms[j, f]
                assert sum(row[kind]) == curves[j, f][kind]
                pooled[row["bin"]] += row[kind]
            assert_array_equal(np.array(histograms[j, POOLED][kind]), pooled[histograms[j, POOLED]["bin"]])
            assert sum(histograms[j, POOLED][kind]) == curves[j, POOLED][kind]


def test_a_label_on_no_row_or_on_every_row_has_a_constant_model():
    X, Y, fold = problem(L=5)
    Y[:, 1], Y[:, 3] = False, True
    tables = fit(X, Y, fold)
    models = tables["label_models"].to_pylist()
    assert [m["status"] for m in models] == ["ok", "no_positives", "ok", "no_negatives", "ok"]
    for label_id, sign in ((1, -1), (3, 1)):
        assert_allclose(models[label_id]["bias"], sign * np.log(120.5 / 0.5), rtol=1e-6)
        assert (models[label_id]["indices"], models[label_id]["weights"]) == ([], [])
    for name in ("curves", "histograms"):
        assert set(tables[name]["label_id"].to_pylist()) == {0, 2, 4}


def test_with_folds_0_only_the_rows_trained_on_decide_whether_a_model_is_constant():
    X, Y, fold = problem(L=3, folds=0)
    Y[:, 0] &= fold == 0
    Y[:, 1] |= fold == 1
    models = fit(X, Y, fold, folds=0)["label_models"].to_pylist()
    assert [m["status"] for m in models] == ["no_positives", "no_negatives", "ok"]
    assert_allclose([m["bias"] for m in models[:2]], [-np.log(60.5 / 0.5), np.log(60.5 / 0.5)], rtol=1e-6)


def test_a_block_of_constant_labels_only():
    X, Y, fold = problem(L=2)
    tables = fit(X, np.zeros_like(Y), fold)
    assert tables["label_models"]["status"].to_pylist() == ["no_positives"] * 2
    assert tables["curves"].num_rows == tables["histograms"].num_rows == 0


def test_a_fold_model_that_saw_only_negatives_scores_low():
    """Trainers that take the sign of the first class they meet give such a model a positive bias."""
    X, Y, fold = problem(L=2)
    Y[:, 0] &= fold == 0  # without fold 0 the label has no positive
    Y[:, 1] |= fold != 0  # without fold 0 the label has no negative
    tables = fit(X, Y, fold)
    assert tables["label_models"]["status"].to_pylist() == ["ok", "ok"]
    histograms = by_key(tables["histograms"], "label_id", "fold")
    assert histograms[0, 0]["bin"] and max(histograms[0, 0]["bin"]) < MIDDLE
    assert histograms[1, 0]["bin"] and min(histograms[1, 0]["bin"]) >= MIDDLE
    curves = by_key(tables["curves"], "label_id", "fold")
    assert max(curves[0, 0]["cut"]) < 0
    assert curves[0, 1]["cut"] == curves[0, 1]["tp"] == []
    S = np.hstack([X, np.ones((X.shape[0], 1))]) @ dense_model(tables["label_models"].to_pylist()[0], X.shape[1])
    assert S[fold != 0].max() < 0


@pytest.mark.parametrize("settings", [{"folds": 0}, {"folds": 3}, {"folds": 5}])
def test_the_company_of_a_label_does_not_change_its_rows(settings):
    X, Y, fold = problem(folds=settings["folds"])
    Y[:, 6] = False
    whole = fit(X, Y, fold, **settings)
    for labels in ([6], [10, 3, 6], [5, 4, 3, 2, 1, 0]):
        part = fit(X, Y, fold, labels, **settings)
        for name in ("curves", "histograms", "label_models"):
            key = TABLES[name].key
            assert part[name].schema == TABLES[name].schema
            found, want = by_key(part[name], *key), by_key(whole[name], *key)
            assert list(found) == sorted(k for k in want if k[0] in labels)
            for k, row in found.items():
                for count in ("positives", "negatives") if name == "curves" else ():
                    assert row[count] == want[k][count]
        for (label_id,), row in by_key(part["label_models"], "label_id").items():
            other = whole["label_models"].to_pylist()[label_id]
            assert row["status"] == other["status"]
            # |w - w*|^2 / 2 <= P - D for each of the two
            reach = np.sqrt(2 * row["objective"] * (TIGHT["gap"] + 1e-6))
            apart = np.linalg.norm(dense_model(row, X.shape[1]) - dense_model(other, X.shape[1]))
            assert apart <= 2 * reach


def test_the_same_block_gives_the_same_bytes():
    X, Y, fold = problem()
    a, b = fit(X, Y, fold), fit(X, Y, fold)
    assert all(a[name].equals(b[name]) for name in a)
    assert not fit(X, Y, fold, seed=1)["label_models"].equals(a["label_models"])


def test_a_label_that_is_not_solved_in_time_says_so():
    X, Y, fold = problem()
    tables = fit(X, Y, fold, max_epochs=2, gap=1e-6)
    models = tables["label_models"].to_pylist()
    assert {m["status"] for m in models} == {"not_converged"}
    assert {m["epochs"] for m in models} == {2}
    assert min(m["gap"] for m in models) > 1e-6
    assert len(by_key(tables["curves"], "label_id", "fold")) == 4 * Y.shape[1]


def test_pruning_drops_weights_and_reports_the_objective_of_those_kept():
    X, Y, fold = problem(L=4)
    dense = np.hstack([X.astype(np.float32), np.ones((X.shape[0], 1))])
    full, pruned = (fit(X, Y, fold, prune=share)["label_models"].to_pylist() for share in (0.0, 0.02))
    assert sum(len(m["indices"]) for m in pruned) < sum(len(m["indices"]) for m in full)
    for before, after in zip(full, pruned, strict=True):
        assert set(after["indices"]) <= set(before["indices"])
        assert after["bias"] == before["bias"]
        assert before["objective"] <= after["objective"] <= before["objective"] * 1.02
        y = np.where(Y[:, after["label_id"]], 1, -1)
        want = logistic_objective(dense, y, np.full(y.size, TIGHT["C"]), dense_model(after, X.shape[1]))
        assert_allclose(after["objective"], want, rtol=1e-6)
        assert after["gap"] > before["gap"]
        assert after["status"] == "ok"


def out_of_memory(solution):
    raise MemoryError("no room")


def not_a_number(solution):
    return solution._replace(primal=solution.primal * np.nan)


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (out_of_memory, "failed: MemoryError: no room"),
        (not_a_number, "failed: ArithmeticError: the weights are not fini"),
    ],
)
def test_a_group_that_fails_leaves_the_others_alone(monkeypatch, failure, status):
    X, Y, fold = problem(L=10)
    Y[:, 9] = False
    want = fit(X, Y, fold)
    solve, calls = lockstep.solve, []

    def failing(*args):
        calls.append(args)
        return failure(solve(*args)) if len(calls) == 2 else solve(*args)

    monkeypatch.setattr(ovr.lockstep, "solve", failing)
    found = fit(X, Y, fold)
    assert len(calls) == 3  # four labels a group
    for label_id, (row, good) in enumerate(
        zip(found["label_models"].to_pylist(), want["label_models"].to_pylist(), strict=True)
    ):
        if 4 <= label_id < 8:
            assert row["status"].startswith(status)
            share = Y[:, label_id].sum()
            assert row["bias"] == pytest.approx(np.log((share + 0.5) / (len(Y) - share + 0.5)), rel=1e-5)
            assert (row["indices"], row["weights"]) == ([], [])
        else:
            assert row == good
    others = [row for row in want["curves"].to_pylist() if not 4 <= row["label_id"] < 8]
    assert found["curves"].to_pylist() == others


@pytest.mark.parametrize("value", [3e38, np.inf, np.nan])
def test_features_too_large_for_float32_are_a_failure_not_a_model(value):
    X, Y, fold = problem(L=2)
    X[5] = value
    with np.errstate(all="ignore"):
        models = fit(X, Y, fold)["label_models"].to_pylist()
    assert all(m["status"].startswith("failed: ArithmeticError") for m in models)


def test_progress_is_told_once_a_label():
    X, Y, fold = problem(L=9)
    Y[:, [2, 5]] = False
    ticks = []
    cfg = TrainConfig(**TIGHT)
    fit_block(range(9), rows_of(X), gold_of(Y, fold), cfg, at_label=lambda: ticks.append(1))
    assert len(ticks) == 9
