import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit
from sklearn.calibration import _SigmoidCalibration
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, log_loss

from pipeline.kernels.calibration import (
    KNOT_SLOPE,
    MIN_SLOPE,
    calibration_error,
    isotonic,
    log_odds_at,
    losses,
    platt,
    pool_violators,
    probability,
    quality,
    temperature,
)
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


def rows_of(positives, negatives):
    """Binned counts -> one score and one gold a row."""
    p, n = positives.astype(int), negatives.astype(int)
    scores = np.concatenate([np.repeat(bin_centres(), p), np.repeat(bin_centres(), n)])
    return scores, np.repeat([1, 0], [p.sum(), n.sum()])


def filled_with(filled):
    positives, negatives = np.zeros(BINS), np.zeros(BINS)
    for at, p, n in filled:
        positives[at], negatives[at] = p, n
    return positives, negatives


def test_platt_equals_sklearn():
    counts = drawn(0.7, -2.0)
    reference = _SigmoidCalibration().fit(*rows_of(*counts))  # sigmoid(-(a score + b))
    assert_allclose(platt(bin_centres(), *counts), (-reference.a_, -reference.b_), rtol=0, atol=2e-4)


@pytest.mark.parametrize(("a", "b"), [(1.0, np.nan), (3.0, 5.0), (MIN_SLOPE, 9.0), (50.0, -400.0)])
def test_platt_comes_to_the_same_wherever_it_starts(a, b):
    counts = drawn(1.3, -2.0)
    assert_allclose(platt(bin_centres(), *counts, a, b, 1e-10), platt(bin_centres(), *counts), rtol=1e-6)


@pytest.mark.parametrize(("a", "b"), [(1, 0), (0.2, -1), (6, 0), (2.5, 3)])
def test_temperature_equals_a_general_minimiser(a, b):
    positives, negatives = drawn(a, b)
    high, low = targets(positives, negatives)
    weight, wanted, s = positives + negatives, positives * high + negatives * low, bin_centres()
    reference = minimize_scalar(
        lambda x: (weight * np.logaddexp(0, x * s) - wanted * x * s).sum(),
        bounds=(MIN_SLOPE, 50),
        method="bounded",
        options={"xatol": 1e-9},
    )
    found = temperature(s, positives, negatives)
    assert_allclose(found, reference.x, rtol=1e-5)
    if b == 0:
        assert_allclose(found, a, rtol=0.1)
    assert_allclose(s @ (weight * expit(found * s) - wanted), 0, atol=1e-6 * weight.sum())  # the loss is flat there


