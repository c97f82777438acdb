import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import expit, logit

from pipeline.kernels import thresholds
from pipeline.kernels.curves import BINS, bin_edges, curve, histogram
from pipeline.kernels.thresholds import Curves, Goal, Histograms, at_or_above, global_cut, label_cuts, peers, prior
from tests.reference import best_f1, counts_at

ORDINARY = settings(deadline=None, max_examples=100)

# scores on bin edges from -2.5 to 2.5, and the edges around them
EDGES = bin_edges()[431:594]
label = st.lists(st.tuples(st.integers(-40, 40).map(lambda k: k / 16), st.booleans()), min_size=1, max_size=14)


def arrays_of(pairs):
    return np.array([s for s, _ in pairs], np.float32), np.array([y for _, y in pairs], np.bool_)


def histograms(labels):
    """[(scores, positive), ...] -> Histograms."""
    filled = [np.stack(histogram(s, y)) for s, y in labels]
    bins = [np.flatnonzero(f.sum(axis=0)) for f in filled]
    return Histograms(
        np.concatenate([[0], np.cumsum([b.size for b in bins])]).astype(np.int64),
        np.concatenate([np.empty(0, np.int32), *bins]).astype(np.int32),
        *(
            np.concatenate([np.empty(0, np.int64), *(f[k][b] for f, b in zip(filled, bins, strict=True))])
            for k in (0, 1)
        ),
    )


def curves(labels):
    """[(scores, positive), ...] -> Curves."""
    found = [curve(s, y) for s, y in labels]
    indptr = np.concatenate([[0], np.cumsum([cut.size for cut, _, _ in found])]).astype(np.int64)
    return Curves(indptr, *(np.concatenate([f[k] for f in found]) for k in range(3)))


def cuts_of(labels, order=None, peers_of=None, **goal):
    """Cut and F of each label; `peers_of` stands for what `peers` finds."""
    h = histograms(labels)
    order = np.arange(len(labels)) if order is None else np.asarray(order)
    return label_cuts(Goal(**goal), order, *curves(labels), *h, *(peers_of or peers(h)))


def cut_of(scores, positive, like=None, **goal):
    """The same of one label whose peers, per positive, are `like`: positives and negatives by bin."""
    peers_of = None
    if like is not None:
        own = [c.astype(np.float64) for c in histogram(scores, positive)]
        peers_of = np.zeros(1, np.int64), *((c + o)[None] for c, o in zip(like, own, strict=True))
    return tuple(float(x[0]) for x in cuts_of([(scores, positive)], peers_of=peers_of, **goal))


@given(label)
@ORDINARY
def test_without_a_guard_it_maximises_f1(pairs):
    scores, positive = arrays_of(pairs)
    cut, f1 = cut_of(scores, positive)
    if positive.any():
        tp, fp = counts_at(scores, positive, cut)
        assert f1 == 2 * tp / (tp + fp + positive.sum()) == best_f1(scores, positive)
    else:
        assert (cut, f1) == (np.inf, 0)


def test_of_equal_cuts_the_highest_is_taken():
    scores = np.array([3, 2, 2, 1, 1], np.float32)  # F1 is 2/3 above 2, at 2/5 and again 4/6 at the bottom
    positive = np.array([1, 0, 0, 1, 0], np.bool_)
    assert cut_of(scores, positive) == (2.5, 2 / 3)
    assert cut_of(np.array([3, 2, 1, 1], np.float32), np.array([1, 0, 1, 0], np.bool_)) == (2.5, 2 / 3)


@given(label, st.floats(0, 1), st.floats(0.01, 5))
@ORDINARY
def test_micro_adds_the_labels_part_in_micro_f1(pairs, micro_f1, micro):
    scores, positive = arrays_of(pairs)
    if not positive.any():
        return
    total = positive.sum()

    def value(tp, fp):
        return 2 * tp / (tp + fp + total) + micro * (2 * tp - micro_f1 * (tp + fp)) / total

    cut, f1 = cut_of(scores, positive, micro=micro, micro_f=micro_f1)
    tp, fp = counts_at(scores, positive, cut)
    best = max(value(*counts_at(scores, positive, s)) for s in [*scores[positive], np.inf])
    assert_allclose(value(tp, fp), best, rtol=1e-12, atol=1e-15)
    assert_allclose(f1, 2 * tp / (tp + fp + total), rtol=1e-12)


