import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.metrics import (
    average_precision_score,
    brier_score_loss,
    coverage_error,
    label_ranking_average_precision_score,
    label_ranking_loss,
    log_loss,
    ndcg_score,
    roc_auc_score,
)

from pipeline.kernels.counts import confusion, set_sums
from pipeline.kernels.exact import add_sums, from_fixed
from pipeline.kernels.ranking import (
    Cuts,
    average_precision_from_counts,
    count_negatives,
    curve_metrics,
    inverse_propensity,
    metrics,
    no_negatives,
    positive_cuts,
    positive_scores,
    probability_metrics,
    probability_sums,
    ranking_metrics,
    ranking_sums,
    roc_auc_from_counts,
)
from tests.reference import (
    expected_calibration_error,
    gold_of,
    mean_average_precision_at,
    precision_at,
    propensity,
    psp_at,
    r_precision_at,
    recall_at,
)

EXACT = {"rtol": 0, "atol": 1e-9}
TIED = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 3.0])
MOSTLY_DISTINCT = st.floats(-50, 50, width=32)
ORDINARY = settings(deadline=None, max_examples=60)


@st.composite
def scores_and_gold(draw, smallest_L=1):
    shape = draw(st.integers(1, 12)), draw(st.integers(smallest_L, 8))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    S = draw(arrays(dtype, shape, elements=draw(st.sampled_from([TIED, MOSTLY_DISTINCT]))))
    Y = draw(arrays(bool, shape, elements=draw(st.sampled_from([st.booleans(), st.just(False), st.just(True)]))))
    Y[draw(st.integers(0, shape[0] - 1))] = draw(st.booleans())
    Y[:, draw(st.integers(0, shape[1] - 1))] = draw(st.booleans())
    return S, Y


def fold_sums(S, Y, cuts, pooled_cuts, P, inverse_p):
    gold = gold_of(Y)
    between, equal = no_negatives(cuts)
    pooled_between, pooled_equal = no_negatives(pooled_cuts)
    count_negatives(S, *gold, cuts, between, equal)
    count_negatives(S, *gold, pooled_cuts, pooled_between, pooled_equal)
    curves = {"between": between, "equal": equal, "pooled_between": pooled_between, "pooled_equal": pooled_equal}
    tp, fp, fn = confusion(P > 0.5, *gold)
    counts = {"tp": tp, "fp": fp, "fn": fn, **set_sums(P > 0.5, *gold)}
    return curves | counts | ranking_sums(S, *gold, inverse_p) | probability_sums(P, *gold)[0]


def both_cuts(S, Y):
    found = positive_scores(S, *gold_of(Y))
    return positive_cuts(*found, Y.shape[1]), positive_cuts(*found, Y.shape[1], pooled=True)


def counted(S, Y, cuts):
    between, equal = no_negatives(cuts)
    count_negatives(S, *gold_of(Y), cuts, between, equal)
    return between, equal


@given(scores_and_gold(smallest_L=2))
@ORDINARY
def test_rankings_equal_sklearn(case):
    S, Y = case
    n, L = Y.shape
    found = ranking_metrics(ranking_sums(S, *gold_of(Y), np.ones(L)), n, L)
    assert_allclose(found["lrap"], label_ranking_average_precision_score(Y, S), **EXACT)
    assert_allclose(found["coverage_error"], coverage_error(Y, S), **EXACT)
    assert_allclose(found["ranking_loss"], label_ranking_loss(Y, S), **EXACT)
    for k in (1, 3, 5):
        assert_allclose(found[f"ndcg_at_{k}"], ndcg_score(Y, S, k=k), **EXACT)


