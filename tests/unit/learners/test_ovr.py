import logging

import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from pipeline.config import TrainConfig
from pipeline.kernels import lanes, lockstep, pruning
from pipeline.kernels.calibration import MIN_SLOPE, platt
from pipeline.kernels.curves import BINS, bin_centres, histogram
from pipeline.kernels.simd import LANES
from pipeline.learners import ovr
from pipeline.learners.ovr import (
    LEAST_NEGATIVES,
    POOLED,
    SUSPICIOUS,
    Candidate,
    Extras,
    Gold,
    Start,
    best_f1_loss,
    calibrated_log_loss,
    candidates,
    constant_rows,
    failed_block,
    fit_block,
    group_lanes,
    groups,
    left_out,
    suspicious,
)
from pipeline.tables import TABLES
from tests.problems import rows_of
from tests.reference import best_f1, counts_at, objective, optimum

MIDDLE = BINS // 2  # the first bin of scores >= 0
TIGHT = {"gap": 1e-4, "max_epochs": 2000, "C": 5.0, "prune": 0.0, "loss": "logistic"}


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


def fit(X, Y, fold, labels=None, extras=None, start=None, hooks=None, **settings):
    cfg = TrainConfig(**{**TIGHT, **settings})
    labels = range(np.shape(Y)[1]) if labels is None else labels
    return fit_block(labels, rows_of(X), gold_of(Y, fold), cfg, extras, start, **(hooks or {}))


def models(*args, **kwargs):
    return fit(*args, **kwargs)["label_models"].to_pylist()


def by_key(table, *key):
    return {tuple(row[k] for k in key): row for row in table.to_pylist()}


def dense_model(row, d):
    w = np.zeros(d + 1)
    w[row["indices"]] = row["weights"]
    w[-1] = row["bias"]
    return w


def with_bias(X):
    return np.hstack([np.float32(X), np.ones((len(X), 1))]).astype(np.float64)


def assert_same_model(a, b, d):
    """Two rows of label_models solve the same problem, each up to its gap: |w - w*|^2 / 2 <= P - D."""
    assert a["status"] == b["status"] == "ok"
    reach = sum(np.sqrt(2 * row["objective"] * (row["gap"] + 2e-6)) for row in (a, b))
    assert np.linalg.norm(dense_model(a, d) - dense_model(b, d)) <= reach
    assert_allclose(a["objective"], b["objective"], rtol=a["gap"] + b["gap"] + 2e-6)


def without_labels(table, *labels):
    return [row for row in table.to_pylist() if row["label_id"] not in labels]


def test_the_first_lane_leaves_nothing_out_unless_one_fold_is_held():
    assert left_out(3) == [None, 0, 1, 2]
    assert left_out(15) == [None, *range(15)]
    assert left_out(0) == [0]


def test_groups_are_sixteen_labels_that_follow_one_another_or_fewer():
    assert groups(range(40), 100) == [list(range(16)), list(range(16, 32)), list(range(32, 40))]
    assert groups([9, 4, 7], 2) == [[9, 4], [7]]
    assert groups([], 5) == []


def test_lanes_of_a_group_are_gold_inside_the_rows_that_take_part():
    _, Y, fold = problem(L=5)
    cfg = TrainConfig(C=3.0, loss="squared_hinge")
    extras = Extras(np.arange(5, dtype=np.uint64), np.arange(1.0, 6.0), np.arange(1.0, 6.0) / 10)
    for inside in (np.ones(len(fold), bool), fold != 1):
        found = group_lanes([4, 1], gold_of(Y, fold), cfg, extras, Candidate(3.0, 2.0), inside)
        sign = found.sign.reshape(-1, LANES)
        assert sign.dtype == np.int8
        for j, label_id in enumerate((4, 1)):
            assert_array_equal(sign[:, j], np.where(Y[:, label_id], 1, -1) * inside)
        assert_array_equal(sign[:, 2:], 0)
        assert_allclose(found.c_pos[:2], [3 * 5 * 2, 3 * 2 * 2])
        assert_allclose(found.c_neg[:2], [3 * 0.5, 3 * 0.2])
        assert (found.c_pos > 0).all() and (found.c_neg > 0).all()
        assert found.loss == lockstep.SQUARED_HINGE


@pytest.mark.parametrize("loss", ["logistic", "squared_hinge"])
def test_models_are_the_optimum_of_each_label(loss):
    X, Y, fold = problem(L=4)
    dense, c = with_bias(X), np.full(len(X), TIGHT["C"])
    for row in models(X, Y, fold, loss=loss):
        y = np.where(Y[:, row["label_id"]], 1, -1)
        best = objective(dense, y, c, optimum(dense, y, c, loss), loss)
        assert row["status"] == "ok"
        assert_allclose(row["objective"], objective(dense, y, c, dense_model(row, X.shape[1]), loss), rtol=1e-6)
        assert best * (1 - 1e-6) <= row["objective"] <= best * (1 + TIGHT["gap"])
        assert -1e-6 <= row["gap"] <= row["solver_gap"] <= TIGHT["gap"]
        assert (row["C"], row["positive_weight"]) == (TIGHT["C"], 1.0)


