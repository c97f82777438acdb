import numpy as np
import pytest
import scipy.sparse as sp
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import LogisticRegression

from pipeline.kernels.lockstep import (
    Rows,
    drop_small,
    entropies,
    losses,
    margins,
    prune_cuts,
    relative_gap,
    solve,
    squared_norms,
)
from pipeline.kernels.simd import LANES
from tests.reference import logistic_objective, logistic_optimum

GAP = 1e-5
ROUNDING = 2e-6  # of an objective computed from float32 weights and dual variables


def rows_of(X):
    """Dense X (n, d) without the bias -> Rows."""
    X = sp.csr_array(np.asarray(X, np.float32))
    squares = np.asarray(X.multiply(X).sum(axis=1)).ravel() + 1
    return Rows(X.indptr.astype(np.int64), X.indices.astype(np.int32), X.data, squares.astype(np.float32), X.shape[1])


def dense_of(X):
    """Rows -> (n, d + 1) float64 with the bias column."""
    dense = sp.csr_array((X.data, X.indices, X.indptr), (X.size, X.features)).toarray().astype(np.float64)
    return np.hstack([dense, np.ones((X.size, 1))])


def problem(n=90, d=25, density=0.3, seed=0):
    """Rows and y (n,) of -1 and +1 with some structure and some noise."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * (rng.random((n, d)) < density)
    X /= np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-9)
    y = np.where(X @ rng.normal(size=d) + 0.5 * rng.normal(size=n) > 0.4, 1, -1)
    return rows_of(X), y


def columns_of(solution):
    return solution.W.reshape(-1, LANES).astype(np.float64)


def lanes(*columns):
    """(n * 16,) signs: the given columns (n,), then unused lanes."""
    sign = np.zeros((len(columns[0]), LANES), np.int8)
    for k, y in enumerate(columns):
        sign[:, k] = y
    return sign.ravel()


def run(X, sign, c_pos=1.0, c_neg=None, gap=GAP, max_epochs=2000, seed=0):
    c_pos = np.broadcast_to(np.float32(c_pos), LANES).copy()
    c_neg = c_pos if c_neg is None else np.broadcast_to(np.float32(c_neg), LANES).copy()
    return solve(X, sign, c_pos, c_neg, gap, max_epochs, seed)


def reach(solution, lane):
    """How far the weights of a lane can be from the optimum: P is 1-strongly convex, so |w - w*|^2 / 2 <= P - D."""
    return np.sqrt(2 * (solution.primal[lane] - solution.dual[lane]) + 2 * ROUNDING * solution.primal[lane])


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("C", [0.1, 1.0, 10.0])
def test_equals_liblinear(C, dual):
    X, y = problem()
    dense = dense_of(X)
    model = LogisticRegression(
        solver="liblinear", dual=dual, fit_intercept=False, C=C, tol=1e-9, max_iter=100_000, random_state=0
    )
    want = model.fit(dense, y).coef_[0]
    solution = run(X, lanes(y), C)
    assert solution.gaps.max() <= GAP
    assert_allclose(columns_of(solution)[:, 0], want, rtol=0, atol=1e-2)
    c = np.full(y.size, C)
    assert_allclose(solution.primal[0], logistic_objective(dense, y, c, want), rtol=1e-4)


@pytest.mark.parametrize("gap", [0.3, 1e-2, 1e-3, GAP])
def test_the_gap_is_a_true_bound(gap):
    X, _ = problem()
    dense = dense_of(X)
    rng = np.random.default_rng(1)
    signs = [np.where(rng.random(X.size) < share, 1, -1) for share in (0.02, 0.1, 0.5, 0.9)]
    solution = run(X, lanes(*signs), 3.0, gap=gap)
    assert solution.gaps.max() <= gap
    for k, y in enumerate(signs):
        c = np.full(y.size, 3.0)
        best = logistic_objective(dense, y, c, logistic_optimum(dense, y, c))
        slack = ROUNDING * best
        assert solution.dual[k] <= best + slack
        assert best <= solution.primal[k] + slack
        # the objective that is reported is that of the weights
        assert_allclose(solution.primal[k], logistic_objective(dense, y, c, columns_of(solution)[:, k]), rtol=1e-6)


def test_a_lane_alone_equals_the_lane_in_company():
    X, y = problem()
    rng = np.random.default_rng(2)
    others = [np.where(rng.random(y.size) < 0.4, 1, -1) for _ in range(LANES - 1)]
    for place in (0, 5, 15):
        alone = np.zeros((y.size, LANES), np.int8)
        alone[:, place] = y
        company = np.stack([*others[:place], y, *others[place:]], axis=1).astype(np.int8)
        a, b = run(X, alone.ravel(), 2.0), run(X, company.ravel(), 2.0)
        apart = np.linalg.norm(columns_of(a)[:, place] - columns_of(b)[:, place])
        assert apart <= reach(a, place) + reach(b, place)


def test_unused_lanes_stay_zero():
    X, y = problem()
    solution = run(X, lanes(y, y))
    assert_array_equal(columns_of(solution)[:, 2:], 0)
    assert_array_equal(solution.gaps[2:], 0)
    assert_array_equal(solution.primal[2:], 0)
    assert (columns_of(solution)[:, :2] != 0).any(axis=0).all()


def test_a_masked_row_is_a_deleted_row():
    X, y = problem()
    kept = np.random.default_rng(3).random(y.size) < 0.6
    masked = run(X, lanes(y * kept), 5.0)
    deleted = run(rows_of(dense_of(X)[kept, :-1]), lanes(y[kept]), 5.0)
    apart = np.linalg.norm(columns_of(masked)[:, 0] - columns_of(deleted)[:, 0])
    assert apart <= reach(masked, 0) + reach(deleted, 0)
    assert_allclose(masked.primal[0], deleted.primal[0], rtol=3 * GAP)


@pytest.mark.parametrize(("times_positive", "times_negative"), [(2, 1), (1, 3), (3, 2)])
def test_a_multiple_of_C_is_that_many_copies_of_the_row(times_positive, times_negative):
    X, y = problem()
    weighted = run(X, lanes(y), 1.5 * times_positive, 1.5 * times_negative)
    copies = np.repeat(np.arange(y.size), np.where(y > 0, times_positive, times_negative))
    repeated = run(rows_of(dense_of(X)[copies, :-1]), lanes(y[copies]), 1.5)
    apart = np.linalg.norm(columns_of(weighted)[:, 0] - columns_of(repeated)[:, 0])
    assert apart <= reach(weighted, 0) + reach(repeated, 0)
    assert_allclose(weighted.primal[0], repeated.primal[0], rtol=3 * GAP)


def test_each_lane_has_its_own_C():
    X, y = problem()
    costs = np.geomspace(0.01, 100, LANES).astype(np.float32)
    together = run(X, lanes(*[y] * LANES), costs)
    for k in (0, 7, 15):
        alone = run(X, lanes(y), costs[k])
        assert_allclose(together.primal[k], alone.primal[0], rtol=3 * GAP)


def test_sums_equal_numpy_in_float64():
    X, _ = problem()
    rng = np.random.default_rng(4)
    sign = rng.integers(-1, 2, (X.size, LANES)).astype(np.int8)
    c_pos, c_neg = rng.uniform(0.5, 5, (2, LANES)).astype(np.float32)
    W = rng.normal(size=(X.features + 1, LANES)).astype(np.float32) * 5
    Z = np.empty(X.size * LANES, np.float32)
    margins(X.indptr, X.indices, X.data, W.ravel(), Z)
    assert_allclose(Z.reshape(-1, LANES), dense_of(X) @ W.astype(np.float64), rtol=1e-5, atol=1e-5)

    c = np.where(sign > 0, c_pos, c_neg).astype(np.float64) * (sign != 0)
    want = (c * np.logaddexp(0, -sign * Z.reshape(-1, LANES).astype(np.float64))).sum(axis=0)
    assert_allclose(losses(Z, sign.ravel(), c_pos, c_neg), want, rtol=1e-12)

    p = rng.random((X.size, LANES))
    p[0], p[1] = 0, 1
    A = (p * np.where(sign > 0, c_pos, c_neg)).astype(np.float32)
    p = A / np.where(sign > 0, c_pos, c_neg).astype(np.float64)
    inside = (p > 0) & (p < 1)
    q = np.where(inside, p, 0.5)
    want = -(c * inside * (q * np.log(q) + (1 - q) * np.log1p(-q))).sum(axis=0)
    assert_allclose(entropies(A.ravel(), sign.ravel(), c_pos, c_neg), want, rtol=1e-12)

    assert_allclose(squared_norms(W.ravel()), (W.astype(np.float64) ** 2).sum(axis=0), rtol=1e-12)


def test_losses_of_certain_rows_do_not_overflow():
    Z = np.array([1e30] * LANES + [-1e30] * LANES, np.float32)
    one = np.ones(LANES, np.float32)
    assert_allclose(losses(Z, np.ones(2 * LANES, np.int8), one, one), 1e30, rtol=1e-6)


def test_a_lane_without_rows_has_no_gap():
    assert_array_equal(relative_gap(np.array([0.0, 4.0]), np.array([0.0, 3.0])), [0, 0.25])


def test_the_same_call_gives_the_same_bytes():
    X, y = problem()
    a, b = (run(X, lanes(y, -y), 3.0, gap=1e-3, seed=5) for _ in range(2))
    assert a.W.tobytes() == b.W.tobytes()
    assert a.Z.tobytes() == b.Z.tobytes()
    assert a.epochs == b.epochs
    assert run(X, lanes(y, -y), 3.0, gap=1e-3, seed=6).W.tobytes() != a.W.tobytes()


def test_scores_are_those_of_the_weights():
    X, y = problem()
    solution = run(X, lanes(y), gap=1e-2)
    assert_allclose(solution.Z.reshape(-1, LANES), dense_of(X) @ columns_of(solution), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cap", [1, 2, 3, 5, 7, 12])
def test_stops_at_max_epochs(cap):
    X, y = problem()
    solution = run(X, lanes(y), 1e3, gap=1e-12, max_epochs=cap)
    assert solution.epochs == cap
    assert np.isfinite(solution.W).all()
    assert solution.gaps[0] > 1e-12


def test_more_sweeps_close_the_gap():
    X, y = problem()
    gaps = [run(X, lanes(y), 30.0, gap=1e-12, max_epochs=cap).gaps[0] for cap in (2, 6, 14, 40)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < gaps[0] / 100


ODD = np.random.default_rng(6)
DEGENERATE = {
    "one positive row": (np.array([[0.6, 0.8, 0.0]]), [1]),
    "one negative row": (np.array([[0.6, 0.8, 0.0]]), [-1]),
    "rows without features": (np.zeros((7, 3)), [1, -1, -1, -1, -1, -1, 1]),
    "some rows without features": (np.eye(6) * [1, 0, 1, 0, 1, 0], [1, 1, -1, -1, 1, -1]),
    "one feature a row": (np.eye(8)[ODD.integers(0, 8, 40)], np.where(ODD.random(40) < 0.3, 1, -1)),
    "an odd and a large number of features": (ODD.normal(size=(20, 301)) / 17, np.where(ODD.random(20) < 0.5, 1, -1)),
    "identical rows": (np.tile([0.6, 0.0, 0.8], (30, 1)), np.where(np.arange(30) < 9, 1, -1)),
    "only negatives": (np.eye(5), [-1] * 5),
    "only positives": (np.eye(5), [1] * 5),
}
CONTRADICTIONS = {"rows without features", "some rows without features", "one feature a row", "identical rows"}


@pytest.mark.parametrize("C", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_problems_are_solved(case, C):
    X, y = rows_of(DEGENERATE[case][0]), np.array(DEGENERATE[case][1])
    c, dense = np.full(y.size, C), dense_of(X)
    best = logistic_objective(dense, y, c, logistic_optimum(dense, y, c))
    solution = run(X, lanes(y), C, gap=1e-3, max_epochs=400)
    # rows that contradict each other settle slowly under a large C; the gap then says so and stays a true bound
    contradiction = C > 1 and case in CONTRADICTIONS
    assert (solution.gaps[0] <= 1e-3) != contradiction
    assert solution.epochs == 400 if contradiction else solution.epochs < 400
    assert best * (1 - 1e-5) <= solution.primal[0]
    assert solution.primal[0] * (1 - solution.gaps[0]) <= best * (1 + 1e-5)
    assert np.isfinite(solution.W).all()


@pytest.mark.parametrize("C", [20.0, 30.0, 50.0, 200.0, 1e3])
def test_a_large_C_needs_few_sweeps_where_the_classes_are_apart(C):
    """A row that overshoots its optimum on every visit never settles; from C = 30 on two Newton steps are too few."""
    X, _ = problem(n=60)
    y = np.where(dense_of(X)[:, 0] > 0.1, 1, -1)
    solution = run(X, lanes(y), C, gap=1e-2, max_epochs=60)
    assert solution.epochs < 60
    assert solution.gaps[0] <= 1e-2


@pytest.mark.parametrize("sign", [1, -1])
def test_a_lane_of_one_class_leans_to_that_class(sign):
    X, _ = problem()
    solution = run(X, lanes(np.full(X.size, sign)))
    assert np.sign(columns_of(solution)[-1, 0]) == sign
    assert_array_equal(np.sign(solution.Z.reshape(-1, LANES)[:, 0]), sign)


def test_swapping_the_classes_flips_the_weights():
    X, y = problem()
    solution = run(X, lanes(y, -y), gap=1e-3)
    W = columns_of(solution)
    assert_allclose(W[:, 0], -W[:, 1], rtol=0, atol=1e-5)


def realistic(n=400, d=900, seed=7):
    """Rows of unit length over features with falling frequency, and three labels that hang on a few of them."""
    rng = np.random.default_rng(seed)
    X = (rng.random((n, d)) < 0.4 / (1 + np.arange(d) / 10)).astype(np.float64) * rng.uniform(0.5, 2, (n, d))
    X /= np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-9)
    signs = [np.where(X[:, k] + X[:, k + 7] > 0.1, 1, -1) for k in (2, 30, 60)]
    return rows_of(X), signs


@pytest.mark.parametrize("share", [1e-4, 1e-3, 1e-2, 0.1])
def test_pruning_keeps_the_objective_within_the_share(share):
    X, signs = realistic()
    dense, sign = dense_of(X), lanes(*signs)
    cost = np.full(LANES, 20, np.float32)
    solution = run(X, sign, 20.0, gap=1e-3)
    cuts = prune_cuts(X, solution, [0, 2], sign, cost, cost, share)
    assert cuts.shape == (2,)
    for cut, lane in zip(cuts, (0, 2), strict=True):
        w = columns_of(solution)[:, lane]
        pruned = np.where(np.abs(w) < cut, 0, w)
        pruned[-1] = w[-1]
        c = np.full(X.size, 20.0)
        before, after = (logistic_objective(dense, signs[lane], c, v) for v in (w, pruned))
        assert after <= before * (1 + share + ROUNDING)
        assert after >= before * (1 + share * 1e-3)  # the allowance is used, at least in part
        assert np.count_nonzero(pruned) < np.count_nonzero(w) * (0.95 if share >= 1e-3 else 1)


def test_a_larger_share_prunes_more():
    X, signs = realistic()
    sign, cost = lanes(*signs), np.full(LANES, 20, np.float32)
    solution = run(X, sign, 20.0, gap=1e-3)
    cuts = np.array([prune_cuts(X, solution, [0, 1, 2], sign, cost, cost, s) for s in (0, 1e-4, 1e-3, 1e-2, 0.1)])
    assert_array_equal(cuts[0], 0)
    assert (np.diff(cuts, axis=0) >= 0).all()
    assert (cuts[-1] > cuts[1]).all()


def test_pruning_is_the_same_for_any_company():
    X, signs = realistic()
    sign, cost = lanes(*signs, *signs, *signs), np.full(LANES, 20, np.float32)
    solution = run(X, sign, 20.0, gap=1e-3)
    together = prune_cuts(X, solution, range(9), sign, cost, cost, 1e-3)
    assert_array_equal(together, [prune_cuts(X, solution, [k], sign, cost, cost, 1e-3)[0] for k in range(9)])


def test_dropping_leaves_the_bias_and_the_other_lanes():
    rng = np.random.default_rng(8)
    columns = rng.normal(size=(50, LANES)).astype(np.float32)
    columns[-1] = 1e-6
    before = columns.copy()
    drop_small(columns, 4, np.float32(0.7))
    assert_array_equal(np.delete(columns, 4, axis=1), np.delete(before, 4, axis=1))
    kept = np.abs(before[:-1, 4]) >= np.float32(0.7)
    assert_array_equal(columns[:-1, 4], np.where(kept, before[:-1, 4], 0))
    assert columns[-1, 4] == np.float32(1e-6)
