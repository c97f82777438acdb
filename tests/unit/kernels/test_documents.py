import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit, logit
from scipy.stats import poisson

from pipeline.kernels.documents import (
    MOST,
    TOLERANCE,
    expected_f1,
    keep_most_probable,
    samples_f1,
    tag_at_least_one,
)
from tests.reference import expected_f1_of_sets, ranked_labels


def every(Z):
    return np.ones(Z.shape[1], np.bool_)


def said(Z, if_undefined=0.0, may=None):
    """Label ids of each document's tags."""
    tags = samples_f1(Z, every(Z) if may is None else may, if_undefined)
    assert tags.dtype == np.bool_
    assert tags.shape == Z.shape
    return [np.flatnonzero(row).tolist() for row in tags]


def probabilities(L, seed):
    rng = np.random.default_rng(seed)
    return rng.permutation(np.round(expit(rng.normal(-1.5, 2.5, L)), 3))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("if_undefined", [0.0, 1.0])
def test_the_most_probable_labels_are_the_best_set_of_their_size_and_the_size_is_the_best(seed, if_undefined):
    p = probabilities(1 + seed % 7, seed)
    of_sets = expected_f1_of_sets(p, if_undefined)
    order = ranked_labels(p)
    by_size = expected_f1(p[order], 0.0, if_undefined)
    for k in range(p.size + 1):
        best_of_size = max(value for labels, value in of_sets.items() if len(labels) == k)
        assert_allclose(of_sets[tuple(sorted(order[:k]))], best_of_size, rtol=1e-12)
        assert_allclose(by_size[k], best_of_size, rtol=1e-12)
    [tags] = said(logit(p)[None], if_undefined)
    assert of_sets[tuple(tags)] >= max(of_sets.values()) - 2 * TOLERANCE