def test_temperature_at_its_ends():
    nothing, some = np.zeros(BINS), np.zeros(BINS)
    assert temperature(bin_centres(), nothing, nothing) == 1.0
    assert temperature(bin_centres(), *drawn(-1.0, 0.0)) == MIN_SLOPE
    some[700:720] = 50  # separable: positives above 0, negatives below
    a = temperature(bin_centres(), some, some[::-1].copy())
    assert 1 < a < 10
    huge = temperature(bin_centres() * 1e-6, *drawn(1.0, 0.0))
    assert_allclose(huge, 1e6 * temperature(bin_centres(), *drawn(1.0, 0.0)), rtol=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_are_those_of_isotonic_regression(seed):
    counts = drawn(0.5, -1.0, n=2000, seed=seed)
    scores, gold = rows_of(*counts)
    expected = IsotonicRegression().fit(scores, gold).predict(bin_centres())
    score, p, n = pool_violators(bin_centres(), *counts)
    assert (np.diff(p / (p + n)) > 0).all()
    assert_allclose([p.sum(), n.sum()], [gold.sum(), (1 - gold).sum()])
    assert_allclose(score @ (p + n), scores.sum(), atol=1e-8)
    filled = np.flatnonzero(counts[0] + counts[1])
    # each bin has the share of its block: the blocks hold the filled bins in order
    owner = np.searchsorted(np.cumsum(p + n), np.cumsum((counts[0] + counts[1])[filled]) - 1e-9)
    assert_allclose((p / (p + n))[owner], expected[filled], atol=1e-12)


def test_isotonic_without_merging_is_the_blocks_with_a_half_each():
    positives, negatives = filled_with([(300, 1, 999), (500, 100, 300), (600, 300, 100), (700, 50, 0)])
    knot_score, knot_log_odds = isotonic(bin_centres(), positives, negatives, 0.0)
    assert_allclose(knot_score, bin_centres()[[300, 500, 600, 700]])
    assert_allclose(knot_log_odds, np.log([1.5 / 999.5, 100.5 / 300.5, 300.5 / 100.5, 50.5 / 0.5]))


def test_isotonic_merges_what_costs_less_than_a_parameter():
    positives, negatives = filled_with([(300, 10, 90), (310, 11, 89), (500, 60, 40)])
    assert isotonic(bin_centres(), positives, negatives, 0.0)[0].size == 3
    knot_score, knot_log_odds = isotonic(bin_centres(), positives, negatives)
    assert_allclose(knot_score[0], bin_centres()[[300, 310]].mean())
    assert_allclose(knot_log_odds, np.log([21.5 / 179.5, 60.5 / 40.5]))
    many = isotonic(bin_centres(), *drawn(0.5, -1.0, n=20_000))
    assert 3 <= many[0].size <= 20


@pytest.mark.parametrize(("more", "knots"), [(16, 1), (19, 2)])  # cost 0.8 and 1.6 nats; a parameter costs 1
def test_a_block_must_be_worth_a_parameter(more, knots):
    filled = filled_with([(300, 10, 90), (500, more, 100 - more)])
    assert isotonic(bin_centres(), *filled)[0].size == knots


def test_small_blocks_that_their_halves_turn_are_one():
    knot_score, knot_log_odds = isotonic(bin_centres(), *filled_with([(300, 0, 1), (310, 1, 9)]), 0.0)
    assert_allclose(knot_log_odds, np.log([2 / 11]))
    assert_allclose(knot_score, [bin_centres()[[300, 310]] @ [2, 11] / 13])


def test_between_knots_the_slope_has_a_floor():
    filled = filled_with([(100, 100_000, 100_000), (900, 100_001, 100_000)])
    knot_score, knot_log_odds = isotonic(bin_centres(), *filled, 0.0)
    assert_allclose(np.diff(knot_log_odds), KNOT_SLOPE * np.diff(knot_score))


def test_isotonic_finds_a_bent_map():
    rng = np.random.default_rng(0)
    s = bin_centres()
    truth = np.where(s < 0, 0.3 * s - 2, 2 * s - 2)
    n = rng.poisson(400 * np.exp(-((s / 4) ** 2)))
    positives = rng.binomial(n, expit(truth)).astype(float)
    said = log_odds_at(s, *isotonic(s, positives, n - positives))
    assert n @ abs(expit(said) - expit(truth)) / n.sum() < 0.01
    a, b = platt(s, positives, n - positives)
    assert n @ abs(expit(a * s + b) - expit(truth)) / n.sum() > 0.02


def test_isotonic_without_counts_has_no_knots():
    knot_score, knot_log_odds = isotonic(bin_centres(), np.zeros(BINS), np.zeros(BINS))
    assert knot_score.size == knot_log_odds.size == 0


@given(
    counts, st.lists(st.integers(-(2**26), 2**26), min_size=2, max_size=40, unique=True), st.sampled_from([0.0, 1.0])
)
@ORDINARY
def test_lines_through_knots_never_move_the_ranking(filled, scores, worth):
    positives, negatives = filled_with(filled)
    knots = isotonic(bin_centres(), positives, negatives, worth)
    assert (knots[0].size > 0) == (positives.sum() + negatives.sum() > 0)
    if knots[0].size:
        assert np.isfinite(knots).all()
        assert (np.diff(knots[0]) > 0).all()
        scores = np.sort(scores) / 2**20  # from -64 to 64, a millionth apart at least
        found = log_odds_at(scores, *knots)
        assert (np.diff(found) > 0).all()
        assert (np.diff(found) >= 0.99 * KNOT_SLOPE * np.diff(scores) - 1e-13).all()
        assert_allclose(log_odds_at(knots[0], *knots), knots[1], atol=1e-12)


def test_outside_the_knots_the_slope_is_the_least_of_a_line():
    found = log_odds_at(np.array([[-3.0, -1.0], [2.0, 12.0]], np.float32), np.array([-1.0, 2.0]), np.array([-4.0, 5.0]))
    assert_allclose(found, [[-4.0 - 2 * MIN_SLOPE, -4.0], [5.0, 5.0 + 10 * MIN_SLOPE]])
    assert_allclose(log_odds_at(np.array([0.5]), np.array([-1.0]), np.array([2.0])), 2.0 + 1.5 * MIN_SLOPE)


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (3.0, -4.0), (0.1, 2.0)])
def test_brier_and_log_loss_equal_sklearn_on_the_rows(a, b):
    counts = drawn(1.0, -1.0)
    scores, gold = rows_of(*counts)
    brier, nats, _ = quality(*counts, a * bin_centres() + b)
    said = expit(a * scores + b)
    assert_allclose(brier, brier_score_loss(gold, said), rtol=1e-9)
    assert_allclose(nats, log_loss(gold, said), rtol=1e-9)