@given(label, label, st.floats(0.1, 10))
@ORDINARY
def test_the_guard_is_pseudo_positives_that_behave_as_the_peers(pairs, others, guard):
    """Peers at or above any edge are counted exactly."""
    (scores, positive), (peer_scores, peer_positive) = arrays_of(pairs), arrays_of(others)
    if not (positive.any() and peer_positive.any()):
        return
    share = 1 / peer_positive.sum()
    like = [c * share for c in histogram(peer_scores, peer_positive)]
    cut, f1 = cut_of(scores, positive, like, guard=guard)

    def blended(candidate):
        own, peer = counts_at(scores, positive, candidate), counts_at(peer_scores, peer_positive, candidate)
        p, n = (o + guard * share * q for o, q in zip(own, peer, strict=True))
        return 2 * p / (p + n + positive.sum() + guard)

    assert_allclose(f1, max(map(blended, EDGES)), rtol=1e-9)
    if cut in EDGES:
        assert_allclose(f1, blended(cut), rtol=1e-9)


@given(st.lists(label, min_size=1, max_size=5))
@ORDINARY
def test_global_cut_maximises_micro_f1_over_the_edges(cases):
    cases = [arrays_of(pairs) for pairs in cases]
    cut, f1 = global_cut(histograms(cases))
    support = sum(positive.sum() for _, positive in cases)

    def micro_f1(candidate):
        tp, fp = np.sum([counts_at(s, y, candidate) for s, y in cases], axis=0)
        return 2 * tp / (tp + fp + support)

    if support:
        assert f1 == micro_f1(cut)
        assert_allclose(f1, max(map(micro_f1, EDGES)), rtol=1e-12)
    else:
        assert (cut, f1) == (np.inf, 0)


def test_no_labels_have_no_global_cut():
    assert global_cut(histograms([])) == (np.inf, 0)


def test_at_or_above_counts_from_the_edge_up():
    counts = np.random.default_rng(0).integers(0, 9, (3, BINS))
    found = at_or_above(counts)
    assert found.shape == (3, BINS + 1)
    for k in (0, 1, 500, BINS - 1, BINS):
        assert_array_equal(found[:, k], counts[:, k:].sum(axis=1))


def test_totals_and_support_add_up():
    rng = np.random.default_rng(1)
    cases = [(rng.normal(size=50).astype(np.float32), rng.random(50) < p) for p in (0, 0.1, 0.9)]
    h = histograms(cases)
    assert h.size == 3
    assert_array_equal(h.support(), [y.sum() for _, y in cases])
    for k, total in enumerate(h.totals()):
        assert_array_equal(total, sum(histogram(s, y)[k] for s, y in cases))


def of_support(n, centre, seed=0):
    """A label with n positives around `centre` and 400 negatives around -4."""
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(centre, 0.5, n), rng.normal(-4, 1, 400)]).astype(np.float32)
    return scores, np.arange(scores.size) < n


def test_peers_weigh_less_the_farther_their_support_is():
    cases = [of_support(n, centre) for n, centre in ((4, 2), (4, 2.2), (8, 1), (1000, 6))]
    h = histograms(cases)
    bucket, positives, negatives = peers(h)
    assert bucket[0] == bucket[1] < bucket[2] < bucket[3]
    each = [[c.astype(np.float64) for c in histogram(s, y)] for s, y in cases]
    for at in range(4):
        weight = np.exp(-((np.log(2) / 4 * (bucket - bucket[at]) / 0.7) ** 2) / 2)
        assert_allclose(positives[bucket[at]], sum(w * p for w, (p, _) in zip(weight, each, strict=True)), atol=1e-9)
        assert_allclose(negatives[bucket[at]], sum(w * n for w, (_, n) in zip(weight, each, strict=True)), atol=1e-9)


def test_labels_without_positives_are_nobodys_peers():
    h = histograms([of_support(4, 2), of_support(0, 0)])
    bucket, positives, negatives = peers(h)
    assert_array_equal(bucket, [8, -1])
    assert (positives[8].sum(), negatives[8].sum()) == (4, 400)


def test_the_prior_leaves_the_label_itself_out():
    """Whatever the label's own scores are, what its peers look like is the same."""
    others = [of_support(5, 1, seed) for seed in range(3)]
    found = []
    for own in (of_support(5, 8, 9), of_support(5, -9, 10)):
        h = histograms([*others, own])
        found.append(prior(h, 3, *[x[3] if x.ndim == 1 else x for x in peers(h)]))
    assert_allclose(found[0], found[1], rtol=0, atol=1e-12)
    p, n = found[0]
    assert_allclose(p, sum(histogram(*o)[0] for o in others) / 15)
    assert_allclose(n, sum(histogram(*o)[1] for o in others) / 15)


def test_a_label_alone_has_no_prior():
    h = histograms([of_support(5, 1)])
    bucket, positives, negatives = peers(h)
    assert prior(h, 0, bucket[0], positives, negatives) is None