@given(scores_and_gold(), st.integers(4, 1000))
@ORDINARY
def test_top_k_equals_the_obvious_version(case, n_train):
    S, Y = case
    n, L = Y.shape
    support = np.arange(L) ** 2
    sums = ranking_sums(S, *gold_of(Y), inverse_propensity(support, n_train))
    found = ranking_metrics(sums, n, L)
    p = propensity(support, n_train)
    for k in (1, 3, 5):
        assert_allclose(found[f"p_at_{k}"], precision_at(Y, S, k), **EXACT)
        assert_allclose(found[f"psp_at_{k}"], psp_at(Y, S, p, k), **EXACT)
    for k in (5, 10):
        assert_allclose(found[f"r_at_{k}"], recall_at(Y, S, k), **EXACT)
        assert_allclose(found[f"map_at_{k}"], mean_average_precision_at(Y, S, k), **EXACT)
    assert_allclose(found["rp_at_5"], r_precision_at(Y, S, 5), **EXACT)


def test_the_top_of_many_labels_is_found():
    rng = np.random.default_rng(5)
    S = rng.integers(0, 40, (20, 300)).astype(np.float32)
    Y = rng.random((20, 300)) < 0.1
    sums = ranking_sums(S, *gold_of(Y), np.ones(300))
    found = ranking_metrics(sums, 20, 300)
    assert_allclose(found["p_at_5"], precision_at(Y, S, 5), **EXACT)
    assert_allclose(found["map_at_10"], mean_average_precision_at(Y, S, 10), **EXACT)
    assert_allclose(found["ndcg_at_5"], ndcg_score(Y, S, k=5), **EXACT)
    assert_allclose(found["lrap"], label_ranking_average_precision_score(Y, S), **EXACT)
    assert_allclose(found["ranking_loss"], label_ranking_loss(Y, S), **EXACT)


def test_one_label():
    found = ranking_metrics(ranking_sums(np.zeros((2, 1)), [0, 1, 1], [0], np.ones(1)), 2, 1)
    assert [found[name] for name in ("ndcg_at_3", "lrap", "coverage_error", "ranking_loss")] == [0.5, 1.0, 0.5, 0.0]


def test_k_above_labels_is_an_argument():
    S, Y = np.array([[2.0, 1.0]]), np.array([[True, True]])
    sums = ranking_sums(S, *gold_of(Y), np.ones(2))
    assert ranking_metrics(sums, 1, 2)["p_at_5"] == 2 / 5
    assert ranking_metrics(sums, 1, 2, k_above_labels="labels")["p_at_5"] == 1.0


def test_cut_offs_are_an_argument():
    S, Y = np.array([[3.0, 2.0, 1.0]]), np.array([[False, True, True]])
    ks = {"p": (2,), "ndcg": (12,)}
    found = ranking_metrics(ranking_sums(S, *gold_of(Y), np.ones(3), ks), 1, 3, ks)
    assert found["p_at_2"] == 0.5
    assert_allclose(found["ndcg_at_12"], ndcg_score(Y, S), **EXACT)