def out_of_fold_scores(X, Y, fold, label_id, folds, loss="logistic", weight=lambda y: np.ones(y.shape)):
    """Each fold scored by an optimum over the rows outside it; weight(y) are factors of C of the rows trained on."""
    dense, y = with_bias(X), np.where(Y[:, label_id], 1, -1)
    S = np.full(X.shape[0], np.nan)
    for f in folds:
        seen = fold != f
        w = optimum(dense[seen], y[seen], TIGHT["C"] * weight(y[seen]), loss)
        S[~seen] = dense[~seen] @ w
    return S


def assert_curve_is_of(row, S, positive):
    """A cut that no score is near: the counts above it must be the same for both solutions."""
    for cut, tp, fp in zip(row["cut"], row["tp"], row["fp"], strict=True):
        if np.abs(S - cut).min() > 0.02:
            assert (tp, fp) == counts_at(S, positive, cut)
    assert abs(len(row["cut"]) - np.unique(S[positive]).size) <= 1
    assert row["tp"][-1] == row["positives"]


@pytest.mark.parametrize("folds", [0, 2, 3, 5, 7, 15])
@pytest.mark.parametrize("loss", ["logistic", "squared_hinge"])
def test_curves_are_of_scores_by_the_model_that_left_the_fold_out(folds, loss):
    X, Y, fold = problem(n=60, L=3, folds=folds)
    tables = fit(X, Y, fold, folds=folds, gap=1e-5, loss=loss)
    curves = by_key(tables["curves"], "label_id", "fold")
    held = range(folds) if folds else [0]
    assert set(curves) == {(j, f) for j in range(3) for f in (POOLED, *held)}
    for j in range(3):
        S = out_of_fold_scores(X, Y, fold, j, held, loss)
        for f in (POOLED, *held):
            inside = (fold == f) if f != POOLED else ~np.isnan(S)
            assert_curve_is_of(curves[j, f], S[inside], Y[inside, j])


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


# -- labels that are not solved ----------------------------------------------------------------------------------------


def test_a_label_on_no_row_or_on_every_row_has_a_constant_model():
    X, Y, fold = problem(L=5)
    Y[:, 1], Y[:, 3] = False, True
    tables = fit(X, Y, fold)
    found = tables["label_models"].to_pylist()
    assert [m["status"] for m in found] == ["ok", "no_positives", "ok", "no_negatives", "ok"]
    for label_id, sign in ((1, -1), (3, 1)):
        assert_allclose(found[label_id]["bias"], sign * np.log(120.5 / 0.5), rtol=1e-6)
        assert (found[label_id]["indices"], found[label_id]["weights"]) == ([], [])
    for name in ("curves", "histograms"):
        assert set(tables[name]["label_id"].to_pylist()) == {0, 2, 4}


def test_with_folds_0_only_the_rows_trained_on_decide_whether_a_model_is_constant():
    X, Y, fold = problem(L=3, folds=0)
    Y[:, 0] &= fold == 0
    Y[:, 1] |= fold == 1
    found = models(X, Y, fold, folds=0)
    assert [m["status"] for m in found] == ["no_positives", "no_negatives", "ok"]
    assert_allclose([m["bias"] for m in found[:2]], [-np.log(60.5 / 0.5), np.log(60.5 / 0.5)], rtol=1e-6)


def test_a_label_whose_positives_are_not_in_the_sample_of_rows_has_a_constant_model():
    X, Y, fold = problem(L=2)
    inside = lanes.sample(len(X), np.uint64(0), 0.5)
    Y[:, 0] &= ~inside
    found = models(X, Y, fold, sample=0.5)
    assert [m["status"] for m in found] == ["no_positives", "ok"]
    assert_allclose(found[0]["bias"], -np.log((inside.sum() + 0.5) / 0.5), rtol=1e-6)


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
    S = with_bias(X) @ dense_model(tables["label_models"].to_pylist()[0], X.shape[1])
    assert S[fold != 0].max() < 0


@pytest.mark.filterwarnings("error")
def test_a_fold_that_holds_every_row_leaves_its_model_without_rows():
    X, Y, fold = problem(L=2)
    tables = fit(X, Y, fold * 0)
    assert tables["label_models"]["status"].to_pylist() == ["ok", "ok"]
    for row in tables["histograms"].to_pylist():
        assert row["bin"] == ([] if row["fold"] > 0 else [MIDDLE])  # a model that saw nothing scores 0


def test_labels_left_when_the_time_is_over_have_their_base_rate_and_a_status():
    X, Y, fold = problem(L=10)
    want, asked, told = fit(X, Y, fold, labels_per_block=4), [], []

    def over():
        asked.append(1)
        return len(asked) > 2

    hooks = {"over": over, "after_group": lambda group, seconds: told.append((group, seconds >= 0))}
    found = fit(X, Y, fold, hooks=hooks, labels_per_block=4)
    assert len(asked) == 3
    assert told == [([0, 1, 2, 3], True), ([4, 5, 6, 7], True), ([8, 9], True)]
    for name in found:
        assert without_labels(found[name], 8, 9) == without_labels(want[name], 8, 9)
    for label_id, row in enumerate(found["label_models"].to_pylist()[8:], 8):
        share = Y[:, label_id].sum()
        assert row["status"] == "out_of_time"
        assert row["bias"] == pytest.approx(np.log((share + 0.5) / (len(Y) - share + 0.5)), rel=1e-5)
        assert (row["indices"], row["weights"]) == ([], [])
    assert not {8, 9} & {*found["curves"]["label_id"].to_pylist(), *found["histograms"]["label_id"].to_pylist()}


