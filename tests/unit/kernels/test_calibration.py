import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize
from scipy.special import expit

from pipeline.kernels.calibration import MIN_SLOPE, platt, probability
from pipeline.kernels.curves import BINS, bin_centres

ORDINARY = settings(deadline=None, max_examples=60)


def targets(positives, negatives):
    """Platt's smoothed targets of positives and of negatives."""
    return (positives.sum() + 1) / (positives.sum() + 2), 1 / (negatives.sum() + 2)


def platt_by_scipy(centres, positives, negatives):
    high, low = targets(positives, negatives)
    weight, wanted = positives + negatives, positives * high + negatives * low

    def loss(ab):
        z = ab[0] * centres + ab[1]
        error = (weight * expit(z) - wanted) / weight.sum()
        value = (weight * np.logaddexp(0, z) - wanted * z).sum() / weight.sum()
        return value, np.array([error @ centres, error.sum()])

    return minimize(loss, [0.5, 0.0], jac=True, method="BFGS", options={"gtol": 1e-10}).x


def drawn(a, b, n=5000, seed=0):
    """Counts in bins of n scores whose log-odds are a score + b."""
    rng = np.random.default_rng(seed)
    bins = np.clip(rng.normal(BINS / 2, 90, n), 0, BINS - 1).astype(int)
    positive = rng.random(n) < expit(a * bin_centres()[bins] + b)
    return tuple(np.bincount(bins[mask], minlength=BINS).astype(np.float64) for mask in (positive, ~positive))


@pytest.mark.parametrize(("a", "b"), [(1, 0), (0.3, -3), (2.5, 4), (0.8, -6)])
def test_equals_a_general_minimiser(a, b):
    counts = drawn(a, b)
    found = platt(bin_centres(), *counts)
    assert_allclose(found, platt_by_scipy(bin_centres(), *counts), rtol=0, atol=1e-4)
    assert_allclose(found, (a, b), rtol=0.25, atol=0.25)


def test_fractions_of_counts_are_allowed():
    positives, negatives = drawn(1.2, -2)
    found = platt(bin_centres(), positives * 0.37, negatives * 0.37)
    assert_allclose(found, platt_by_scipy(bin_centres(), positives * 0.37, negatives * 0.37), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shift", [-9.0, 0.0, 9.0])
def test_moving_the_scores_moves_only_the_intercept(shift):
    counts = drawn(1.0, -1.0)
    a, b = platt(bin_centres(), *counts)
    moved_a, moved_b = platt(bin_centres() + shift, *counts)
    assert_allclose([moved_a, moved_b], [a, b - a * shift], rtol=0, atol=1e-4)


@pytest.mark.parametrize("a", [-3.0, -0.4, 0.0])
def test_an_inverted_label_keeps_its_ranking_and_the_right_mean(a):
    positives, negatives = drawn(a, -2.0)
    slope, intercept = platt(bin_centres(), positives, negatives)
    assert slope == MIN_SLOPE
    high, low = targets(positives, negatives)
    said = (positives + negatives) @ expit(slope * bin_centres() + intercept)
    assert_allclose(said, positives.sum() * high + negatives.sum() * low, rtol=1e-9)
    assert_allclose(said / (positives + negatives).sum(), positives.sum() / (positives + negatives).sum(), rtol=0.01)


def test_the_mean_probability_is_right_for_ordinary_labels_too():
    positives, negatives = drawn(1.1, -3.0)
    a, b = platt(bin_centres(), positives, negatives)
    high, low = targets(positives, negatives)
    said = (positives + negatives) @ expit(a * bin_centres() + b)
    assert_allclose(said, positives.sum() * high + negatives.sum() * low, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 10, 1e6])
def test_separable_counts_give_a_finite_map(size):
    positives, negatives = np.zeros(BINS), np.zeros(BINS)
    positives[600:650], negatives[300:350] = size, size
    a, b = platt(bin_centres(), positives, negatives)
    assert MIN_SLOPE < a < 1e3
    assert np.isfinite(b)
    p = expit(a * bin_centres() + b)
    assert p[600:].min() > 0.9
    assert p[:350].max() < 0.1


@pytest.mark.parametrize("kind", ["positives", "negatives"])
def test_one_class_alone_is_finite(kind):
    counts = {"positives": np.zeros(BINS), "negatives": np.zeros(BINS)}
    counts[kind][500] = 7
    a, b = platt(bin_centres(), **counts)
    assert a >= MIN_SLOPE
    assert np.isfinite(b)
    smoothed = 8 / 9 if kind == "positives" else 1 / 9
    assert_allclose(expit(a * bin_centres()[500] + b), smoothed, atol=1e-6)


def test_no_counts_change_nothing():
    assert platt(bin_centres(), np.zeros(BINS), np.zeros(BINS)) == (1.0, 0.0)


counts = st.lists(st.tuples(st.integers(0, BINS - 1), st.integers(0, 2000), st.integers(0, 2000)), max_size=6)


@given(counts)
@ORDINARY
def test_any_counts_give_a_rising_finite_map(filled):
    positives, negatives = np.zeros(BINS), np.zeros(BINS)
    for at, p, n in filled:
        positives[at], negatives[at] = p, n
    a, b = platt(bin_centres(), positives, negatives)
    assert a >= MIN_SLOPE
    assert np.isfinite([a, b]).all()
    # the ranking within a label is that of the scores
    scores = np.random.default_rng(0).normal(size=(50, 1)).astype(np.float32)
    log_odds = scores.astype(np.float64) * a + b
    assert_array_equal(np.argsort(scores[:, 0]), np.argsort(log_odds[:, 0]))


def test_probability_is_the_sigmoid_label_by_label():
    S = np.array([[0.0, 1.0], [-800.0, 1e30]], np.float32)
    found = probability(S, np.array([1.0, 2.0]), np.array([0.0, -1.0]))
    assert found.dtype == np.float64
    assert_allclose(found, expit(S.astype(np.float64) * [1, 2] + [0, -1]))