def test_infinite_scores_have_a_place_and_nan_has_none():
    S, Y = np.array([[np.inf, -np.inf, 0.0]]), np.array([[False, False, True]])
    assert ranking_metrics(ranking_sums(S, *gold_of(Y), np.ones(3)), 1, 3)["coverage_error"] == 2.0
    S[0, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        ranking_sums(S, *gold_of(Y), np.ones(3))


def test_no_propensity_exceeds_1():
    assert_array_equal(inverse_propensity([0, 1, 2], n_train=2), 1.0)
    assert_allclose(1 / inverse_propensity([0, 7, 100], 1000, A=0.5, B=0.4), propensity([0, 7, 100], 1000, 0.5, 0.4))


@given(scores_and_gold(smallest_L=2))
@ORDINARY
def test_curves_equal_sklearn(case):
    S, Y = case
    cuts, pooled_cuts = both_cuts(S, Y)
    between, equal = counted(S, Y, cuts)
    pooled = counted(S, Y, pooled_cuts)
    precision = average_precision_from_counts(cuts, between, equal)
    auc = roc_auc_from_counts(cuts, between, equal)
    has_positive, has_negative = Y.any(axis=0), ~Y.all(axis=0)
    assert_array_equal(np.isnan(precision), ~has_positive)
    assert_array_equal(np.isnan(auc), ~(has_positive & has_negative))
    want_precision = [average_precision_score(Y[:, j], S[:, j]) for j in np.flatnonzero(has_positive)]
    want_auc = [roc_auc_score(Y[:, j], S[:, j]) for j in np.flatnonzero(has_positive & has_negative)]
    assert_allclose(precision[has_positive], want_precision, rtol=0, atol=1e-12)
    assert_allclose(auc[has_positive & has_negative], want_auc, rtol=0, atol=1e-12)

    sums = {"between": between, "equal": equal, "pooled_between": pooled[0], "pooled_equal": pooled[1]}
    found = curve_metrics(sums, cuts, pooled_cuts)
    assert_allclose(found["average_precision_macro"], np.mean(want_precision) if want_precision else 0.0, **EXACT)
    assert_allclose(found["roc_auc_macro"], np.mean(want_auc) if want_auc else 0.0, **EXACT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no positives at all: scikit-learn warns and says 0, which is our default too
        want_micro = average_precision_score(Y, S, average="micro")
    assert_allclose(found["average_precision_micro"], want_micro, rtol=0, atol=1e-12)


def test_label_without_gold_keeps_its_place_among_the_curves():
    S = np.array([[1.0, 5.0, 2.0], [3.0, 4.0, 2.0]])
    Y = np.array([[True, False, False], [False, False, True]])
    cuts, _ = both_cuts(S, Y)
    between, equal = counted(S, Y, cuts)
    assert cuts.indptr.tolist() == [0, 1, 1, 2]
    assert between.tolist() == [0, 1, 2, 0, 0]  # label 1 has no cut and one interval, which holds both documents
    assert equal.tolist() == [0, 1]
    assert_allclose(average_precision_from_counts(cuts, between, equal), [0.5, np.nan, 0.5])
    assert_allclose(roc_auc_from_counts(cuts, between, equal), [0.0, np.nan, 0.5])
    assert_allclose(roc_auc_from_counts(cuts, between, equal, if_undefined=0.5)[1], 0.5)


@pytest.mark.parametrize("huge", [2**31, 2**53 + 1])
def test_huge_counts_do_not_overflow_in_curves(huge):
    cuts = Cuts(np.array([0.0, 1.0]), np.array([0, 2]), np.array([huge, huge]))
    between, equal = np.array([huge, huge, 0]), np.array([2 * huge, 0])
    assert_allclose(average_precision_from_counts(cuts, between, equal), [0.5 * 1 + 0.5 * 2 / 5], rtol=1e-12)
    assert_allclose(roc_auc_from_counts(cuts, between, equal), [0.5 * 2 / 4 + 0.5 * 4 / 4], rtol=1e-12)


def test_scores_that_changed_between_the_passes_are_refused():
    S, Y = np.array([[1.0, 2.0], [3.0, 4.0]]), np.eye(2, dtype=bool)
    cuts, _ = both_cuts(S, Y)
    with pytest.raises(ValueError, match="1 gold pairs"):
        count_negatives(np.array([[np.nextafter(1.0, 2.0), 2.0], [3.0, 4.0]]), *gold_of(Y), cuts, *no_negatives(cuts))
    with pytest.raises(ValueError, match="2 curves"):
        count_negatives(np.zeros((2, 3)), *gold_of(np.zeros((2, 3))), cuts, *no_negatives(cuts))
    with pytest.raises(ValueError, match="no_negatives"):
        count_negatives(S, *gold_of(Y), cuts, *np.zeros((2, 2), np.int64))


@st.composite
def probabilities_and_gold(draw):
    _, Y = draw(scores_and_gold())
    edges = st.sampled_from([0.0, 1.0, 0.5, 1e-300, 1 - 2**-53, 0.2, 0.6])
    return draw(arrays(np.float64, Y.shape, elements=draw(st.sampled_from([edges, st.floats(0, 1)])))), Y


@given(probabilities_and_gold(), st.sampled_from([1, 7, 15]))
@ORDINARY
def test_probabilities_equal_sklearn(case, bins):
    P, Y = case
    found = probability_metrics(probability_sums(P, *gold_of(Y), bins)[0])
    y, p = Y.ravel().astype(int), P.ravel()
    assert_allclose(found["log_loss"], log_loss(y, p, labels=[0, 1]), **EXACT)
    assert_allclose(found["brier"], brier_score_loss(y, p, labels=[0, 1], pos_label=1), **EXACT)
    assert_allclose(found["ece"], expected_calibration_error(Y, P, bins), **EXACT)


def test_wrong_and_certain_over_many_labels_does_not_overflow():
    # 300,000 terms of 36 nats: 2**63 units of 2**-40 hold 232,000 of them
    L = 300_000
    sums = probability_sums(np.ones((1, L)), [0, 0], [])[0]
    assert_allclose(from_fixed(sums["log_loss"]) / L, -np.log(np.finfo(float).eps), rtol=1e-12)
    assert from_fixed(sums["brier"]) == from_fixed(sums["bin_probability"].sum()) == L


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1])
def test_what_is_no_probability_is_refused(bad):
    with pytest.raises(ValueError, match=r"expected 0\.\.1"):
        probability_sums(np.array([[0.5, bad]]), [0, 0], [])[0]


