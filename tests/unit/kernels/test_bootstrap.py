import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit

from pipeline.kernels import bootstrap, ranking
from pipeline.kernels.bootstrap import (
    INFLUENCES,
    LOWER_IS_BETTER,
    MEASURES,
    METRICS,
    UNBOUNDED,
    Units,
    compare,
    difference_intervals,
    false_discoveries,
    fold_metrics,
    intervals,
    label_p_values,
    metric_intervals,
    percentile,
    replicate_metrics,
    units_of,
    weights,
)
from pipeline.kernels.counts import confusion, label_metrics, precision_recall_f1, set_metrics, set_sums
from pipeline.kernels.exact import SCALE
from tests.reference import gold_of

POINT = dict.fromkeys(INFLUENCES, 0.5)


def column(name):
    return METRICS.index(name)


def random_fold(n=40, L=7, seed=0, density=0.3):
    rng = np.random.default_rng(seed)
    Y, T = rng.random((n, L)) < density, rng.random((n, L)) < density
    Y[:, 0] = False  # a label that is never gold
    T[:, :2] &= False  # one that is nothing at all, one that is never a tag
    Y[0] = T[0] = False  # a document with neither
    return Y, T


def measured(Y, **columns):
    measures = np.zeros((len(Y), len(MEASURES)))
    for name, values in columns.items():
        measures[:, MEASURES.index(name)] = values
    return measures


def units(Y, T, measures=None, if_undefined=0.0, most=bootstrap.UNITS):
    measures = measured(Y) if measures is None else measures
    return units_of(*gold_of(Y), *gold_of(T), measures, Y.shape[1], if_undefined, most)


# -- weights -----------------------------------------------------------------------------------------------------------


@given(st.integers(-5, 2**64), st.integers(1, 300), st.integers(0, 1000), st.integers(0, 8), st.integers(0, 8))
@settings(deadline=None, max_examples=60)
def test_replicates_are_the_same_however_they_are_shared_out(seed, size, start, first, second):
    whole = weights(seed, range(start, start + first + second), size)
    parts = range(start, start + first), range(start + first, start + first + second)
    assert_array_equal(whole, np.concatenate([weights(seed, part, size) for part in parts]))
    assert_array_equal(whole.sum(axis=1), size)


def test_units_are_drawn_with_replacement():
    drawn = weights(3, range(2000), 50)
    assert_allclose(drawn.mean(axis=0), 1, atol=0.12)
    # multinomial: variance 1 - 1 / U of a unit, covariance -1 / U of two
    assert_allclose(drawn.var(), 1 - 1 / 50, rtol=0.02)
    covariance = np.cov(drawn.T)
    assert_allclose(covariance[~np.eye(50, dtype=bool)].mean(), -1 / 50, rtol=0.05)
    assert len(np.unique(drawn, axis=0)) == 2000
    assert not np.array_equal(drawn, weights(4, range(2000), 50))


@pytest.mark.parametrize("arguments", [(0, range(3), 0), (0, range(3), 70_000), (0, range(0, 6, 2), 5)])
def test_weights_that_cannot_be_are_refused(arguments):
    with pytest.raises(ValueError, match="expected consecutive replicates, 1 to 65535 units"):
        weights(*arguments)


# -- metrics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("if_undefined", [0.0, 1.0])
@pytest.mark.parametrize("most", [10_000, 16])
def test_weights_of_one_give_the_metrics_of_the_fold(if_undefined, most):
    Y, T = random_fold()
    found = dict(zip(METRICS, fold_metrics(units(Y, T, None, if_undefined, most), 7, POINT, if_undefined), strict=True))
    expected = label_metrics(*confusion(T, *gold_of(Y)), if_undefined)
    expected |= set_metrics(set_sums(T, *gold_of(Y), if_undefined), 40, 7, if_undefined)
    for name, value in expected.items():
        assert_allclose(found[name], value, rtol=0, atol=1e-12, err_msg=name)
    assert {name: found[name] for name in INFLUENCES} == POINT