def guarded(case, others, guard):
    return float(cuts_of([case, *others], guard=guard)[0][0])


def test_the_guard_pulls_a_rare_unlucky_label_to_its_peers():
    """Two positives far below all negatives: its own best cut tags everything."""
    unlucky = of_support(2, -12)
    assert cut_of(*unlucky)[0] < unlucky[0][~unlucky[1]].min()
    assert -3 < guarded(unlucky, [of_support(2, 1, seed) for seed in range(40)], 2.0) < 1


@pytest.mark.parametrize("guard", [0.5, 2.0])
def test_the_guard_leaves_a_frequent_label_alone(guard):
    frequent = of_support(1000, -2)
    alone = cut_of(*frequent)[0]
    company = [of_support(1000, 3, seed) for seed in range(1, 20)]
    assert abs(guarded(frequent, company, guard) - alone) < 0.15
    # a label of three follows the same peers
    rare = of_support(3, -2)
    assert guarded(rare, [of_support(3, 3, seed) for seed in range(1, 20)], 20.0) > cut_of(*rare)[0] + 1


grid = st.lists(st.integers(0, 30), min_size=100, max_size=100)


@given(grid)
@ORDINARY
def test_with_calibrated_probabilities_the_threshold_is_half_the_f1(copies):
    """100 rows of probability k % hold exactly k positives, so scores are calibrated without any noise.

    A level belongs above the cut just when its probability is more than half the optimal F1, and so never above 1/2.
    """
    levels = np.arange(1, 100)
    scores = np.concatenate([np.full(100 * m, logit(k / 100)) for k, m in zip(levels, copies, strict=False)])
    positive = np.concatenate([np.tile(np.arange(100) < k, m) for k, m in zip(levels, copies, strict=False)])
    if not scores.size:
        return
    cut, f1 = cut_of(scores.astype(np.float32), positive.astype(np.bool_))
    p = expit(scores)
    above, below = p[scores >= cut], p[scores < cut]
    assert above.min() >= f1 / 2 - 1e-6
    assert below.max(initial=0) <= f1 / 2 + 1e-6 <= 0.5 + 1e-6


def test_half_the_f1_holds_for_drawn_labels():
    rng = np.random.default_rng(3)
    for a, b in ((1, 9), (2, 30), (0.5, 2), (3, 3)):
        p = rng.beta(a, b, 300_000)
        cut, f1 = cut_of(logit(p).astype(np.float32), rng.random(p.size) < p)
        assert abs(expit(cut) - f1 / 2) < 0.02
        assert expit(cut) < 0.51


# -- every objective against all cuts there are ------------------------------------------------------------------------


def all_cuts(scores):
    """A cut below every distinct score, and one above all."""
    return [*np.unique(scores), np.inf]


GOALS = {
    "f_beta": (Goal(first=2.0), lambda tp, fp, P, N: 5 * tp / (tp + fp + 4 * P)),
    "precision": (
        Goal(thresholds.PRECISION, 0.6),
        lambda tp, fp, P, N: tp / P if tp + fp and tp / (tp + fp) >= 0.6 else -np.inf,
    ),
    "recall": (
        Goal(thresholds.RECALL, 0.6),
        lambda tp, fp, P, N: tp / (tp + fp) if tp / P >= 0.6 else -np.inf,
    ),
    "cost": (Goal(thresholds.COST, 1.5, 4.0), lambda tp, fp, P, N: -1.5 * fp - 4 * (P - tp)),
    "youden": (Goal(thresholds.YOUDEN), lambda tp, fp, P, N: tp / P - fp / N if N else tp / P),
    "pcut": (Goal(thresholds.PCUT), lambda tp, fp, P, N: -abs(tp + fp - P)),
}


@pytest.mark.parametrize("name", GOALS)
@given(pairs=label)
@ORDINARY
def test_the_chosen_cut_is_the_best_of_all(name, pairs):
    scores, positive = arrays_of(pairs)
    goal, value = GOALS[name]
    P, N = positive.sum(), (~positive).sum()
    cut = cut_of(scores, positive, **goal._asdict())[0]
    if P == 0:
        assert cut == np.inf
        return
    best = max(value(*counts_at(scores, positive, c), P, N) for c in all_cuts(scores))
    if best == -np.inf:
        assert cut == np.inf  # no cut keeps the floor: nothing is tagged
    else:
        assert_allclose(value(*counts_at(scores, positive, cut), P, N), best, rtol=1e-12)


