import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from pipeline.kernels.curves import BINS, bin_centres, bin_edges, curve, histogram
from tests.reference import best_f1, counts_at

ORDINARY = settings(deadline=None, max_examples=150)

# few values, so that ties are common; neighbours in float32, so that half way is not always a float32
LEVELS = [-20.0, -1.5, -1e-45, 0.0, 1e-45, float(np.nextafter(np.float32(1), np.float32(0))), 1.0, 3.25, 1e6]
row = st.tuples(st.sampled_from(LEVELS) | st.floats(-30, 30, width=32), st.booleans())
rows = st.lists(row, max_size=14).map(
    lambda pairs: (np.array([s for s, _ in pairs], np.float32), np.array([y for _, y in pairs], np.bool_))
)


@given(rows)
@ORDINARY
def test_one_triple_just_below_every_distinct_score_of_a_positive(case):
    scores, positive = case
    cut, tp, fp = curve(scores, positive)
    levels = sorted({float(s) for s in scores[positive]}, reverse=True)
    assert cut.size == tp.size == fp.size == len(levels)
    for level, found, p, n in zip(levels, cut, tp, fp, strict=True):
        lower = [float(s) for s in scores if s < level]
        assert found < level
        assert not lower or found > max(lower)
        assert (p, n) == counts_at(scores, positive, level)


@given(rows)
@ORDINARY
def test_counts_are_those_of_score_at_or_above_the_cut(case):
    scores, positive = case
    for cut, tp, fp in zip(*curve(scores, positive), strict=True):
        assert (tp, fp) == counts_at(scores, positive, cut)
        assert not (scores == cut).any()


@given(rows, st.randoms(use_true_random=False))
@ORDINARY
def test_order_of_the_rows_does_not_matter(case, random):
    scores, positive = case
    order = list(range(scores.size))
    random.shuffle(order)
    for a, b in zip(curve(scores, positive), curve(scores[order], positive[order]), strict=True):
        assert_array_equal(a, b)


@given(rows)
@ORDINARY
def test_the_best_f1_of_all_cuts_is_on_the_curve(case):
    scores, positive = case
    _, tp, fp = curve(scores, positive)
    if positive.any():
        assert (2 * tp / (tp + fp + positive.sum())).max() == best_f1(scores, positive)


def test_tied_scores_are_not_separated():
    """A sweep that steps through ties would find the two positives before the negatives, and F1 = 1."""
    cut, tp, fp = curve(np.full(5, 0.5, np.float32), np.array([1, 1, 0, 0, 0], np.bool_))
    assert_array_equal([cut, tp, fp], [[-0.5], [2], [3]])


def test_cuts_fall_and_counts_rise():
    rng = np.random.default_rng(0)
    cut, tp, fp = curve(rng.normal(size=5000).astype(np.float32), rng.random(5000) < 0.1)
    assert (np.diff(cut) < 0).all()
    assert (np.diff(tp) > 0).all()
    assert (np.diff(fp) >= 0).all()


def test_a_label_without_positives_has_an_empty_curve():
    assert [a.size for a in curve(np.arange(4, dtype=np.float32), np.zeros(4, np.bool_))] == [0, 0, 0]


@given(rows)
@ORDINARY
def test_histogram_counts_every_row_once(case):
    scores, positive = case
    positives, negatives = histogram(scores, positive)
    assert (positives.size, negatives.size) == (BINS, BINS)
    want = np.clip(np.searchsorted(bin_edges(), scores.astype(np.float64), side="right") - 1, 0, BINS - 1)
    assert_array_equal(positives, np.bincount(want[positive], minlength=BINS))
    assert_array_equal(negatives, np.bincount(want[~positive], minlength=BINS))


def test_scores_outside_the_range_are_in_the_outer_bins():
    scores = np.array([-1e30, -np.inf, -16.01, 16, 400, 1e30, np.inf], np.float32)
    positives, negatives = histogram(scores, np.arange(7) < 3)
    assert positives[0] == positives.sum() == 3
    assert negatives[-1] == negatives.sum() == 4


def test_an_edge_belongs_to_the_bin_above_it():
    edges = bin_edges()[:-1].astype(np.float32)
    positives, _ = histogram(edges, np.ones(BINS, np.bool_))
    assert_array_equal(positives, 1)
    assert_array_equal(bin_centres(), (bin_edges()[:-1] + bin_edges()[1:]) / 2)