def test_measures_of_documents_give_the_ranking_and_probability_metrics():
    Y, T = random_fold(seed=2)
    rng = np.random.default_rng(0)
    S = rng.normal(size=Y.shape)
    propensity = rng.uniform(1, 5, 7)
    measures = np.zeros((40, len(MEASURES)))
    for i in range(40):
        one = S[i : i + 1], *gold_of(Y[i : i + 1])
        sums = ranking.ranking_sums(*one, propensity) | ranking.probability_sums(expit(one[0]), *one[1:])[0]
        gaps = sums.pop("bin_probability") - sums["bin_positives"].astype(object) * SCALE
        sums |= {f"ece_{b}": gap for b, gap in enumerate(gaps)}
        measures[i] = [sums.get(name, 0) / SCALE for name in MEASURES]
    found = dict(zip(METRICS, fold_metrics(units(Y, T, measures), 7, POINT), strict=True))
    expected = ranking.ranking_metrics(ranking.ranking_sums(S, *gold_of(Y), propensity), 40, 7)
    expected |= ranking.probability_metrics(ranking.probability_sums(expit(S), *gold_of(Y))[0])
    for name, value in expected.items():
        assert_allclose(found[name], value, rtol=0, atol=1e-11, err_msg=name)
    names = {*expected, *INFLUENCES, *label_metrics([1], [1], [1]), *set_metrics(set_sums(T, *gold_of(Y)), 40, 7)}
    assert names == set(METRICS)
    assert set(METRICS) >= LOWER_IS_BETTER | UNBOUNDED


@pytest.mark.parametrize("if_undefined", [0.0, 1.0])
def test_a_replicate_is_the_fold_with_its_documents_repeated(if_undefined):
    Y, T = random_fold(n=12, seed=5, density=0.15)
    drawn = weights(9, range(20), 12)
    found = replicate_metrics(units(Y, T, None, if_undefined), 7, POINT, drawn, if_undefined)
    lost = 0
    for r, counts in enumerate(drawn):
        again = np.repeat(np.arange(12), counts)
        expected = fold_metrics(units(Y[again], T[again], None, if_undefined), 7, POINT, if_undefined)
        # labels that the replicate has lost count 0 in macro F1
        expected[column("macro_f1")] *= Y[again].any(axis=0).sum() / Y.any(axis=0).sum()
        lost += Y[again].any(axis=0).sum() < Y.any(axis=0).sum()
        assert_allclose(found[r], expected, rtol=0, atol=1e-12)
    assert lost


def test_influence_values_move_a_metric_by_their_weighted_mean():
    Y, T = random_fold()
    psi = np.random.default_rng(1).normal(size=40)
    fold = units(Y, T, measured(Y, roc_auc_macro=psi - psi.mean()))
    drawn = weights(0, range(5), 40)
    found = replicate_metrics(fold, 7, POINT, drawn)[:, column("roc_auc_macro")]
    assert_allclose(found, 0.5 + drawn @ (psi - psi.mean()) / 40)


@given(st.integers(0, 300), st.integers(0, 300))
@settings(deadline=None, max_examples=15)
def test_chunks_of_replicates_equal_the_whole(first, second):
    fold = units(*random_fold(seed=4))
    whole = replicate_metrics(fold, 7, POINT, weights(1, range(first + second), 40))
    parts = weights(1, range(first), 40), weights(1, range(first, first + second), 40)
    assert_array_equal(whole, np.concatenate([replicate_metrics(fold, 7, POINT, part) for part in parts]))