def test_the_labels_beyond_count_as_a_poisson_number_of_gold_labels():
    p, rest = np.array([0.9, 0.4, 0.2]), 1.7
    found = expected_f1(p, rest, 1.0)
    # the same labels with t more that are surely gold and never said
    exact = np.zeros(4)
    for t in range(60):
        sure = expected_f1(np.concatenate([p, np.ones(t)]), 0.0, 1.0)[:4]
        # their tail is behind them here, so that the prefix sizes are the same
        exact += poisson.pmf(t, rest) * sure
    assert_allclose(found, exact, rtol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_many_small_probabilities_together_are_within_their_bound(seed):
    rng = np.random.default_rng(seed)
    p = np.sort(np.concatenate([expit(rng.normal(0, 2, 8)), expit(rng.normal(-5, 1, 400))]))[::-1]
    exact = expected_f1(p, 0.0, 0.0)
    for m in (1, 8, 30):
        error = np.abs(expected_f1(p[:m], p[m:].sum(), 0.0) - exact[: m + 1]).max()
        assert 0 < error <= (p[m:] ** 2).sum() / 12


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("if_undefined", [0.0, 1.0])
def test_thousands_of_labels_give_what_all_of_them_one_by_one_give(seed, if_undefined):
    rng = np.random.default_rng(seed)
    Z = np.concatenate([rng.normal(seed - 4, 2, 12), rng.normal(-8, 1.5, 700)])
    ranked = np.array(ranked_labels(Z))
    exact = expected_f1(expit(Z)[ranked], 0.0, if_undefined)
    [tags] = said(Z[None], if_undefined)
    assert sorted(ranked[: len(tags)]) == tags
    assert exact[len(tags)] >= exact.max() - 2 * TOLERANCE


def test_labels_that_are_equally_improbable_are_all_looked_at():
    """Where every label has the same small chance every further tag helps: no fixed number of candidates would do."""
    Z = np.full((1, 300), logit(2e-4))
    assert np.argmax(expected_f1(expit(Z[0]), 0.0, 0.0)) == 300
    assert said(Z) == [list(range(300))]
    assert said(np.full((1, MOST + 40), -7.0)) == [list(range(MOST))]


def test_nothing_is_said_only_where_that_counts():
    Z = np.array([[-5.0, -6.0, -7.0], [3.0, -6.0, -7.0]])
    assert said(Z, 0.0) == [[0], [0]]
    assert said(Z, 1.0) == [[], [0]]


def test_equal_log_odds_go_by_label_and_equal_probabilities_by_log_odds():
    # the fourth label adds nothing that the third does not, and F1 of three of four is best
    Z = np.array([[1.0, 1.0, 1.0, 1.0]])
    for k, tags in ((1, [0]), (3, [0, 1, 2])):
        kept = np.ones((1, 4), np.bool_)
        keep_most_probable(kept, Z, k)
        assert np.flatnonzero(kept[0]).tolist() == tags
    sure = np.array([[40.0, 60.0, 50.0, 900.0]])  # all have probability 1 in float64
    kept = np.ones((1, 4), np.bool_)
    keep_most_probable(kept, sure, 2)
    assert np.flatnonzero(kept[0]).tolist() == [1, 3]
    # of eight equal labels not all are worth saying beside a sure one; those that are come first
    Z = np.array([[*[-0.4] * 8, 9.0]])
    [tags] = said(Z)
    assert tags == [*range(len(tags) - 1), 8]


def test_a_label_that_may_not_be_tagged_plays_no_part():
    rng = np.random.default_rng(0)
    Z = rng.normal(-1, 2, (40, 9))
    may = np.arange(9) % 3 != 1
    without = said(Z[:, may])
    assert said(Z, may=may) == [np.flatnonzero(may)[tags].tolist() for tags in without]
    assert without != said(Z)
    assert said(Z[:3], may=np.zeros(9, np.bool_)) == [[], [], []]


def test_documents_do_not_know_each_other_and_odd_values_are_not_said():
    rng = np.random.default_rng(1)
    Z = rng.normal(-4, 3, (30, 60))
    Z[3, :20], Z[4, 5], Z[5] = np.nan, np.inf, -np.inf
    together = said(Z)
    assert together == [said(row[None])[0] for row in Z]
    assert not set(together[3]) & set(range(20))
    assert 5 in together[4]
    assert together[5] == []
    assert said(np.empty((0, 3))) == []
    assert said(np.empty((2, 0))) == [[], []]


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_the_most_probable_tags_stay(n):
    rng = np.random.default_rng(n)
    Z = np.round(rng.normal(size=(60, 12)), 1)  # with ties
    Z[4, 3] = np.nan
    tagged = rng.random(Z.shape) < 0.6
    want = np.zeros_like(tagged)
    for i, row in enumerate(np.where(np.isnan(Z), -np.inf, Z)):
        want[i, [j for j in ranked_labels(row) if tagged[i, j]][:n]] = True
    keep_most_probable(tagged, Z, n)
    assert_array_equal(tagged, want)


def test_a_document_without_a_tag_gets_its_first_label():
    Z = np.array([[-2.0, -1.0, -1.0], [9.0, 0.0, 3.0], [-1.0, -9.0, -3.0], [np.nan, -np.inf, -np.inf]])
    tagged = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]], np.bool_)
    tag_at_least_one(tagged, Z, np.ones(3, np.bool_), 0.0)
    assert_array_equal(tagged, [[0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    tagged[:] = False
    tag_at_least_one(tagged, Z, np.array([True, False, True]), 0.0)
    assert_array_equal(tagged, [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0]])


def test_the_first_label_must_lead_the_second_by_the_gap():
    Z = np.array([[-1.0, -3.0, -9.0], [-3.0, -1.5, -9.0], [-9.0, -9.0, -1.0]])
    for gap, want in ((0.0, [0, 1, 2]), (1.5, [0, 1, 2]), (1.6, [0, 2]), (2.0, [0, 2]), (3.0, [2])):
        tagged = np.zeros((3, 3), np.bool_)
        tag_at_least_one(tagged, Z, np.ones(3, np.bool_), gap)
        assert np.nonzero(tagged)[1].tolist() == want, gap
    tagged = np.zeros((3, 3), np.bool_)
    tag_at_least_one(tagged, Z, np.array([True, False, False]), 99.0)  # no second label to lead
    assert_array_equal(tagged.any(axis=1), [True] * 3)
