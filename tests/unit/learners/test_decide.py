import numpy as np
import pyarrow as pa
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit

from pipeline.config import CalibrateConfig
from pipeline.kernels.curves import curve, histogram
from pipeline.kernels.thresholds import global_cut
from pipeline.learners.decide import choose, curves_of, histograms_of
from pipeline.learners.ovr import POOLED
from pipeline.tables import TABLES
from tests.reference import best_f1, counts_at

UNGUARDED = CalibrateConfig(guard=0, micro=0, pooling=0)


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
    found = choose(*tables_of(S, Y, fold), ["ok"] * 12, CalibrateConfig(rule="fixed"))
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
    for rule in ("per_label", "global", "fixed"):
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


@pytest.mark.parametrize("setting", ["guard", "micro"])
def test_guard_and_micro_each_change_the_answer(setting):
    S, Y, fold = problem()
    tables = tables_of(S, Y, fold)
    bare = choose(*tables, ["ok"] * 12, UNGUARDED)
    found = choose(*tables, ["ok"] * 12, UNGUARDED.model_copy(update={setting: 5.0}))
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
