import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit

from pipeline.config import CalibrateConfig
from pipeline.kernels.curves import curve, histogram
from pipeline.kernels.thresholds import global_cut
from pipeline.learners.decide import (
    GUARDS,
    choose,
    curves_of,
    decide,
    evidence,
    forecast,
    histograms_of,
    nested,
    side_by_side,
)
from pipeline.learners.ovr import POOLED
from pipeline.learners.tagger import Decisions
from pipeline.tables import TABLES
from tests.reference import best_f1, counts_at

UNGUARDED = CalibrateConfig(guard="none", micro=0, pooling=0)


def tables_of(S, Y, fold, known=None):
    """Scores (n, L), gold (n, L), fold (n,) -> tables curves and histograms; labels outside `known` have no rows."""
    curve_rows, histogram_rows = [], []
    for label_id in range(S.shape[1]) if known is None else known:
        for f in (POOLED, *np.unique(fold)):
            inside = slice(None) if f == POOLED else fold == f
            scores, positive = np.ascontiguousarray(S[inside, label_id]), np.ascontiguousarray(Y[inside, label_id])
            key = {"label_id": label_id, "fold": int(f)}
            cut, tp, fp = curve(scores, positive)
            counts = {"positives": int(positive.sum()), "negatives": int((~positive).sum())}
            curve_rows.append({**key, **counts, "cut": cut, "tp": tp, "fp": fp})
            p, n = histogram(scores, positive)
            bins = np.flatnonzero(p + n)
            histogram_rows.append({**key, "bin": bins, "positives": p[bins], "negatives": n[bins]})
    return (
        pa.Table.from_pylist(curve_rows, TABLES["curves"].schema),
        pa.Table.from_pylist(histogram_rows, TABLES["histograms"].schema),
    )