def test_progress_is_told_once_a_group_with_every_label_in_it():
    X, Y, fold = problem(L=9)
    Y[:, [2, 4, 5, 6, 7]] = False
    told = []
    fit(X, Y, fold, hooks={"after_group": lambda group, seconds: told.extend(group)}, labels_per_block=4)
    assert told == list(range(9))


def test_a_block_that_failed_has_base_rates_and_the_cause():
    _, Y, fold = problem(L=5)
    tables = failed_block([4, 1], gold_of(Y, fold), "OSError: disk")
    assert {name: table.schema for name, table in tables.items()} == {
        **{name: TABLES[name].schema for name in ("label_models", "curves", "histograms")},
        "suspicious": SUSPICIOUS,
    }
    assert tables["curves"].num_rows == tables["histograms"].num_rows == tables["suspicious"].num_rows == 0
    rows = tables["label_models"].to_pylist()
    assert [row["label_id"] for row in rows] == [1, 4]
    for row in rows:
        share = Y[:, row["label_id"]].sum()
        assert row["status"] == "failed: OSError: disk"
        assert row["bias"] == pytest.approx(np.log((share + 0.5) / (len(Y) - share + 0.5)), rel=1e-6)


def test_constant_rows_are_smoothed_base_rates():
    table = constant_rows([2, 0], np.array([3, 9, 0]), 10, "left out")
    assert table.schema == TABLES["label_models"].schema
    assert table["label_id"].to_pylist() == [0, 2]
    assert_allclose(table["bias"].to_pylist(), np.log([3.5 / 7.5, 0.5 / 10.5]), rtol=1e-6)
    assert table["status"].to_pylist() == ["left out"] * 2


# -- company -----------------------------------------------------------------------------------------------------------


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
            if label_id != 6:
                assert_same_model(row, other, X.shape[1])


def test_other_groups_of_the_block_change_no_bit():
    X, Y, fold = problem(L=10)
    Y[:, 6] = False
    whole = fit(X, Y, fold, labels_per_block=4)
    first, second = (fit(X, Y, fold, part, labels_per_block=4) for part in ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9]))
    turned = fit(X, Y, fold, [8, 9, *range(4)], labels_per_block=4)  # other groups: 8 9 0 1, 2 3
    for name in whole:
        assert whole[name].equals(pa.concat_tables([first[name], second[name]]))
    assert not turned["label_models"].slice(0, 4).equals(first["label_models"])


def test_the_same_block_gives_the_same_bytes():
    X, Y, fold = problem()
    a, b = fit(X, Y, fold), fit(X, Y, fold)
    assert all(a[name].equals(b[name]) for name in a)
    assert not fit(X, Y, fold, seed=1)["label_models"].equals(a["label_models"])


def test_a_label_that_is_not_solved_in_time_says_so():
    X, Y, fold = problem()
    tables = fit(X, Y, fold, max_epochs=2, gap=1e-6)
    found = tables["label_models"].to_pylist()
    assert {m["status"] for m in found} == {"not_converged"}
    assert {m["epochs"] for m in found} == {2}
    assert min(m["gap"] for m in found) > 1e-6
    assert len(by_key(tables["curves"], "label_id", "fold")) == 4 * Y.shape[1]


def test_a_label_is_not_converged_where_only_a_fold_is_not(monkeypatch):
    X, Y, fold = problem(L=3)
    solve, calls = lockstep.solve, []

    def slow_in_a_fold(*args):
        solution, _ = solve(*args), calls.append(args)
        return solution._replace(gap=solution.gap + (len(calls) == 3) * np.eye(LANES)[1] * solution.primal)

    monkeypatch.setattr(ovr.lockstep, "solve", slow_in_a_fold)
    found = models(X, Y, fold)
    assert [m["status"] for m in found] == ["ok", "not_converged", "ok"]
    assert [m["solver_gap"] > 1 for m in found] == [False, True, False]
    assert max(m["gap"] for m in found) <= TIGHT["gap"]


@pytest.mark.parametrize("loss", ["logistic", "squared_hinge"])
def test_pruning_drops_weights_and_reports_the_objective_of_those_kept(loss):
    X, Y, fold = problem(L=4)
    full, pruned = (models(X, Y, fold, prune=share, loss=loss) for share in (0.0, 0.02))
    assert sum(len(m["indices"]) for m in pruned) < sum(len(m["indices"]) for m in full)
    for before, after in zip(full, pruned, strict=True):
        assert set(after["indices"]) <= set(before["indices"])
        assert after["bias"] == before["bias"]
        assert before["objective"] <= after["objective"] <= before["objective"] * 1.02
        y = np.where(Y[:, after["label_id"]], 1, -1)
        want = objective(with_bias(X), y, np.full(y.size, TIGHT["C"]), dense_model(after, X.shape[1]), loss)
        assert_allclose(after["objective"], want, rtol=1e-6)
        # the dual objective did not move: what pruning costs is gap
        dual = [m["objective"] * (1 - m["gap"]) for m in (before, after)]
        assert_allclose(dual[1], dual[0], rtol=1e-6)
        assert after["gap"] > before["gap"]
        assert after["solver_gap"] == before["solver_gap"]
        assert after["status"] == "ok"