def serial(cases, order, found):
    """The joint rule label by label: each cut that was found is the best given those before it."""
    TP = FP = FN = 0
    for k in order:
        scores, positive = cases[k]
        P = positive.sum()
        if P == 0:
            assert found[k] == np.inf
            continue

        def value(cut, scores=scores, positive=positive, P=P, sums=(TP, FP, FN)):
            tp, fp = counts_at(scores, positive, cut)
            p, n, m = sums[0] + tp, sums[1] + fp, sums[2] + P - tp
            return 2 * tp / (tp + fp + P) + 2 * p / (2 * p + n + m)

        assert_allclose(value(found[k]), max(map(value, all_cuts(scores))), rtol=1e-12)
        tp, fp = counts_at(scores, positive, found[k])
        TP, FP, FN = TP + tp, FP + fp, FN + P - tp


@given(st.lists(label, min_size=1, max_size=5), st.permutations(range(5)))
@ORDINARY
def test_the_joint_rule_is_its_serial_definition(cases, order):
    cases = [arrays_of(pairs) for pairs in cases]
    order = [k for k in order if k < len(cases)]
    serial(cases, order, cuts_of(cases, order, joint=True)[0])


@pytest.mark.parametrize("seed", range(8))
def test_the_joint_rule_remembers_hits_errors_and_misses(seed):
    """Hard labels of many rows, so that every sum decides about some cut."""
    rng = np.random.default_rng(seed)
    cases = []
    for _ in range(12):
        positive = rng.random(120) < rng.uniform(0.05, 0.5)
        positive[0] = True
        cases.append(((rng.normal(0, 1, 120) + 0.7 * positive).astype(np.float32), positive))
    serial(cases, range(12), cuts_of(cases, joint=True)[0])


@given(label)
@ORDINARY
def test_smoothed_f_may_tag_nothing(pairs):
    scores, positive = arrays_of(pairs)
    if not positive.any():
        return
    cut = cut_of(scores, positive, smooth=1.0)[0]

    def value(c):
        tp, fp = counts_at(scores, positive, c)
        return (2 * tp + 1) / (tp + fp + positive.sum() + 2)

    assert_allclose(value(cut), max(map(value, all_cuts(scores))), rtol=1e-12)


@given(label)
@ORDINARY
def test_otsu_separates_the_scores_with_the_most_variance_between(pairs):
    scores, positive = arrays_of(pairs)
    h = histograms([(scores, positive)])
    cut = thresholds.otsu_cuts(h.indptr, h.bins, h.positives + h.negatives)[0]
    centres = np.floor(scores * 32) / 32 + 1 / 64

    def between(c):
        up = scores >= c
        if up.all() or not up.any():
            return 0.0
        return up.sum() * (~up).sum() * (centres[up].mean() - centres[~up].mean()) ** 2

    best = max(map(between, all_cuts(scores)))
    if best == 0:
        assert cut == np.inf
    else:
        assert_allclose(between(cut), best, rtol=1e-9)


@given(st.lists(label, min_size=1, max_size=4), st.integers(0, 40))
@ORDINARY
def test_a_budget_is_kept_and_used_up_to_a_bin(cases, tags):
    cases = [arrays_of(pairs) for pairs in cases]
    h = histograms(cases)
    cut = thresholds.budget_cut(h, thresholds.centres_of(h), tags)
    scores = np.concatenate([np.floor(s * 32) / 32 + 1 / 64 for s, _ in cases])
    given_tags = int((scores >= cut).sum())
    lower = scores[scores < cut]
    if np.unique(scores).size == scores.size:  # no two pairs share a bin
        assert given_tags == min(tags, scores.size)
    elif lower.size and given_tags <= tags:
        assert given_tags + (lower == lower.max()).sum() > tags
    if given_tags > tags:  # only bins that tie with the last one that fits
        assert (scores == scores[scores >= cut].min()).sum() > given_tags - tags


def test_counts_at_an_edge_are_exact():
    rng = np.random.default_rng(5)
    cases = [(rng.normal(size=60).astype(np.float32), rng.random(60) < 0.3) for _ in range(3)]
    for edge in (-1.0, 0.0, 0.5, np.inf):
        tp, fp = thresholds.counts_at(np.full(3, edge), *histograms(cases))
        assert [*zip(tp, fp, strict=True)] == [counts_at(s, y, edge) for s, y in cases]


def test_nothing_scores_above_the_ceiling():
    rng = np.random.default_rng(6)
    cases = [(rng.normal(size=20).astype(np.float32), rng.random(20) < 0.3) for _ in range(3)]
    top = thresholds.ceilings(histograms(cases))
    assert all(t - 1 / 32 <= s.max() < t for t, (s, _) in zip(top, cases, strict=True))