def problem(n=600, L=12, seed=0):
    """Labels from frequent to rare, hard and easy, whose positives score higher."""
    rng = np.random.default_rng(seed)
    Y = rng.random((n, L)) < np.geomspace(0.4, 0.01, L)
    Y[: 2 * L : 2, :] |= np.eye(L, dtype=np.bool_)
    S = (rng.normal(-3, 1.2, (n, L)) + np.tile([1.0, 2.8, 4.5], L // 3) * Y).astype(np.float32)
    return S, Y, rng.integers(0, 3, n)


def f1_of(tp, fp, support):
    return 2 * tp / (tp + fp + support)


def micro_f1(S, Y, thresholds):
    T = np.array([np.inf if t is None else t for t in thresholds]) <= S
    return f1_of((T & Y).sum(), (T & ~Y).sum(), Y.sum())


def test_per_label_without_guard_is_the_best_f1_of_each_label():
    S, Y, fold = problem()
    found = choose(*tables_of(S, Y, fold), ["ok"] * 12, UNGUARDED)
    assert found.schema == TABLES["thresholds"].schema
    assert found["label_id"].to_pylist() == list(range(12))
    assert found["support"].to_pylist() == Y.sum(axis=0).tolist()
    for row in found.to_pylist():
        scores, positive = S[:, row["label_id"]], Y[:, row["label_id"]]
        assert_allclose(row["expected_f1"], best_f1(scores.tolist(), positive), rtol=1e-12)
        tp, fp = counts_at(scores, positive, row["threshold"])
        assert_allclose(f1_of(tp, fp, positive.sum()), row["expected_f1"], rtol=1e-12)


def test_fixed_is_one_half_for_every_label():
    S, Y, fold = problem()
    found = choose(*tables_of(S, Y, fold), ["ok"] * 12, CalibrateConfig(rule="fixed", calibration="none"))
    assert set(found["threshold"].to_pylist()) == {0.0}
    assert set(found["objective"].to_pylist()) == {"fixed"}
    for row in found.to_pylist():
        tp, fp = counts_at(S[:, row["label_id"]], Y[:, row["label_id"]], 0.0)
        assert_allclose(row["expected_f1"], f1_of(tp, fp, row["support"]), rtol=1e-12)


def test_global_is_the_best_common_cut():
    S, Y, fold = problem()
    tables = tables_of(S, Y, fold)
    found = choose(*tables, ["ok"] * 12, CalibrateConfig(rule="global"))
    common, best = global_cut(histograms_of(tables[1], POOLED, 12))
    assert set(found["threshold"].to_pylist()) == {common}
    assert_allclose(micro_f1(S, Y, found["threshold"].to_pylist()), best, rtol=1e-12)
    assert best > micro_f1(S, Y, [0.0] * 12)
    for row in found.to_pylist():
        tp, fp = counts_at(S[:, row["label_id"]], Y[:, row["label_id"]], common)
        assert_allclose(row["expected_f1"], f1_of(tp, fp, row["support"]), rtol=1e-12)


def test_spread_is_the_range_of_the_folds_own_thresholds():
    S, Y, fold = problem()
    found = choose(*tables_of(S, Y, fold), ["ok"] * 12, UNGUARDED)
    of_fold = []
    for f in range(3):
        alone = tables_of(S[fold == f], Y[fold == f], np.zeros((fold == f).sum()))
        of_fold.append(choose(*alone, ["ok"] * 12, UNGUARDED)["threshold"].to_pylist())
    for j, spread in enumerate(found["spread"].to_pylist()):
        known = [cuts[j] for cuts in of_fold if cuts[j] is not None]
        assert spread == (max(known) - min(known) if len(known) > 1 else None)
    assert max(filter(None, found["spread"].to_pylist())) > 0


def test_what_is_never_and_what_is_always_tagged():
    S, Y, fold = problem()
    Y[:, 4] = False  # its positives are all outside the held-out rows
    status = ["ok"] * 12
    status[1], status[2], status[3], status[5] = (
        "no_positives",
        "no_negatives",
        "failed: MemoryError: ",
        "not_converged",
    )
    tables = tables_of(S, Y, fold, known=[j for j in range(12) if j not in (1, 2, 3)])
    for rule in ("f_beta", "global", "fixed", "joint", "budget", "precision", "youden", "otsu", "pcut"):
        found = choose(*tables, status, CalibrateConfig(rule=rule)).to_pylist()
        for never in (1, 3, 4):
            assert (found[never]["threshold"], found[never]["expected_f1"]) == (None, None)
        bias_of_always = np.log((600 + 0.5) / 0.5)
        assert found[2]["threshold"] <= bias_of_always
        assert found[2]["threshold"] == 0
        assert found[5]["threshold"] is not None
        assert all((row["a"], row["b"]) == (1, 0) for row in (found[1], found[2], found[3], found[4]))


def test_a_failed_label_is_never_tagged_though_it_has_a_curve():
    S, Y, fold = problem()
    found = choose(*tables_of(S, Y, fold), ["failed: ValueError: x"] + ["ok"] * 11, CalibrateConfig())
    assert found["threshold"].to_pylist()[0] is None
    assert None not in found["threshold"].to_pylist()[1:]


def test_no_curves_at_all():
    empty = TABLES["curves"].schema.empty_table(), TABLES["histograms"].schema.empty_table()
    found = choose(*empty, ["no_positives", "no_negatives"], CalibrateConfig())
    assert found["threshold"].to_pylist() == [None, 0.0]
    assert choose(*empty, [], CalibrateConfig()).num_rows == 0


def test_the_order_of_the_rows_does_not_matter():
    S, Y, fold = problem()
    tables = tables_of(S, Y, fold)
    want = choose(*tables, ["ok"] * 12, CalibrateConfig())
    rng = np.random.default_rng(1)
    shuffled = [t.take(rng.permutation(t.num_rows)) for t in tables]
    chunked = [pa.concat_tables([t.slice(0, 7), t.slice(7)]) for t in shuffled]
    assert choose(*shuffled, ["ok"] * 12, CalibrateConfig()).equals(want)
    assert choose(*chunked, ["ok"] * 12, CalibrateConfig()).equals(want)


def test_tables_become_ragged_arrays_by_label_id():
    S, Y, fold = problem()
    tables = tables_of(S, Y, fold, known=[7, 2])
    for f in (POOLED, 0, 2):
        inside = np.ones(600, np.bool_) if f == POOLED else fold == f
        curves, histograms = curves_of(tables[0], f, 12), histograms_of(tables[1], f, 12)
        for j in range(12):
            own = slice(curves.indptr[j], curves.indptr[j + 1])
            want = curve(S[inside, j], Y[inside, j]) if j in (2, 7) else ([], [], [])
            for name, values in zip(("cut", "tp", "fp"), want, strict=True):
                assert_array_equal(getattr(curves, name)[own], values)
        assert_array_equal(histograms.support(), np.where(np.isin(range(12), (2, 7)), Y[inside].sum(axis=0), 0))


def unlucky(n, L, seed):
    """Many rare labels; out of fold, some of them have all their positives below every negative."""
    rng = np.random.default_rng(seed)
    Y = rng.random((n, L)) < 3 / 1000
    Y[:2] |= rng.random((2, L)) < 0.5
    return (rng.normal(-6, 1, (n, L)) + 6 * Y).astype(np.float32), Y


def test_one_lucky_cut_does_not_tag_everything():
    S, Y = unlucky(1000, 80, 0)
    S[:, :8] -= 9 * Y[:, :8]  # the best cut of these eight labels is below all scores
    tables = tables_of(S, Y, np.zeros(1000, int))
    new_S, new_Y = unlucky(1000, 80, 1)
    bare = choose(*tables, ["ok"] * 80, UNGUARDED)["threshold"].to_pylist()
    guarded = choose(*tables, ["ok"] * 80, CalibrateConfig())["threshold"].to_pylist()
    assert min(t for t in bare if t is not None) < -8
    assert min(t for t in guarded if t is not None) > -6
    assert micro_f1(new_S, new_Y, bare) < 0.2
    assert micro_f1(new_S, new_Y, guarded) > 0.8


@pytest.mark.parametrize("setting", [{"guard": "peers", "peers": 5.0}, {"micro": 5.0}])
def test_guard_and_micro_each_change_the_answer(setting):
    S, Y, fold = problem()
    tables = tables_of(S, Y, fold)
    bare = choose(*tables, ["ok"] * 12, UNGUARDED)
    found = choose(*tables, ["ok"] * 12, UNGUARDED.model_copy(update=setting))
    assert not found["threshold"].equals(bare["threshold"])
    assert found["a"].equals(bare["a"])


def test_micro_raises_micro_f1_and_costs_macro():
    S, Y, fold = problem()
    tables = tables_of(S, Y, fold)
    cuts = [
        choose(*tables, ["ok"] * 12, UNGUARDED.model_copy(update={"micro": m}))["threshold"].to_pylist()
        for m in (0.0, 100.0)
    ]
    micro = [micro_f1(S, Y, c) for c in cuts]
    assert micro[1] > micro[0]

    def macro(c):
        return np.mean([f1_of(*counts_at(S[:, j], Y[:, j], c[j]), Y[:, j].sum()) for j in range(12)])

    assert macro(cuts[1]) < macro(cuts[0])


def test_probabilities_are_calibrated():
    """Log-odds that are twice too confident and moved come back; rare labels lean on their peers."""
    rng = np.random.default_rng(2)
    z = rng.normal(-2, 2, (4000, 6))
    Y = rng.random(z.shape) < expit(z)
    S = (2 * z + 1).astype(np.float32)
    found = choose(*tables_of(S, Y, np.zeros(4000, int)), ["ok"] * 6, CalibrateConfig())
    assert_allclose(found["a"].to_numpy(), 0.5, atol=0.06)
    assert_allclose(found["b"].to_numpy(), -0.5, atol=0.15)


def test_pooling_pulls_the_map_of_a_rare_label_to_its_peers():
    rng = np.random.default_rng(3)
    Y = np.zeros((800, 30), np.bool_)
    Y[:4] = True
    S = (rng.normal(-5, 1, Y.shape) + 5 * Y).astype(np.float32)
    S[:4, 0] -= 8  # inverted by chance
    tables = tables_of(S, Y, np.zeros(800, int))
    alone, pooled = (
        choose(*tables, ["ok"] * 30, UNGUARDED.model_copy(update={"pooling": p})).to_pylist() for p in (0.0, 30.0)
    )
    assert alone[0]["a"] == 0.05
    assert pooled[0]["a"] > 0.5
    assert all(row["a"] >= 0.05 for row in alone + pooled)


# -- the other rules ---------------------------------------------------------------------------------------------------


def tagged_with(S, Y, cfg, fold=None):
    found = choose(*tables_of(S, Y, np.zeros(len(S), int) if fold is None else fold), ["ok"] * S.shape[1], cfg)
    return found["threshold"].fill_null(np.inf).to_numpy() <= S, found


@pytest.mark.parametrize("floor", [0.5, 0.9])
def test_floors_of_precision_and_recall_are_kept(floor):
    S, Y, _ = problem()
    T, found = tagged_with(S, Y, UNGUARDED.model_copy(update={"rule": "precision", "precision": floor}))
    tags = T.sum(axis=0)
    assert ((T & Y).sum(axis=0)[tags > 0] >= floor * tags[tags > 0]).all()
    assert found["threshold"].null_count == (tags == 0).sum()
    T, _ = tagged_with(S, Y, UNGUARDED.model_copy(update={"rule": "recall", "recall": floor}))
    assert ((T & Y).sum(axis=0) >= floor * Y.sum(axis=0)).all()


def test_a_budget_is_spent_on_the_most_probable_pairs():
    S, Y, _ = problem()
    for budget in (0.5, 1.5):
        T, found = tagged_with(S, Y, UNGUARDED.model_copy(update={"rule": "budget", "budget": budget}))
        assert budget * len(S) * 0.95 < T.sum() <= budget * len(S) * 1.02
        z = found["threshold"].to_numpy() * found["a"].to_numpy() + found["b"].to_numpy()
        assert np.ptp(z) < 1e-9  # one probability for all labels
    T, _ = tagged_with(S, Y, UNGUARDED.model_copy(update={"rule": "budget"}))
    assert abs(T.sum() - Y.sum()) < 0.05 * Y.sum()


@pytest.mark.parametrize("calibration", ["platt", "isotonic", "temperature", "none"])
def test_fixed_cuts_at_a_calibrated_probability(calibration):
    S, Y, _ = problem()
    cfg = CalibrateConfig(rule="fixed", at=0.3, calibration=calibration, isotonic_positives=20)
    T, found = tagged_with(S, Y, cfg)
    decisions = Decisions.from_table(found)
    Z = decisions.log_odds(S)
    assert_array_equal(T, expit(Z) >= 0.3)
    assert (calibration == "isotonic") == bool(decisions.knots)
    label, row = (x.ravel() for x in np.meshgrid(np.arange(12), np.arange(600)))
    assert_allclose(decisions.log_odds_of(label, S[row, label].astype(np.float64)), Z[row, label], rtol=1e-6)
    for j in range(12):  # the ranking within a label stays
        order = np.argsort(S[:, j], kind="stable")
        assert (np.diff(Z[order, j]) >= 0).all()
        assert_array_equal(np.diff(Z[order, j]) > 0, np.diff(S[order, j]) > 0)


def test_fbr_lifts_poor_labels_above_all_their_scores():
    S, Y, _ = problem()
    cfg = UNGUARDED.model_copy(update={"guard": "fbr", "fbr": 0.6})
    T, _ = tagged_with(S, Y, cfg)
    poor = np.array([best_f1(S[:, j].tolist(), Y[:, j]) < 0.6 for j in range(12)])
    assert 0 < poor.sum() < 12
    assert_array_equal(T.any(axis=0), ~poor)


def test_shrinking_moves_rare_labels_to_the_common_cut():
    S, Y, fold = problem()
    own, common = (
        choose(*tables_of(S, Y, fold), ["ok"] * 12, cfg)["threshold"].to_numpy()
        for cfg in (UNGUARDED, CalibrateConfig(rule="global"))
    )
    _, found = tagged_with(S, Y, UNGUARDED.model_copy(update={"guard": "shrink", "shrink": 30.0}))
    share = Y.sum(axis=0) / (Y.sum(axis=0) + 30)
    assert_allclose(found["threshold"].to_numpy(), share * own + (1 - share) * common, rtol=1e-12)


def test_a_forecast_is_cross_fitted():
    """Cuts come from the other folds: changing the gold of one fold alone moves only what is counted in the others."""
    S, Y, fold = problem()
    cfg = UNGUARDED.model_copy(update={"rule": "joint", "guard": "smoothed"})
    found = forecast(evidence(*tables_of(S, Y, fold), 12, cfg), cfg)
    tp, fp = np.zeros(12, int), np.zeros(12, int)
    for f in range(3):
        rest, part = fold != f, fold == f
        alone = evidence(*tables_of(S[rest], Y[rest], np.zeros(rest.sum(), int)), 12, cfg)
        edges = forecast(alone, cfg)  # one fold: judged where it was chosen
        assert edges.documents == rest.sum()
        cut = np.array([threshold_of(S[rest, j], Y[rest, j], edges.tp[j], edges.fp[j]) for j in range(12)])
        tp += ((cut <= S) & Y)[part].sum(axis=0)
        fp += ((cut <= S) & ~Y)[part].sum(axis=0)
    assert found.documents == 600
    assert_array_equal(found.support, Y.sum(axis=0))
    # several edges may give the same counts on the rest; on the part they differ by what lies between them
    assert abs(found.tp - tp).sum() <= 12
    assert abs(found.fp - fp).sum() <= 24


def threshold_of(scores, positive, tp, fp):
    """The highest edge with these counts."""
    edges = np.arange(-512, 513) / 32
    return max(e for e in edges if counts_at(scores, positive, e) == (tp, fp))


def test_nested_takes_the_guard_with_the_best_forecast():
    S, Y = unlucky(1000, 80, 0)
    S[:, :8] -= 9 * Y[:, :8]
    fold = np.arange(1000) % 3
    cfg = CalibrateConfig(guard="nested", micro=0)
    known = evidence(*tables_of(S, Y, fold), 80, cfg)
    chosen, tried = nested(known, cfg)
    assert len(tried) == len(GUARDS)
    values = [t["micro_f1"] + t["macro_f1"] for t in tried]
    best = tried[int(np.argmax(values))]
    assert all(getattr(chosen, key) == value for key, value in best.items() if key not in ("micro_f1", "macro_f1"))
    assert values[0] < max(values)  # without a guard is not the best here
    assert decide(known, ["ok"] * 80, cfg)[0]["threshold"].equals(
        choose(*tables_of(S, Y, fold), ["ok"] * 80, chosen)["threshold"]
    )


@pytest.mark.parametrize("rule", ["rcut", "samples_f1"])
def test_rules_by_document_keep_the_cuts_of_f_beta_for_reference(rule):
    S, Y, fold = problem()
    tables = tables_of(S, Y, fold)
    usual = choose(*tables, ["ok"] * 11 + ["no_positives"], CalibrateConfig())
    found = choose(*tables, ["ok"] * 11 + ["no_positives"], CalibrateConfig(rule=rule))
    assert set(found["objective"].to_pylist()) == {rule}
    assert found.drop_columns(["objective"]).equals(usual.drop_columns(["objective"]))
    assert found["threshold"].to_pylist()[11] is None


def test_a_rule_by_document_hides_no_label_that_f_beta_would_never_tag():
    S, Y, fold = problem()
    S[:, 0] = -S[:, 0]  # the more it is alike the lower it scores
    Y[:, 0] &= np.arange(600) % 20 == 0
    tables = tables_of(S, Y, fold)
    cfg = CalibrateConfig(guard="none", micro=9)
    assert choose(*tables, ["ok"] * 12, cfg)["threshold"][0].as_py() is None
    by_document = choose(*tables, ["ok"] * 12, cfg.model_copy(update={"rule": "rcut"}))
    assert by_document["threshold"][0].as_py() > S[:, 0].max()
    assert by_document["expected_f1"][0].as_py() == 0


def test_rules_side_by_side_show_what_they_are_for():
    S, Y, fold = problem()
    cfg = UNGUARDED.model_copy(update={"precision": 0.9, "recall": 0.9})
    found = side_by_side(evidence(*tables_of(S, Y, fold), 12, cfg), cfg)
    assert found["precision"]["micro_precision"] == max(m["micro_precision"] for m in found.values())
    assert found["recall"]["micro_recall"] > 0.8
    assert abs(found["budget"]["tags"] - Y.sum() / 600) < 0.1


def test_side_by_side_takes_the_guard_that_nested_would():
    S, Y = unlucky(1000, 80, 0)
    S[:, :8] -= 9 * Y[:, :8]
    cfg = CalibrateConfig(guard="nested", micro=0)
    known = evidence(*tables_of(S, Y, np.arange(1000) % 3), 80, cfg)
    found = side_by_side(known, cfg)["f_beta"]
    assert found == forecast(known, nested(known, cfg)[0]).metrics()
    assert found["micro_f1"] > forecast(known, cfg.model_copy(update={"guard": "none"})).metrics()["micro_f1"]
