import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from pipeline.kernels import lockstep, pruning
from pipeline.kernels.lockstep import LOSSES, solve, tally
from pipeline.kernels.pruning import keep_large, prune
from pipeline.kernels.simd import LANES
from tests.problems import by_lane, costs_of, dense_of, lanes_of, noisy, texts
from tests.reference import objective

ROUNDING = 2e-6  # of an objective computed from float32 margins


@pytest.fixture(params=list(LOSSES))
def loss(request):
    return request.param


@pytest.fixture(params=[400, 2000], ids=["all rows", "a sample of the rows"])
def n(request):
    """The first guess is tried on all of few rows, on a sample of many."""
    assert (request.param >= pruning.STRIDE * lockstep.START_ROWS) == (request.param == 2000)
    return request.param


def solved(loss, n, repeat=1):
    """Rows, lanes of three labels, their signs, and the solution."""
    X, signs = texts(n)
    signs = signs * repeat
    C = 20.0 if loss == "logistic" else 1.0
    lanes = lanes_of(signs, C, 0.4 * C, loss)
    return X, lanes, signs, solve(X, lanes, 1e-3, 2000, 0)


def kept(pruned):
    return np.count_nonzero(by_lane(pruned.W)[:-1], axis=0)


@pytest.mark.parametrize("share", [1e-4, 1e-3, 1e-2, 0.1])
def test_the_objective_stays_within_the_share(share, loss, n):
    X, lanes, signs, solution = solved(loss, n)
    pruned = prune(X, lanes, solution, share)
    dense = dense_of(X)
    for lane, y in enumerate(signs):
        c = costs_of(lanes, lane)
        before, after = (objective(dense, y, c, by_lane(s.W)[:, lane], loss) for s in (solution, pruned))
        assert after <= before * (1 + share + ROUNDING)
        assert after >= before * (1 + share * 1e-3)  # the allowance is used, at least in part
        assert_allclose(pruned.primal[lane], after, rtol=ROUNDING)
        some = by_lane(solution.W)[:-1, lane] != 0
        assert kept(pruned)[lane] < some.sum() * (0.95 if share >= 1e-3 else 1)


def test_what_is_dropped_is_what_is_below_the_cut(loss, n):
    X, lanes, _, solution = solved(loss, n)
    W = by_lane(solution.W).copy()
    pruned = prune(X, lanes, solution, 1e-2)
    assert_array_equal(by_lane(solution.W), W)
    want = np.where(np.abs(W) < pruned.cuts, 0, W)
    want[-1] = W[-1]
    assert_array_equal(by_lane(pruned.W), want)
    assert (pruned.cuts[:3] > 0).all()


def test_a_larger_share_prunes_more(loss, n):
    X, lanes, _, solution = solved(loss, n)
    found = [prune(X, lanes, solution, share) for share in (0, 1e-4, 1e-3, 1e-2, 0.1)]
    cuts = np.array([pruned.cuts for pruned in found])
    assert_array_equal(cuts[0], 0)
    assert (np.diff(cuts, axis=0) >= 0).all()
    assert (cuts[-1, :3] > cuts[1, :3]).all()
    left = np.array([kept(pruned)[:3] for pruned in found])
    assert (np.diff(left, axis=0) <= 0).all()
    assert (left[-1] < left[1]).all() and (left[1] < left[0]).all()


def test_share_0_changes_nothing(loss, n):
    X, lanes, _, solution = solved(loss, n)
    pruned = prune(X, lanes, solution, 0.0)
    assert pruned.W.tobytes() == solution.W.tobytes()
    assert_array_equal(pruned.primal, solution.primal)
    assert_array_equal(pruned.cuts, 0)


def test_pruning_is_the_same_for_any_company(loss, n):
    X, lanes, _, solution = solved(loss, max(n, 700), repeat=3)
    assert (tally(lanes.sign)[0][:9] >= lockstep.FREQUENT).all()  # a rare lane would add its rows to the sample
    together = prune(X, lanes, solution, 1e-3)
    for lane in range(9):
        others = np.arange(LANES) != lane
        sign = lanes.sign.reshape(-1, LANES).copy()
        sign[:, others] = 0
        W = solution.W.reshape(-1, LANES).copy()
        W[:, others] = 0
        alone = prune(
            X,
            lanes._replace(sign=sign.ravel()),
            solution._replace(W=W.ravel(), primal=np.where(others, 0, solution.primal)),
            1e-3,
        )
        assert alone.cuts[lane] == together.cuts[lane]
        assert_array_equal(by_lane(alone.W)[:, lane], by_lane(together.W)[:, lane])
        assert alone.primal[lane] == together.primal[lane]
        assert_array_equal(by_lane(alone.W)[:, others], 0)
        assert_array_equal(alone.cuts[others], 0)


def test_rare_lanes_and_lanes_that_are_not_used(n):
    X, signs = texts(n)
    rare = np.full(X.size, -1)
    rare[[17, 230]] = 1
    lanes = lanes_of([signs[0], rare, np.ones(X.size)], 20.0)
    solution = solve(X, lanes, 1e-3, 2000, 0)
    pruned = prune(X, lanes, solution, 1e-2)
    dense = dense_of(X)
    for lane, y in enumerate((signs[0], rare, np.ones(X.size))):
        c = costs_of(lanes, lane)
        before, after = (objective(dense, y, c, by_lane(s.W)[:, lane]) for s in (solution, pruned))
        assert before <= after <= before * (1.01 + ROUNDING)
        assert_allclose(pruned.primal[lane], after, rtol=ROUNDING)
        assert kept(pruned)[lane] < np.count_nonzero(by_lane(solution.W)[:-1, lane])
    for unused in (pruned.cuts, pruned.primal, by_lane(pruned.W)[-1]):
        assert_array_equal(unused[3:], 0)


def test_a_lane_whose_weights_are_all_needed_keeps_them():
    """One feature a row: dropping any weight costs far more than the share."""
    X, _ = noisy(n=16, d=4, density=1.0)
    y = np.where(dense_of(X)[:, 0] > 0, 1, -1)
    lanes = lanes_of([y], 100.0)
    solution = solve(X, lanes, 1e-4, 5000, 0)
    pruned = prune(X, lanes, solution, 1e-6)
    assert_array_equal(by_lane(pruned.W), by_lane(solution.W))
    assert pruned.primal[0] == solution.primal[0]


def test_keeping_the_large_leaves_the_bias_and_other_lanes():
    rng = np.random.default_rng(8)
    columns = rng.normal(size=(50, LANES)).astype(np.float32)
    columns[-1] = 1e-6
    cuts = np.zeros(LANES, np.float32)
    cuts[4], cuts[9] = 0.7, np.abs(columns[3, 9])  # a weight as large as the cut stays
    out = np.full(columns.size, np.nan, np.float32)
    before = columns.copy()
    keep_large(columns.ravel(), cuts, out)
    out = out.reshape(-1, LANES)
    assert_array_equal(columns, before)
    assert_array_equal(out[-1], np.float32(1e-6))
    assert_array_equal(out[:-1], np.where(np.abs(before[:-1]) >= cuts, before[:-1], 0))
    assert_array_equal(np.delete(out, [4, 9], axis=1), np.delete(before, [4, 9], axis=1))
    assert out[3, 9] != 0
    assert (out[:-1, 4] == 0).any()