def test_losses_add_and_do_not_overflow():
    one, other = drawn(1.0, 0.0, seed=1), drawn(2.0, 1.0, seed=2)
    z = 1.5 * bin_centres() - 1
    both = losses(one[0] + other[0], one[1] + other[1], z)
    for whole, p, q in zip(both, losses(*one, z), losses(*other, z), strict=True):
        assert_allclose(whole, p + q)
    squares, nats, expected = losses(np.array([1.0, 1.0]), np.array([1.0, 1.0]), np.array([-1e3, 1e3]))
    assert (squares, nats) == (2.0, 2e3)
    assert_allclose(expected, [0.0, 2.0])


def ece_by_rows(gold, said, groups):
    """Rows in ascending order of score, one list a bin: groups grow by whole bins until they hold their part of the
    rest."""
    rest, total = sum(map(len, gold)), sum(map(len, gold))
    error, group = 0.0, []
    for in_bin, q in zip(gold, said, strict=True):
        group += [(y, q) for y in in_bin]
        if group and len(group) >= rest / groups:
            error += abs(sum(y - q for y, q in group))
            rest, groups, group = rest - len(group), max(groups - 1, 1), []
    return (error + abs(sum(y - q for y, q in group))) / total


@given(counts.filter(lambda filled: sum(p + n for _, p, n in filled) > 0), st.integers(1, 20))
@ORDINARY
def test_ece_equals_a_slow_one(filled, groups):
    positives, negatives = filled_with([(at, p % 30, n % 30 + 1) for at, p, n in filled])
    said = expit(0.8 * bin_centres() - 1)
    gold = [[1] * int(p) + [0] * int(n) for p, n in zip(positives, negatives, strict=True)]
    found = calibration_error(positives, negatives, (positives + negatives) * said, groups)
    assert_allclose(found, ece_by_rows(gold, said, groups), atol=1e-12)
    assert 0 <= found <= 1


def test_ece_groups_hold_the_same_mass_and_a_full_bin_leaves_the_others_theirs():
    even = np.ones(150)
    wrong = np.where(np.arange(150) % 10 < 5, 1.0, -1.0)  # cancels within each of 15 groups of 10 bins
    assert_allclose(calibration_error(even, even, even + wrong), 0.0)
    assert_allclose(calibration_error(even, even, even + wrong, 30), 0.5)
    negatives = np.concatenate([[1e6], np.ones(14)])
    expected = np.concatenate([[0.0], np.tile([1.0, -1.0], 7)])  # cancels unless every bin is a group
    assert_allclose(calibration_error(np.zeros(15), negatives, expected), 14 / (1e6 + 14))


def test_quality_of_nothing_is_unknown():
    assert np.isnan(quality(np.zeros(BINS), np.zeros(BINS), bin_centres())).all()


def test_of_calibrated_probabilities_half_the_best_f1_is_the_best_threshold():
    """Lipton, Elkan, Narayanaswamy 2014: a row is tagged where its probability is above half the F1 that is reached."""
    s = bin_centres()
    weight = np.exp(-(((s + 4) / 3) ** 2))
    positives, negatives = weight * expit(1.3 * s + 1), weight * expit(-(1.3 * s + 1))
    # Platt's targets are smoothed, which many counts make small
    a, b = platt(s, positives * 1e7, negatives * 1e7)
    assert_allclose((a, b), (1.3, 1.0), rtol=1e-3)
    tp, fp = np.cumsum(positives[::-1])[::-1], np.cumsum(negatives[::-1])[::-1]
    f1 = 2 * tp / (tp + fp + tp[0])
    best = np.argmax(f1)
    assert expit(a * s[best] + b) > f1[best] / 2 > expit(a * s[best - 1] + b)