def test_fold_models_are_pruned_with_the_cut_of_the_final_one(monkeypatch):
    """Their scores stand for those of the model that is kept."""
    X, Y, fold = problem(L=2)
    solve, solutions = lockstep.solve, []
    prune, cuts = pruning.prune, []
    monkeypatch.setattr(ovr.lockstep, "solve", lambda *args: solutions.append(solve(*args)) or solutions[-1])
    monkeypatch.setattr(ovr.pruning, "prune", lambda *args: cuts.append(prune(*args)) or cuts[-1])
    tables = fit(X, Y, fold, prune=0.05)
    assert len(cuts) == 1
    assert (cuts[0].cuts[:2] > 0).all()
    for f, solution in enumerate(solutions[1:]):
        for j in range(2):
            w = solution.W.reshape(-1, LANES)[:, j]
            kept = np.where(np.abs(w) < cuts[0].cuts[j], 0, w)
            assert (kept != w).any()
            kept[-1] = w[-1]
            S = (with_bias(X) @ kept)[fold == f]
            row = by_key(tables["curves"], "label_id", "fold")[j, f]
            for cut, tp, fp in zip(row["cut"], row["tp"], row["fp"], strict=True):
                if np.abs(S - cut).min() > 1e-5:
                    assert (tp, fp) == counts_at(S, Y[fold == f, j], cut)


# -- weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["logistic", "squared_hinge"])
@pytest.mark.parametrize("weight", [4.0, 0.25, "balanced"])
def test_positive_weight_is_scikit_learns_class_weight(weight, loss):
    X, Y, fold = problem(L=3)
    Y[::2, 2] = False
    tables = fit(X, Y, fold, positive_weight=weight, loss=loss, gap=1e-5)
    curves = by_key(tables["curves"], "label_id", "fold")
    for row in tables["label_models"].to_pylist():
        j = row["label_id"]
        common = {
            "C": TIGHT["C"],
            "class_weight": weight if weight == "balanced" else {True: weight, False: 1},
            **{"dual": True, "fit_intercept": False, "tol": 1e-9, "max_iter": 1_000_000, "random_state": 0},
        }
        if loss == "logistic":
            model = LogisticRegression(solver="liblinear", **common)
        else:
            model = LinearSVC(loss="squared_hinge", **common)
        want = model.fit(with_bias(X), Y[:, j]).coef_[0]
        assert_allclose(dense_model(row, X.shape[1]), want, rtol=0, atol=0.02)
        share = Y[:, j].mean()
        assert row["positive_weight"] == pytest.approx((1 - share) / share if weight == "balanced" else weight)

        def factors(y):  # balanced: by the rows that the fold's model sees
            positive, negative = (y.size / (2 * np.sum(y == s)) if weight == "balanced" else 1.0 for s in (1, -1))
            return np.where(y > 0, positive if weight == "balanced" else weight, negative)

        S = out_of_fold_scores(X, Y, fold, j, range(3), loss, factors)
        assert_curve_is_of(curves[j, POOLED], S, Y[:, j])


def test_weights_of_a_label_are_factors_of_C():
    X, Y, fold = problem(L=4)
    extras = Extras(np.arange(4, dtype=np.uint64), np.array([1, 3, 1, 0.5]), np.array([1, 1, 0.2, 4]))
    found, plain = models(X, Y, fold, extras=extras, positive_weight=2.0), models(X, Y, fold, positive_weight=2.0)
    assert_same_model(found[0], plain[0], X.shape[1])
    dense = with_bias(X)
    for j, row in enumerate(found):
        y = np.where(Y[:, j], 1, -1)
        c = TIGHT["C"] * np.where(y > 0, 2 * extras.positive[j], extras.negative[j])
        best = objective(dense, y, c, optimum(dense, y, c))
        assert_allclose(row["objective"], best, rtol=TIGHT["gap"] + 1e-6)
        assert_allclose(objective(dense, y, c, dense_model(row, X.shape[1])), best, rtol=TIGHT["gap"] + 1e-6)
        assert (row["C"], row["positive_weight"]) == (TIGHT["C"], 2.0)  # those chosen, without the label's own


# -- choice ------------------------------------------------------------------------------------------------------------