def test_groups_of_documents_spread_as_documents_do():
    rng = np.random.default_rng(8)
    Y = rng.random((4000, 5)) < 0.2
    T = Y ^ (rng.random(Y.shape) < 0.1)
    drawn = weights(2, range(1000), 4000), weights(2, range(1000), 450)  # some groups hold one more than others
    alone, grouped = (
        replicate_metrics(fold, 5, POINT, w).std(axis=0)
        for fold, w in zip((units(Y, T), units(Y, T, most=450)), drawn, strict=True)
    )
    names = [column(name) for name in ("micro_f1", "macro_f1", "samples_f1", "hamming_loss", "jaccard_samples")]
    assert_allclose(grouped[names], alone[names], rtol=0.15)
    fold = units(Y, T, most=450)
    assert_array_equal(np.unique(fold.documents), [8, 9])
    assert fold.documents.sum() == 4000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"measures": np.zeros((40, 3))}, r"measures are \(40, 3\); expected finite"),
        ({"measures": np.full((40, len(MEASURES)), np.nan)}, "expected finite"),
        ({"tag_indptr": [0, 0]}, "gold of 40 documents, tags of 1; expected the same number"),
        ({"n_labels": 3}, r"expected 0\.\.2"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    Y, T = random_fold()
    (gold_indptr, gold_labels), (tag_indptr, tag_labels) = gold_of(Y), gold_of(T)
    arguments = {
        "gold_indptr": gold_indptr,
        "gold_labels": gold_labels,
        "tag_indptr": tag_indptr,
        "tag_labels": tag_labels,
        "measures": measured(Y),
        "n_labels": 7,
    }
    with pytest.raises(ValueError, match=message):
        units_of(**{**arguments, **change})
    with pytest.raises(ValueError, match="7 labels and 40 units; expected 7 and 39"):
        replicate_metrics(units(Y, T), 7, POINT, np.ones((1, 39), np.uint16))


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_intervals_hold_the_point_and_stay_within_the_range_of_the_metric():
    Y, T = random_fold(n=12, seed=3)
    fold = units(Y, T)
    point = fold_metrics(fold, 7, POINT)
    replicates = replicate_metrics(fold, 7, POINT, weights(0, range(200), 12))
    narrow, wide = (intervals(replicates, point, confidence) for confidence in (0.5, 0.95))
    for low, high in (narrow.T, wide.T):
        assert (low <= point).all() and (point <= high).all() and (low >= 0).all()
        assert (high[[name not in UNBOUNDED for name in METRICS]] <= 1).all()
    assert (wide[:, 0] <= narrow[:, 0]).all() and (narrow[:, 1] <= wide[:, 1]).all()
    found = metric_intervals(fold, 7, POINT, replicates=200)
    assert_array_equal([found[name] for name in METRICS], wide)
    far = difference_intervals(np.array([[0.1], [0.2]]), np.array([0.5]), 0.95)
    assert far[0, 1] == 0.5


def population(documents=200_000, L=30, seed=1):
    """Gold, tags of two runs and the gold of their first label: Zipf labels, some documents harder than others."""
    rng = np.random.default_rng(seed)
    p = 0.5 / np.arange(1, L + 1)
    hard = np.exp(0.25 * rng.standard_normal((documents, 1), np.float32))
    apart = rng.uniform(1, 3.5, L).astype(np.float32)
    Y = rng.random((documents, L), np.float32) < p
    runs = []
    for _ in range(2):
        S = rng.standard_normal(Y.shape, np.float32) * hard + apart * Y
        log_odds = apart * (S - apart / 2) + np.log(p / (1 - p)).astype(np.float32)
        runs.append((log_odds > 0, Y[np.arange(documents), log_odds.argmax(axis=1)]))
    return Y, runs


def bias_corrected(replicates, point, confidence):
    """Quantiles moved by twice the median bias (Efron and Tibshirani 1993, section 14.3): measured, not used."""
    from scipy.special import ndtr, ndtri

    below = (replicates < point).mean(axis=0) + 0.5 * (replicates == point).mean(axis=0)
    bias = ndtri(np.clip(below, 0.5 / len(replicates), 1 - 0.5 / len(replicates)))
    shares = ndtr(2 * bias + ndtri((1 + confidence) / 2) * np.array([[-1.0], [1.0]]))
    columns = [np.quantile(values, share) for values, share in zip(replicates.T, shares.T, strict=True)]
    return np.array(columns)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Test folds of 750 documents from a known population; `pytest -s` shows the methods beside each other."""
    names = ("micro_f1", "macro_f1", "macro_f1_all", "samples_f1", "weighted_f1", "jaccard_samples", "p_at_1")
    chosen = [column(name) for name in names]
    Y, runs = population()
    truth = np.array([fold_metrics(units(Y, T, measured(Y, hits_at_1=top)), 30, POINT) for T, top in runs])[:, chosen]
    methods = {
        "basic": intervals,
        "percentile": lambda replicates, point, confidence: percentile(replicates, confidence),
        "bias-corrected": bias_corrected,
    }
    covered = dict.fromkeys([*methods, "difference: percentile"], 0)
    rng = np.random.default_rng(7)
    draws = 600  # a share of 0.95 then strays by 0.009 (standard deviation), of 200 draws by 0.015
    for draw in range(draws):
        rows = rng.choice(len(Y), 750, replace=False)
        folds = [units(Y[rows], T[rows], measured(rows, hits_at_1=top[rows])) for T, top in runs]
        drawn = weights(draw, range(400), 750)
        point = np.array([fold_metrics(fold, 30, POINT) for fold in folds])
        replicates = np.array([replicate_metrics(fold, 30, POINT, drawn) for fold in folds])
        found = {name: method(replicates[0], point[0], 0.95)[chosen] for name, method in methods.items()}
        moved, by = (values[1] - values[0] for values in (replicates, point))
        found["difference: percentile"] = difference_intervals(moved, by, 0.95)[chosen]
        for name, interval in found.items():
            target = truth[1] - truth[0] if "difference" in name else truth[0]
            covered[name] = covered[name] + ((interval[:, 0] <= target) & (target <= interval[:, 1]))
    shares = {name: dict(zip(names, (hits / draws).tolist(), strict=True)) for name, hits in covered.items()}
    for name, share in shares.items():
        print(f"{name:<24}" + "  ".join(f"{metric} {value:.3f}" for metric, value in share.items()))
    for name in ("basic", "difference: percentile"):
        assert all(0.92 <= share <= 0.98 for share in shares[name].values()), shares[name]


# -- two runs ----------------------------------------------------------------------------------------------------------


def two_runs(n=300, L=12, seed=0, errors=(0.15, 0.05), shared=0.1):
    """Runs that share some of their errors."""
    rng = np.random.default_rng(seed)
    Y = rng.random((n, L)) < 0.5 / np.arange(1, L + 1)
    both = rng.random(Y.shape) < shared
    return Y, [Y ^ both ^ (rng.random(Y.shape) < error) for error in errors]


def compared(Y, T, other, **options):
    return compare(units(Y, T), units(Y, other), Y.shape[1], POINT, POINT, **options)


def test_a_run_against_itself_differs_nowhere():
    Y, (T, _) = two_runs()
    found = compared(Y, T, T)
    assert not found.difference.any() and not found.interval.any() and not found.label_interval.any()
    assert (found.p == 1).all() and (found.label_p == 1).all()
    assert not (found.better | found.worse | found.tested | found.holds).any() and found.by_chance == 0


def test_swapping_the_runs_negates():
    Y, (T, other) = two_runs()
    one, back = compared(Y, T, other), compared(Y, other, T)
    for name in ("difference", "label_difference"):
        assert_allclose(getattr(one, name), -getattr(back, name), atol=1e-15)
    for name in ("interval", "label_interval"):
        assert_allclose(getattr(one, name), -getattr(back, name)[:, ::-1], atol=1e-12)
    for name in ("p", "label_p"):
        assert_allclose(getattr(one, name), getattr(back, name), atol=1e-12)
    assert_array_equal(one.better, back.worse)
    assert_array_equal(one.holds, back.holds)
    assert one.better.any() and one.holds.any()
    assert one.interval[column("micro_f1"), 0] > 0 and one.p[column("micro_f1")] < 0.01


def test_paired_intervals_are_narrower_than_unpaired():
    Y, (T, other) = two_runs(errors=(0.01, 0.01))
    found = compared(Y, T, other)
    unpaired = [
        replicate_metrics(units(Y, run), 12, POINT, weights(seed, range(1000), 300))
        for seed, run in ((0, T), (1, other))
    ]
    apart = percentile(unpaired[1] - unpaired[0], 0.95)
    for name in ("micro_f1", "macro_f1", "samples_f1", "hamming_loss"):
        k = column(name)
        assert np.ptp(found.interval[k]) < 0.6 * np.ptp(apart[k])


def test_labels_are_compared_as_the_counts_say():
    Y, (T, other) = two_runs()
    Y[:, 3] = False  # tags alone: nothing to compare
    found = compared(Y, T, other)
    for tags, f1 in ((T, found.f1_a), (other, found.f1_b)):
        assert_allclose(f1, precision_recall_f1(*confusion(tags, *gold_of(Y)))[2])
    assert_array_equal(found.support, Y.sum(axis=0))
    assert_array_equal(found.tested, (other != T).any(axis=0) & Y.any(axis=0))
    # the same replicates, one document at a time
    drawn = weights(0, range(1000), 300).astype(np.int64)
    f1 = [2 * (drawn @ (Y & run)) / (drawn @ (Y.astype(int) + run)) for run in (T, other)]
    expected = np.quantile((f1[1] - f1[0])[:, 5], [0.025, 0.975])
    assert_allclose(found.label_interval[5], expected)


def test_few_labels_hold_where_the_runs_are_alike():
    false, excluded, tested = 0, 0, 0
    for seed in range(10):
        Y, (T, other) = two_runs(n=400, L=150, seed=seed, errors=(0.03, 0.03))
        found = compared(Y, T, other, replicates=200)
        false += found.holds.any()
        excluded += (found.better | found.worse).sum()
        tested += found.tested.sum()
    assert false <= 2
    assert excluded <= 0.07 * tested


def test_p_of_labels_is_uniform_under_swaps():
    rng = np.random.default_rng(0)
    Y, (T, other) = two_runs(n=400, L=8, errors=(0.2, 0.2))
    below = []
    for _ in range(300):
        swap = rng.random((400, 1)) < 0.5
        p, _ = label_p_values(units(Y, np.where(swap, other, T)), units(Y, np.where(swap, T, other)))
        below.append(p < 0.1)
    assert_allclose(np.mean(below, axis=0), 0.1, atol=0.055)


def test_one_document_never_makes_a_label_better():
    Y = np.zeros((50, 1), bool)
    Y[7] = True
    found = compared(Y, np.zeros_like(Y), Y)
    assert found.label_difference[0] == 1 and found.tested[0] and not found.better[0] and found.label_p[0] > 0.3


def test_false_discoveries_step_up():
    # 0.03 is above 0.05 / 4 x 2 but 0.037 is below 0.05 / 4 x 3, and takes it along
    assert_array_equal(false_discoveries([0.037, 0.9, 0.001, 0.03]), [True, False, True, True])
    assert_array_equal(false_discoveries([0.04, 0.9, 0.001, 0.03]), [False, False, True, False])
    assert not false_discoveries([0.2, 0.06]).any() and false_discoveries([]).size == 0


def test_runs_with_other_gold_are_refused():
    Y, (T, _) = two_runs()
    other = Y.copy()
    other[0, 0] = ~other[0, 0]
    with pytest.raises(ValueError, match="gold differs"):
        compare(units(Y, T), units(other, T), 12, POINT, POINT)
    with pytest.raises(ValueError, match="expected the same"):
        compare(units(Y, T), units(Y[1:], T[1:]), 12, POINT, POINT)


def test_units_hold_cells_by_label():
    Y = np.array([[1, 0, 1], [0, 0, 1]], bool)
    T = np.array([[1, 1, 0], [0, 0, 1]], bool)
    fold = units(Y, T)
    assert isinstance(fold, Units)
    assert_array_equal(fold.indptr, [0, 1, 2, 4])
    assert_array_equal(np.column_stack(fold[3:]), [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 0, 0]])
    assert_array_equal(np.column_stack(units(Y, T, most=1)[3:]), [[0, 1, 0, 0], [0, 0, 1, 0], [0, 1, 0, 1]])