@given(scores_and_gold(), st.randoms(use_true_random=False))
@ORDINARY
def test_chunks_add_to_the_same_bits_in_any_order(case, random):
    S, Y = case
    n, L = Y.shape
    cuts, pooled_cuts = both_cuts(S, Y)
    P = 1 / (1 + np.exp(-S.astype(np.float64)))
    inverse_p = inverse_propensity(np.arange(L), 100)

    def sums(rows):
        return fold_sums(S[rows], Y[rows], cuts, pooled_cuts, P[rows], inverse_p)

    rows = list(range(n))
    whole = sums(rows)
    random.shuffle(rows)
    cut = random.randint(0, n)
    parts = add_sums(sums(rows[cut:]), sums(rows[:cut]))
    for name in whole:
        assert_array_equal(parts[name], whole[name])
    assert metrics(parts, n, L, cuts, pooled_cuts) == metrics(whole, n, L, cuts, pooled_cuts)


@given(scores_and_gold(), st.randoms(use_true_random=False))
@ORDINARY
def test_cuts_do_not_depend_on_the_order_of_the_positives(case, random):
    S, Y = case
    labels, scores = positive_scores(S, *gold_of(Y))
    order = list(range(len(labels)))
    random.shuffle(order)
    for pooled in (False, True):
        once = positive_cuts(labels, scores, Y.shape[1], pooled)
        again = positive_cuts(labels[order], scores[order], Y.shape[1], pooled)
        assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))
        assert once.positives.sum() == Y.sum()


def test_every_metric_has_its_name():
    S, Y = np.array([[0.3, -1.0], [2.0, 0.1]]), np.array([[True, False], [False, True]])
    cuts, pooled_cuts = both_cuts(S, Y)
    sums = fold_sums(S, Y, cuts, pooled_cuts, 1 / (1 + np.exp(-S)), np.ones(2))
    found = metrics(sums, 2, 2, cuts, pooled_cuts)
    assert list(found) == [
        "micro_precision",
        "micro_recall",
        "micro_f1",
        "macro_f1",
        "macro_f1_all",
        "weighted_f1",
        "samples_f1",
        "subset_accuracy",
        "hamming_loss",
        "jaccard_samples",
        "p_at_1",
        "p_at_3",
        "p_at_5",
        "r_at_5",
        "r_at_10",
        "rp_at_5",
        "ndcg_at_1",
        "ndcg_at_3",
        "ndcg_at_5",
        "psp_at_1",
        "psp_at_3",
        "psp_at_5",
        "map_at_5",
        "map_at_10",
        "lrap",
        "coverage_error",
        "ranking_loss",
        "average_precision_macro",
        "average_precision_micro",
        "roc_auc_macro",
        "ece",
        "brier",
        "log_loss",
    ]


def test_an_empty_fold_is_the_argument_everywhere():
    S = np.zeros((0, 2))
    cuts, pooled_cuts = both_cuts(S, S)
    sums = fold_sums(S, S, cuts, pooled_cuts, S, np.ones(2))
    found = metrics(sums, 0, 2, cuts, pooled_cuts, if_undefined=0.7)
    assert set(found.values()) == {0.7}