def independent_log_loss(tables, label_id):
    """Platt's map by a general minimiser, on the pooled histogram; nats a row."""
    row = by_key(tables["histograms"], "label_id", "fold")[label_id, POOLED]
    s = bin_centres()[row["bin"]]
    p, n = np.float64(row["positives"]), np.float64(row["negatives"])
    high, low = (p.sum() + 1) / (p.sum() + 2), 1 / (n.sum() + 2)

    def loss(theta, high, low):
        z = theta[0] * s + theta[1]
        return (p * (np.logaddexp(0, z) - high * z) + n * (np.logaddexp(0, z) - low * z)).sum()

    start = minimize(loss, [1.0, 0.0], (high, low), method="BFGS").x
    found = minimize(loss, start, (high, low), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    theta = found.x
    if theta[0] < MIN_SLOPE:  # a label whose out-of-fold scores are upside down
        flat = minimize(
            lambda b: loss((MIN_SLOPE, b[0]), high, low), [0.0], method="Nelder-Mead", options={"xatol": 1e-9}
        )
        theta = (MIN_SLOPE, flat.x[0])
    return loss(theta, 1, 0) / (p.sum() + n.sum())


def independent_f1_loss(tables, label_id):
    row = by_key(tables["curves"], "label_id", "fold")[label_id, POOLED]
    ratios = [
        (2 * tp + 1) / (2 * tp + fp + (row["positives"] - tp) + 2) for tp, fp in zip(row["tp"], row["fp"], strict=True)
    ]
    return 1 - max(ratios)


@pytest.mark.parametrize("loss", ["logistic", "squared_hinge"])
@pytest.mark.parametrize(
    ("choose", "quality"), [("log_loss", independent_log_loss), ("f1", independent_f1_loss)], ids=["log_loss", "f1"]
)
def test_each_label_has_the_candidate_of_best_out_of_fold_quality(choose, quality, loss):
    X, Y, fold = problem(L=11, seed=2)
    grid = [(C, weight) for C in (0.3, 3.0, 30.0) for weight in (1.0, 8.0)]
    settings = {"loss": loss, "labels_per_block": 8, "prune": 1e-3}
    single = [fit(X, Y, fold, C=C, positive_weight=weight, **settings) for C, weight in grid]
    tables = fit(X, Y, fold, C=[30.0, 0.3, 3.0], positive_weight=[1, 8], choose=choose, **settings)
    chosen = []
    for row in tables["label_models"].to_pylist():
        j = row["label_id"]
        scores = np.array([quality(alone, j) for alone in single])
        number = grid.index((row["C"], row["positive_weight"]))
        assert scores[number] <= scores.min() + 1e-7
        if (np.abs(scores - scores.min()) < 1e-7).sum() > 1 and choose == "f1":
            assert number == np.argmin(scores)  # the smallest C of equals
        # the rows of the label are those of the candidate alone, to the bit
        for name in tables:
            key = TABLES[name].key
            alone = {k: v for k, v in by_key(single[number][name], *key).items() if k[0] == j}
            assert {k: v for k, v in by_key(tables[name], *key).items() if k[0] == j} == alone
        chosen.append(number)
    assert len(set(chosen)) > 1  # a choice by label, not one for all


def test_candidates_are_all_combinations_smallest_C_first():
    assert candidates(TrainConfig(C=[10, 1], positive_weight=[3, 1])) == [(1, 1), (1, 3), (10, 1), (10, 3)]
    assert candidates(TrainConfig(C=2.0, positive_weight="balanced")) == [(2, None)]


def test_balanced_weights_go_with_a_choice_of_C():
    X, Y, fold = problem(L=5, seed=2)
    single = [fit(X, Y, fold, C=C, positive_weight="balanced")["label_models"].to_pylist() for C in (0.3, 30.0)]
    for row in models(X, Y, fold, C=[0.3, 30.0], positive_weight="balanced"):
        assert row in [alone[row["label_id"]] for alone in single]


def test_the_log_loss_of_a_choice_is_that_after_calibration():
    rng = np.random.default_rng(0)
    positive = rng.random(5000) < 0.3
    scores = (rng.normal(size=5000) + 2 * positive).astype(np.float32)
    plain = calibrated_log_loss(scores, positive)
    assert_allclose(calibrated_log_loss(scores * 2 - 1, positive), plain, rtol=2e-3)  # a map that Platt's undoes
    assert calibrated_log_loss(rng.normal(size=5000).astype(np.float32), positive) > plain + 0.1
    rate = positive.mean()
    flat = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    assert_allclose(calibrated_log_loss(np.zeros(5000, np.float32), positive), flat, rtol=1e-3)


def test_the_f1_of_a_choice_is_the_best_of_any_cut_smoothed():
    rng = np.random.default_rng(0)
    positive = rng.random(300) < 0.3
    scores = np.round(rng.normal(size=300) + 2 * positive, 1).astype(np.float32)
    # smoothing is one more row that is found, and one more that is not
    padded = np.append(scores, [100, 100]), np.append(positive, [True, False])
    assert abs((1 - best_f1_loss(scores, positive)) - best_f1(scores, positive)) < 0.01
    ratios = []
    for cut in set(scores):
        tp, fp = counts_at(scores, positive, cut)
        ratios.append((2 * tp + 1) / (2 * tp + fp + positive.sum() - tp + 2))
    assert best_f1_loss(scores, positive) == pytest.approx(1 - max(ratios), rel=1e-12)
    assert best_f1_loss(*padded) != best_f1_loss(scores, positive)
    assert best_f1_loss(scores, np.zeros(300, bool)) == 1.0


# -- samples -----------------------------------------------------------------------------------------------------------


def many(n=6000, L=3, seed=0):
    """Rows enough that a sample of the negatives leaves most of them out."""
    rng = np.random.default_rng(seed)
    X = (rng.random((n, 60)) < 0.1) * rng.uniform(0.5, 1, (n, 60))
    X /= np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-9)
    S = X @ rng.normal(size=(60, L)) * 2 + rng.logistic(size=(n, L)) * 0.3
    Y = np.quantile(S, [0.98, 0.9, 0.6][:L], axis=0).diagonal() < S
    return X, Y, np.arange(n) % 2


def test_sampled_negatives_stand_for_all():
    X, Y, fold = many()
    cfg, extras = TrainConfig(C=2.0, negatives=3.0, seed=5), Extras.plain(3)
    for inside in (np.ones(len(X), bool), fold == 1):
        found = group_lanes([0, 1, 2], gold_of(Y, fold), cfg, extras, Candidate(2.0, 1.0), inside)
        sign = found.sign.reshape(-1, LANES)
        for j in range(3):
            positives, negatives = (Y[:, j] & inside).sum(), (~Y[:, j] & inside).sum()
            assert_array_equal(sign[:, j] > 0, Y[:, j] & inside)
            drawn = (sign[:, j] < 0).sum()
            wanted = min(max(3 * positives, LEAST_NEGATIVES), negatives)
            assert abs(drawn - wanted) <= 4.5 * np.sqrt(wanted)
            assert (drawn == negatives) == (wanted == negatives)
            # a sum over those drawn is right for all: their C adds up to that of all negatives
            assert_allclose(drawn * found.c_neg[j], 2.0 * negatives, rtol=1e-6)
            assert found.c_pos[j] == 2.0
    assert 3 * Y[:, 0].sum() < LEAST_NEGATIVES  # the floor is seen
    assert 3 * Y[:, 1].sum() > LEAST_NEGATIVES  # and the share
    assert 3 * Y[:, 2].sum() > (~Y[:, 2]).sum()  # and all of them


def test_a_model_of_sampled_negatives_is_close_to_the_full_one():
    X, Y, fold = many()
    full, drawn = (models(X, Y, fold, folds=2, negatives=k, gap=1e-3) for k in (0, 3.0))
    dense = with_bias(X)
    for j in range(2):
        y, c = np.where(Y[:, j], 1, -1), np.full(len(X), TIGHT["C"])
        best = objective(dense, y, c, dense_model(full[j], 60))
        found = objective(dense, y, c, dense_model(drawn[j], 60))
        assert best * 1.0001 < found < best * 1.1
        assert_allclose(drawn[j]["objective"], best, rtol=0.15)  # an estimate of it, from those drawn
    assert_same_model(drawn[2], full[2], 60)  # nothing is left out there


def test_draws_follow_the_key_of_a_label_and_not_its_id():
    X, Y, fold = many()
    keys = np.array([11, 2**63 + 5, 7], np.uint64)
    extras = Extras(keys, np.ones(3), np.ones(3))
    settings = {"folds": 2, "negatives": 3.0, "gap": 1e-2}
    first = models(X, Y, fold, extras=extras, **settings)
    assert first == models(X, Y, fold, extras=extras, **settings)
    turn = [2, 0, 1]
    turned = models(X, Y[:, turn], fold, extras=extras._replace(keys=keys[turn]), **settings)
    for j, row in enumerate(turned):
        assert {**row, "label_id": turn[j]} == first[turn[j]]
    others = models(X, Y, fold, extras=extras._replace(keys=keys + np.uint64(1)), **settings)
    assert others[0]["weights"] != first[0]["weights"]
    assert models(X, Y, fold, extras=extras, seed=1, **settings)[0]["weights"] != first[0]["weights"]


@pytest.mark.parametrize("seed", [0, 3])
def test_a_sample_of_rows_is_the_same_as_deleting_the_others(seed):
    X, Y, fold = problem(n=300)
    inside = lanes.sample(300, np.uint64(seed), 0.6)
    assert 120 < inside.sum() < 240
    sampled, deleted = (
        fit(X, Y, fold, sample=0.6, seed=seed),
        fit(X[inside], Y[inside], fold[inside], seed=seed),
    )
    assert sampled["label_models"].equals(deleted["label_models"])
    # every row is scored out of fold, in the sample or not: the curve is of all documents
    for (j, f), row in by_key(sampled["curves"], "label_id", "fold").items():
        seen = (fold == f) | (f == POOLED)
        assert (row["positives"], row["negatives"]) == (Y[seen, j].sum(), (~Y[seen, j]).sum())


# -- warm start --------------------------------------------------------------------------------------------------------


def start_of(rows, L, known):
    """Rows of label_models -> Start, of the labels that are known."""
    found = {row["label_id"]: row for row in rows if row["label_id"] in known}
    lengths = [len(found[j]["indices"]) if j in found else 0 for j in range(L)]
    parts = [(np.array(found[j]["indices"]), np.array(found[j]["weights"])) for j in range(L) if j in found]
    return Start(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate([k for k, _ in parts]).astype(np.int32),
        np.concatenate([w for _, w in parts]).astype(np.float32),
        np.array([found[j]["bias"] if j in found else np.nan for j in range(L)], np.float32),
    )


def test_earlier_weights_of_a_group_stand_in_its_lanes():
    X, Y, fold = problem(L=5)
    rows = models(X, Y, fold)
    W = start_of(rows, 5, {1, 4}).weights_of([4, 0, 1], X.shape[1]).reshape(-1, LANES)
    assert W.dtype == np.float32
    for lane, label_id in ((0, 4), (2, 1)):
        assert_array_equal(W[:, lane], np.float32(dense_model(rows[label_id], X.shape[1])))
    assert np.isnan(W[-1, [1, *range(3, LANES)]]).all()
    assert_array_equal(W[:-1, [1, *range(3, LANES)]], 0)


@pytest.mark.parametrize("known", [range(11), [0, 7]])
def test_a_warm_start_reaches_the_same_answer(known, monkeypatch):
    monkeypatch.setattr(lockstep, "START_ROWS", 1)  # small problems start from zero by themselves
    X, Y, fold = problem()
    moved = Y ^ (np.random.default_rng(0).random(Y.shape) < 0.02)  # the gold of yesterday
    start = start_of(models(X, moved, fold), 11, set(known))
    cold, warm = fit(X, Y, fold), fit(X, Y, fold, start=start)
    assert not warm["label_models"].equals(cold["label_models"])
    for a, b in zip(warm["label_models"].to_pylist(), cold["label_models"].to_pylist(), strict=True):
        assert_same_model(a, b, X.shape[1])
    for count in ("positives", "negatives"):
        assert warm["curves"][count].equals(cold["curves"][count])


def test_earlier_models_are_lanes_of_their_own_label(monkeypatch):
    """Constant labels are left out of a group; the lanes after them must not get the wrong weights."""
    X, Y, fold = problem(L=4)
    rows = models(X, Y, fold)
    Y[:, 1] = False
    seen, solve = [], lockstep.solve
    monkeypatch.setattr(ovr.lockstep, "solve", lambda *args: seen.append(args[-1]) or solve(*args))
    fit(X, Y, fold, start=start_of(rows, 4, range(4)))
    assert len(seen) == 4
    for earlier in seen:
        for lane, label_id in enumerate((0, 2, 3)):
            want = np.float32(dense_model(rows[label_id], X.shape[1]))
            assert_array_equal(earlier.reshape(-1, LANES)[:, lane], want)


# -- failures ----------------------------------------------------------------------------------------------------------


def out_of_memory(solution, lane):
    raise MemoryError("no room")


def not_a_number(solution, lane):
    primal = solution.primal.copy()
    primal[lane] = np.nan
    return solution._replace(primal=primal)


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (out_of_memory, "failed: MemoryError: no room"),
        (not_a_number, "failed: ArithmeticError: the weights are not fini"),
    ],
)
def test_a_label_that_fails_costs_only_itself(monkeypatch, caplog, failure, status):
    X, Y, fold = problem(L=10)
    Y[:, 9] = False
    bad, mark = 5, 50
    Y[mark] = np.arange(10) == bad  # by this row the label is known in its group
    want = fit(X, Y, fold, labels_per_block=4)
    solve, calls = lockstep.solve, []

    def failing(X, problem, *args):
        calls.append(args)
        lane = np.flatnonzero(problem.sign.reshape(-1, LANES)[mark] > 0)
        solution = solve(X, problem, *args)
        return failure(solution, lane[0]) if lane.size else solution

    monkeypatch.setattr(ovr.lockstep, "solve", failing)
    with caplog.at_level(logging.WARNING):
        found = fit(X, Y, fold, labels_per_block=4)
    # two whole groups, one that ends at its first lane, and its four labels one by one, of which one ends at once
    assert len(calls) == 2 * 4 + 1 + 3 * 4 + 1
    assert "labels [4, 5, 6, 7] failed together" in caplog.text
    for row, good in zip(found["label_models"].to_pylist(), want["label_models"].to_pylist(), strict=True):
        label_id = row["label_id"]
        if label_id == bad:
            assert row["status"].startswith(status)
            share = Y[:, bad].sum()
            assert row["bias"] == pytest.approx(np.log((share + 0.5) / (len(Y) - share + 0.5)), rel=1e-5)
            assert (row["indices"], row["weights"]) == ([], [])
        elif 4 <= label_id < 8:
            assert_same_model(row, good, X.shape[1])
        else:
            assert row == good
    for name in ("curves", "histograms"):
        assert without_labels(found[name], 4, 5, 6, 7) == without_labels(want[name], 4, 5, 6, 7)
        keys = set(by_key(want[name], "label_id", "fold"))
        assert set(by_key(found[name], "label_id", "fold")) == {k for k in keys if k[0] != bad}


@pytest.mark.parametrize("value", [3e38, np.inf, np.nan])
def test_features_too_large_for_float32_are_a_failure_not_a_model(value):
    X, Y, fold = problem(L=2)
    X[5] = value
    with np.errstate(all="ignore"):
        found = models(X, Y, fold)
    assert all(m["status"].startswith("failed: ArithmeticError") for m in found)


def test_kernels_are_compiled_once_a_process(tmp_path, monkeypatch):
    monkeypatch.setattr(ovr, "_warm", [])
    calls, fit_block = [], ovr.fit_block
    monkeypatch.setattr(ovr, "fit_block", lambda *args: calls.append(fit_block(*args)))
    assert ovr.warm_up(tmp_path, TrainConfig()) > 0
    assert ovr.warm_up(tmp_path, TrainConfig()) == 0
    assert [table["status"].to_pylist()[0] for table in (calls[0]["label_models"],)] != ["no_positives"]
    assert len(calls) == 1


# -- doubtful gold -----------------------------------------------------------------------------------------------------


def counts_of(scores, positive):
    return bin_centres(), *histogram(scores, positive)


def doubts_slowly(scores, positive, rows, most):
    """Most doubtful first, by the whole list of rows."""
    a, b = platt(bin_centres(), *(c.astype(float) for c in histogram(scores, positive)))
    p = 1 / (1 + np.exp(-(a * scores.astype(float) + b)))
    share = positive.mean()
    against = p / share * (1 - share) / (1 - p)  # how much more often positives have such a score than negatives
    found = []
    for kind, doubt, mine in (("missing", p, ~positive), ("wrong", 1 / (1 + against), positive)):
        order = sorted(np.flatnonzero(mine), key=lambda i: (-doubt[i], rows[i]))
        found += [(kind, int(rows[i]), p[i], doubt[i]) for i in order[:most] if doubt[i] > 0.5]
    return found


@pytest.mark.parametrize("most", [1, 3, 500])
@pytest.mark.parametrize("seed", range(4))
def test_doubts_are_the_rows_whose_gold_is_least_credible(seed, most):
    rng = np.random.default_rng(seed)
    positive = rng.random(300) < 0.3
    scores = np.round(rng.normal(np.where(positive, 1, -1), 1.2), 1).astype(np.float32)  # with ties
    rows = np.sort(rng.choice(1000, 300, replace=False))
    found = suspicious(7, scores, positive, rows, counts_of(scores, positive), most)
    expected = doubts_slowly(scores, positive, rows, most)
    assert [(f["kind"], f["row"]) for f in found] == [(kind, row) for kind, row, *_ in expected]
    assert_allclose([f["probability"] for f in found], [p for *_, p, _ in expected], rtol=1e-6)
    assert_allclose([f["doubt"] for f in found], [doubt for *_, doubt in expected], rtol=1e-6)
    assert all(f["label_id"] == 7 and f["doubt"] > 0.5 for f in found)
    assert {f["kind"] for f in found} == {"missing", "wrong"}
    by_row = dict(zip(rows.tolist(), scores.tolist(), strict=True))
    assert all(f["score"] == by_row[f["row"]] for f in found)


def test_scores_that_agree_with_gold_are_not_doubted():
    positive = np.arange(100) < 30
    scores = np.where(positive, 2, -2).astype(np.float32)
    assert suspicious(0, scores, positive, np.arange(100), counts_of(scores, positive), 3) == []


@pytest.mark.parametrize("positive", [np.zeros(100, bool), np.ones(100, bool)])
def test_gold_of_one_kind_is_not_doubted(positive):
    scores = np.linspace(-3, 3, 100).astype(np.float32)
    assert suspicious(0, scores, positive, np.arange(100), counts_of(scores, positive), 3) == []


def test_a_positive_that_is_merely_rare_is_not_doubted():
    """Its probability is small, but larger than that of other documents."""
    scores = np.linspace(-1.2, -0.9, 10_000).astype(np.float32)
    positive = np.arange(10_000) == 9_000
    assert suspicious(0, scores, positive, np.arange(10_000), counts_of(scores, positive), 3) == []


def mistaken(n=300, L=3, errors=2, folds=3):
    """A separable problem, and its gold with `errors` taken from each label and as many added."""
    rng = np.random.default_rng(5)
    X = rng.random((n, 4 * L)) * 0.2
    Y = rng.random((n, L)) < 0.4
    X[:, :L] += Y
    X[:, -1] = 1  # so that unit length changes little
    fold = rng.integers(0, folds, n)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    wrong, planted = Y.copy(), set()
    for j in range(L):
        for kind, rows in (("missing", np.flatnonzero(Y[:, j])), ("wrong", np.flatnonzero(~Y[:, j]))):
            for row in rng.choice(rows, errors, replace=False):
                wrong[row, j] ^= True
                planted.add((j, kind, int(row)))
    return X, Y, wrong, fold, planted


def told_of(table):
    return {(r["label_id"], r["kind"], r["row"]) for r in table.to_pylist()}


@pytest.mark.parametrize("loss", ["logistic", "squared_hinge"])
def test_planted_errors_of_gold_are_found(loss):
    X, Y, wrong, fold, planted = mistaken()
    assert told_of(fit(X, wrong, fold, suspicious=2, loss=loss, C=1.0)["suspicious"]) == planted
    assert told_of(fit(X, Y, fold, suspicious=2, loss=loss, C=1.0)["suspicious"]) == set()


def test_doubts_are_out_of_fold():
    # features of their own, by which a model that saw a row would believe any gold of it
    X, _, wrong, fold, planted = mistaken()
    own = np.hstack([X, 3 * np.eye(len(X))])
    assert planted <= told_of(fit(own, wrong, fold, suspicious=20, C=100.0)["suspicious"])


def test_with_folds_0_only_rows_held_out_are_doubted():
    X, _, wrong, fold, planted = mistaken()
    held = told_of(fit(X, wrong, fold, folds=0, suspicious=5, C=1.0)["suspicious"])
    assert held
    assert {row for *_, row in held} <= set(np.flatnonzero(fold == 0))
    assert {p for p in planted if fold[p[2]] == 0} <= held


def test_none_are_kept_where_none_are_asked_for():
    X, _, wrong, fold, _ = mistaken()
    table = fit(X, wrong, fold, suspicious=0)["suspicious"]
    assert (table.num_rows, table.schema) == (0, SUSPICIOUS)


def test_doubts_are_in_the_order_of_their_key_and_those_of_a_label_alone():
    X, _, wrong, fold, _ = mistaken()
    whole = fit(X, wrong, fold, C=1.0)["suspicious"]
    keys = [(r["label_id"], r["row"]) for r in whole.to_pylist()]
    assert keys == sorted(set(keys))
    alone = fit(X, wrong, fold, labels=[1], C=1.0)["suspicious"]
    assert told_of(alone) == {t for t in told_of(whole) if t[0] == 1}
