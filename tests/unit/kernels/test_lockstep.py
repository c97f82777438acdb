import math

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

from pipeline.kernels import lockstep
from pipeline.kernels.lockstep import (
    LOSSES,
    Solution,
    below,
    certify,
    margins,
    nonzeros,
    relative,
    row_squares,
    sampled,
    solve,
    squared_norms,
    sweep,
    tally,
)
from pipeline.kernels.simd import LANES, aligned
from tests.problems import by_lane, costs_of, dense_of, lanes_of, noisy, rows_of, texts
from tests.reference import best_dual, dual_objective, loss_of, objective, optimum

GAP = 1e-5
ROUNDING = 2e-6  # of an objective computed from float32 weights and dual variables


@pytest.fixture(params=list(LOSSES))
def loss(request):
    return request.param


@pytest.fixture(params=["from zero", "from a sample"])
def start(request, monkeypatch):
    """Small problems are not sampled by themselves; what holds must hold either way."""
    if request.param == "from a sample":
        monkeypatch.setattr(lockstep, "START_ROWS", 1)


def run(X, lanes, gap=GAP, max_epochs=5000, seed=0, earlier=None):
    return solve(X, lanes, gap, max_epochs, seed, earlier)


def reach(solution, lane):
    """How far the weights of a lane can be from the optimum: P is 1-strongly convex, so |w - w*|^2 / 2 <= P - D."""
    return np.sqrt(2 * solution.gap[lane] + 2 * ROUNDING * solution.primal[lane])


def assert_same_model(a, i, b, j):
    """Lane i of one solution and lane j of another solve the same problem."""
    apart = np.linalg.norm(by_lane(a.W)[:, i] - by_lane(b.W)[:, j])
    assert apart <= reach(a, i) + reach(b, j)
    assert a.primal[i] > 0
    assert_allclose(a.primal[i], b.primal[j], rtol=max(a.gaps[i], b.gaps[j]) + ROUNDING)


def coins(X, shares, seed=1):
    rng = np.random.default_rng(seed)
    return [np.where(rng.random(X.size) < share, 1, -1) for share in shares]


# -- the optimum -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("C", [0.1, 1.0, 10.0])
def test_equals_scikit_learn(C, loss, start):
    X, y = noisy()
    dense = dense_of(X)
    common = {"C": C, "dual": True, "fit_intercept": False, "tol": 1e-9, "max_iter": 1_000_000, "random_state": 0}
    if loss == "logistic":
        model = LogisticRegression(solver="liblinear", **common)
    else:
        model = LinearSVC(loss="squared_hinge", **common)
    want = model.fit(dense, y).coef_[0]
    solution = run(X, lanes_of([y], C, loss=loss))
    assert solution.gaps.max() <= GAP
    assert_allclose(by_lane(solution.W)[:, 0], want, rtol=0, atol=1e-2)
    assert_allclose(solution.primal[0], objective(dense, y, np.full(y.size, C), want, loss), rtol=2 * GAP)


def test_equals_liblinears_primal_solver():
    """The dual solver of liblinear might share our mistakes; its Newton method would not."""
    X, y = noisy(seed=3)
    model = LogisticRegression(solver="liblinear", dual=False, fit_intercept=False, C=3.0, tol=1e-9, max_iter=10_000)
    want = model.fit(dense_of(X), y).coef_[0]
    assert_allclose(by_lane(run(X, lanes_of([y], 3.0)).W)[:, 0], want, rtol=0, atol=1e-2)


@pytest.mark.parametrize("gap", [0.3, 1e-2, 1e-3, GAP])
def test_the_gap_is_a_true_bound(gap, loss, start):
    X, _ = noisy()
    dense, signs = dense_of(X), coins(X, (0.02, 0.1, 0.5, 0.9))
    lanes = lanes_of(signs, 3.0, loss=loss)
    solution = run(X, lanes, gap=gap)
    assert solution.gaps.max() <= gap
    for k, y in enumerate(signs):
        c = costs_of(lanes, k)
        best = objective(dense, y, c, optimum(dense, y, c, loss), loss)
        slack = ROUNDING * best
        assert solution.primal[k] - solution.gap[k] <= best + slack
        assert best <= solution.primal[k] + slack
        # the objective that is reported is that of the weights
        assert_allclose(
            solution.primal[k], objective(dense, y, c, by_lane(solution.W)[:, k], loss), rtol=ROUNDING, atol=1e-9
        )


@pytest.mark.parametrize("gap", [0.3, 1e-2, 1e-4])
def test_the_gap_is_primal_minus_dual(gap, loss, start):
    """Up to the drift e of W from sum a y x, which adds |e|^2 / 2 (see the module)."""
    X, _ = noisy()
    dense, signs = dense_of(X), coins(X, (0.02, 0.1, 0.5, 0.9))
    lanes = lanes_of(signs, 3.0, 0.7, loss)
    solution = run(X, lanes, gap=gap)
    for k, y in enumerate(signs):
        w, a, c = by_lane(solution.W)[:, k], by_lane(solution.A)[:, k], costs_of(lanes, k)
        drift = w - dense.T @ (a * y)
        assert np.linalg.norm(drift) < 1e-5 * np.linalg.norm(w)
        want = objective(dense, y, c, w, loss) - dual_objective(dense, y, c, a, loss) - drift @ drift / 2
        assert_allclose(solution.gap[k], want, rtol=1e-3, atol=1e-8 * solution.primal[k])
        assert solution.gap[k] > 0


def test_at_the_optimum_each_dual_variable_is_that_of_its_margin(loss, start):
    X, _ = noisy()
    signs = coins(X, (0.05, 0.5))
    lanes = lanes_of(signs, 4.0, 2.0, loss)
    solution = run(X, lanes, gap=1e-7, max_epochs=20_000)
    assert solution.gaps.max() <= 1e-7
    for k, y in enumerate(signs):
        m = y * (dense_of(X) @ by_lane(solution.W)[:, k])
        a, c = by_lane(solution.A)[:, k], costs_of(lanes, k)
        if loss == "logistic":
            want = c / (1 + np.exp(m))
            # g_i = C KL(a / C || sigmoid(-m)) >= 2 C (a / C - sigmoid(-m))^2 (Pinsker)
            allowed = np.sqrt(c * solution.gap[k] / 2)
            assert (a > 0).all()
        else:
            want = 2 * c * np.maximum(0, 1 - m)
            allowed = np.sqrt(4 * c * solution.gap[k])
            assert (a == 0).any()  # rows beyond the margin
        assert (np.abs(a - want) <= allowed + 1e-5 * c).all()
        assert_allclose(a, want, rtol=0, atol=0.01)


# -- lanes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 5, 15])
def test_a_lane_alone_equals_the_lane_in_company(place, loss, start):
    X, y = noisy()
    others = coins(X, [0.4] * (LANES - 1), seed=2)
    zeros = np.zeros(y.size)
    alone = run(X, lanes_of([*[zeros] * place, y], 2.0, loss=loss))
    company = run(X, lanes_of([*others[:place], y, *others[place:]], 2.0, loss=loss))
    assert_same_model(alone, place, company, place)


def test_unused_lanes_stay_zero(loss, start):
    X, y = noisy()
    solution = run(X, lanes_of([y, y], loss=loss))
    for unused in (by_lane(solution.W)[:, 2:], by_lane(solution.A)[:, 2:], solution.gaps[2:], solution.primal[2:]):
        assert_array_equal(unused, 0)
    assert (by_lane(solution.W)[:, :2] != 0).any(axis=0).all()


def test_a_masked_row_is_a_deleted_row(loss, start):
    X, y = noisy()
    kept = np.random.default_rng(3).random(y.size) < 0.6
    masked = run(X, lanes_of([y * kept, y], 5.0, loss=loss))
    deleted = run(rows_of(dense_of(X)[kept, :-1]), lanes_of([y[kept]], 5.0, loss=loss))
    assert_same_model(masked, 0, deleted, 0)
    assert_array_equal(by_lane(masked.A)[~kept, 0], 0)


def test_a_row_that_is_in_no_lane_costs_nothing(loss, start):
    X, y = noisy()
    kept = np.random.default_rng(3).random(y.size) < 0.6
    masked = run(X, lanes_of([y * kept], 5.0, loss=loss))
    deleted = run(rows_of(dense_of(X)[kept, :-1]), lanes_of([y[kept]], 5.0, loss=loss))
    assert masked.W.tobytes() == deleted.W.tobytes()
    assert (masked.epochs, masked.visits) == (deleted.epochs, deleted.visits)


@pytest.mark.parametrize(("times_positive", "times_negative"), [(2, 1), (1, 3), (3, 2)])
def test_a_multiple_of_C_is_that_many_copies_of_the_row(times_positive, times_negative, loss, start):
    X, y = noisy()
    weighted = run(X, lanes_of([y], 1.5 * times_positive, 1.5 * times_negative, loss))
    copies = np.repeat(np.arange(y.size), np.where(y > 0, times_positive, times_negative))
    repeated = run(rows_of(dense_of(X)[copies, :-1]), lanes_of([y[copies]], 1.5, loss=loss))
    assert_same_model(weighted, 0, repeated, 0)


def test_each_lane_has_its_own_C(loss, start):
    X, y = noisy()
    c_pos = np.geomspace(0.01, 10, LANES).astype(np.float32)
    c_neg = c_pos[::-1].copy()
    together = run(X, lanes_of([y] * LANES, c_pos, c_neg, loss))
    for k in (0, 7, 15):
        assert_same_model(together, k, run(X, lanes_of([y], c_pos[k], c_neg[k], loss)), 0)


def test_swapping_the_classes_flips_the_weights(loss, start):
    X, y = noisy()
    solution = run(X, lanes_of([y, -y], loss=loss), gap=1e-3)
    W = by_lane(solution.W)
    assert np.linalg.norm(W[:, 0] + W[:, 1]) <= reach(solution, 0) + reach(solution, 1)


def test_both_classes_take_the_same_steps(loss):
    X, y = noisy()
    W = by_lane(run(X, lanes_of([y, -y], loss=loss), gap=1e-3).W)
    assert_allclose(W[:, 0], -W[:, 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_lane_of_one_class_leans_to_that_class(sign, loss, start):
    X, _ = noisy()
    solution = run(X, lanes_of([np.full(X.size, sign)], loss=loss))
    assert np.sign(by_lane(solution.W)[-1, 0]) == sign
    assert_array_equal(np.sign(dense_of(X) @ by_lane(solution.W)[:, 0]), sign)


# -- the course --------------------------------------------------------------------------------------------------------


def test_the_same_call_gives_the_same_bytes(loss, start):
    X, y = noisy()
    a, b = (run(X, lanes_of([y, -y], 3.0, loss=loss), gap=1e-3, seed=5) for _ in range(2))
    assert a.W.tobytes() == b.W.tobytes()
    assert a.A.tobytes() == b.A.tobytes()
    assert (a.epochs, a.visits) == (b.epochs, b.visits)
    assert run(X, lanes_of([y, -y], 3.0, loss=loss), gap=1e-3, seed=6).W.tobytes() != a.W.tobytes()


@pytest.mark.parametrize("cap", [1, 2, 3, 4, 5, 7, 12])
def test_stops_at_max_epochs(cap, loss, start):
    X, y = noisy()
    solution = run(X, lanes_of([y], 1e3, loss=loss), gap=1e-12, max_epochs=cap)
    assert solution.epochs == cap
    assert np.isfinite(solution.W).all()
    assert solution.gaps[0] > 1e-12


def test_more_sweeps_close_the_gap(loss, start):
    X, y = noisy()
    gaps = [run(X, lanes_of([y], 30.0, loss=loss), gap=1e-12, max_epochs=cap).gaps[0] for cap in (4, 40, 200, 1000)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < gaps[0] / 100


def test_a_wide_gap_is_reached_sooner(loss, start):
    X, y = noisy()
    visits = [run(X, lanes_of([y], 10.0, loss=loss), gap=gap).visits for gap in (0.1, 1e-2, 1e-4)]
    assert visits == sorted(set(visits))


def test_every_row_is_visited_once_and_few_are_again(loss):
    X, signs = texts(n=1000)
    solution = run(X, lanes_of(signs, 10.0, loss=loss), gap=1e-3)
    assert solution.gaps.max() <= 1e-3
    assert X.size < solution.visits < solution.epochs * X.size / 2


def test_rows_are_sampled_where_there_are_many(loss, monkeypatch):
    """The start visits a sixteenth of the rows three times, in whole numbers of rows."""
    X, signs = texts(n=2048)
    lanes = lanes_of(signs, 10.0, loss=loss)
    one_sweep_left = run(X, lanes, max_epochs=4, gap=1e-9)
    assert one_sweep_left.epochs == 4
    positives = tally(lanes.sign)[0]
    visited = sum(rows.size for rows, _, _ in sampled(lanes, np.arange(X.size, dtype=np.int32), positives, 16))
    assert one_sweep_left.visits == 3 * visited + X.size
    monkeypatch.setattr(lockstep, "START_ROWS", 10**9)
    assert run(X, lanes, max_epochs=1, gap=1e-9).visits == X.size


def test_a_sampled_start_reaches_the_same_answer(loss, monkeypatch):
    X, signs = texts(n=2100)
    rare = np.where(np.arange(X.size) % 500 == 3, 1, -1)  # fewer than FREQUENT: all of them are in the sample
    lanes = lanes_of([*signs, rare], 10.0, loss=loss)
    a = run(X, lanes, gap=1e-4)
    monkeypatch.setattr(lockstep, "START_ROWS", 10**9)
    b = run(X, lanes, gap=1e-4)
    assert a.W.tobytes() != b.W.tobytes()
    for k in range(4):
        assert_same_model(a, k, b, k)


def outliers(n=20_000):
    """Long rows of one class that hold the features of the other, and are many enough to be sampled."""
    rng = np.random.default_rng(0)
    wrong = rng.random(n) < 1e-3
    X, y = sp.lil_array((n, 42)), np.full(n, -1)
    for i in range(n):
        if wrong[i]:
            X[i, rng.choice(40, 10, replace=False)], y[i] = 10, 1
        elif i % 8 == 0:
            X[i, 40 + i // 8 % 2], y[i] = 10, 1
        else:
            X[i, rng.integers(0, 40)] = 10
    return rows_of(X), y


def test_dual_variables_of_the_sample_come_back_below_C():
    """They were solved with 16 C; where sigmoid(-m) is 1 the gap term of a row does not show that one lies above C."""
    X, y = outliers()
    lanes = lanes_of([y], 1e-3)
    solution = run(X, lanes)
    a, c = by_lane(solution.A)[:, 0], costs_of(lanes, 0)
    assert (a <= c).all()
    dense = dense_of(X)
    best = objective(dense, y, c, optimum(dense, y, c))
    assert solution.primal[0] - solution.gap[0] <= best * (1 + 1e-7)


@pytest.mark.parametrize("kind", ["the answer", "another answer", "noise", "partly known"])
def test_an_earlier_model_changes_the_path_but_not_the_answer(kind, loss, monkeypatch):
    monkeypatch.setattr(lockstep, "START_ROWS", 1)
    X, y = noisy()
    signs = [y, *coins(X, (0.2,))]
    lanes = lanes_of(signs, 5.0, loss=loss)
    plain = run(X, lanes)
    W = aligned(plain.W.size)
    W[:] = {"noise": np.random.default_rng(0).normal(size=W.size), "another answer": -plain.W}.get(kind, plain.W)
    W[-LANES:][1 if kind == "partly known" else 2 :] = np.nan
    warm = run(X, lanes, earlier=W)
    assert warm.W.tobytes() != plain.W.tobytes()
    assert warm.gaps.max() <= GAP
    for k in range(2):
        assert_same_model(warm, k, plain, k)


def test_an_earlier_model_of_no_lane_changes_nothing(loss, start):
    X, y = noisy()
    W = aligned((X.features + 1) * LANES)
    W[-LANES:] = np.nan
    lanes = lanes_of([y], 5.0, loss=loss)
    assert run(X, lanes, earlier=W).W.tobytes() == run(X, lanes).W.tobytes()


def test_an_earlier_model_puts_the_rows_near_its_boundary_in_the_sample(monkeypatch):
    monkeypatch.setattr(lockstep, "START_ROWS", 1)
    X, y = noisy()
    lanes = lanes_of([y], 5.0)
    plain, seen = run(X, lanes), []
    monkeypatch.setattr(lockstep, "sampled", lambda *args: seen.append(args) or sampled(*args))
    run(X, lanes, earlier=np.where(np.arange(plain.W.size) % LANES, np.nan, plain.W).astype(np.float32))
    m = y * (dense_of(X) @ by_lane(plain.W)[:, 0])
    assert_array_equal(seen[0][4], m < lockstep.HARD)
    assert 0 < seen[0][4].sum() < y.size


# -- one visit ---------------------------------------------------------------------------------------------------------


def visited(base, q, c_pos, c_neg, loss, y=1, a=0.0, times=1):
    """A row of |x|^2 + 1 = q whose margin without its own part is `base` (16,), visited some times.

    Returns its dual variables (16,), the weights of its feature and of the bias (2, 16) towards y, and the optimum.
    """
    X = rows_of([[math.sqrt(q - 1)]])
    lanes = lanes_of([[y]] * LANES, c_pos, c_neg, loss)
    x, W, A = float(X.data[0]) if X.data.size else 0.0, aligned(2 * LANES), aligned(LANES)
    W[:LANES], W[LANES:], A[:] = a * y * x, np.float32(base) * y + a * y, a
    for _ in range(times):
        sweep(
            X.indptr, X.indices, X.data, X.squares, lanes.sign, lanes.c_pos, lanes.c_neg, lanes.loss,
            np.zeros(1, np.int32), W, A, np.ones(LANES, np.float32), np.float32(-1), np.zeros(1, np.float32),
            np.zeros(2 * LANES),
        )  # fmt: skip
    C = costs_of(lanes, 0)[0]
    best = np.array([best_dual(b, 1 + x * x, C, loss) for b in np.float32(base).astype(np.float64)])
    return A.astype(np.float64), W.astype(np.float64).reshape(2, LANES) * y, best


BASES = np.array([-300, -100, -30, -10, -5, -2, -1, -0.1, 0, 0.1, 0.5, 1, 2, 5, 20, 60], np.float64)


@pytest.mark.parametrize("y", [1, -1])
@pytest.mark.parametrize("q", [1.0, 2.0, 40.0, 1e4])
@pytest.mark.parametrize("C", [1e-4, 0.03, 1.0, 20.0, 1e4])
def test_a_visit_solves_its_row(C, q, y, loss):
    """One visit goes most of the way; Newton's steps are few, and the next visit goes on where they ended."""
    costs = (C, 1e-4) if y > 0 else (1e-4, C)
    for times, within in ((1, 0.25 if loss == "logistic" else 1e-5), (3, 1e-5)):
        a, W, best = visited(BASES, q, *costs, loss, y, times=times)
        assert_allclose(a, best, rtol=within, atol=1e-37)
        assert (a >= 0).all()
        if loss == "logistic":
            assert (a <= np.float32(C)).all()
        assert_allclose(W[0], a * np.float32(math.sqrt(q - 1)), rtol=1e-6)
        assert_allclose(W[1], BASES + a, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("C", [0.1, 1.0, 20.0])
@pytest.mark.parametrize("share", [1e-6, 0.3, 0.999, 1.0])
def test_where_the_dual_variable_was_does_not_matter(C, share, loss):
    a, W, best = visited(BASES, 2.0, C, 99, loss, a=C * share, times=4)
    assert_allclose(a, best, rtol=1e-4, atol=1e-5 * C)
    assert_allclose(W[1], BASES + a, rtol=1e-6, atol=1e-5 * C)


def numpy_terms(m, a, c, loss):
    """Gap terms g_i = C loss(m) + conjugate(a) + a m, as written; 0 where the row is not in the lane."""
    with np.errstate(divide="ignore", invalid="ignore"):
        if loss == "logistic":
            p = a / c
            conjugate = c * sum(np.where(x > 0, x * np.log(np.where(x > 0, x, 1)), 0) for x in (p, 1 - p))
        else:
            conjugate = a**2 / (4 * c) - a
    return np.where(c > 0, c * loss_of(m, loss) + conjugate + a * m, 0)


def anything(loss, seed=4):
    """Rows, lanes, weights and dual variables that have nothing to do with each other; margins from -30 to 30."""
    X, _ = noisy()
    rng = np.random.default_rng(seed)
    sign = rng.integers(-1, 2, (X.size, LANES))
    lanes = lanes_of(sign.T, *rng.uniform(0.5, 5, (2, LANES)), loss)
    W, A = aligned((X.features + 1) * LANES), aligned(X.size * LANES)
    W[:] = rng.normal(size=W.size) * 5
    c = np.stack([costs_of(lanes, k) for k in range(LANES)], axis=1)
    p = rng.random((X.size, LANES))
    p[0], p[1] = 0, 1
    A[:] = (p * c.astype(np.float32)).ravel()
    return X, lanes, sign, c, W, A


def test_sums_of_the_certificate_equal_numpy_in_float64(loss):
    X, lanes, sign, c, W, A = anything(loss)
    rows = np.arange(X.size, dtype=np.int32)
    Z = np.empty(X.size * LANES, np.float32)
    margins(X.indptr, X.indices, X.data, rows, W, Z)
    assert_allclose(by_lane(Z), dense_of(X) @ by_lane(W), rtol=1e-5, atol=1e-5)
    scale = np.random.default_rng(0).uniform(0, 2, LANES).astype(np.float32)
    for part in (rows, rows[::-3].copy()):
        sizes, sums = np.full(X.size, np.nan, np.float32), np.full(2 * LANES, np.nan)
        before = W.tobytes(), A.tobytes()
        certify(
            X.indptr, X.indices, X.data, lanes.sign, lanes.c_pos, lanes.c_neg, lanes.loss, part, W, A, scale,
            sizes, sums,
        )  # fmt: skip
        assert (W.tobytes(), A.tobytes()) == before
        m = (sign * by_lane(Z))[part]
        terms = numpy_terms(m, by_lane(A)[part], c[part], loss)
        assert_allclose(sums[:LANES], (c[part] * loss_of(m, loss)).sum(axis=0), rtol=1e-12)
        assert_allclose(sums[LANES:], terms.sum(axis=0), rtol=1e-12)
        assert_allclose(sizes[part], (terms * scale).max(axis=1), rtol=1e-6)
        assert_array_equal(np.isnan(sizes), ~np.isin(rows, part))
    assert_allclose(squared_norms(W), (by_lane(W) ** 2).sum(axis=0), rtol=1e-12)


def test_sums_of_a_sweep_are_those_before_its_steps(loss):
    """Float32 terms, which only choose rows: a thousandth is good enough."""
    X, lanes, sign, c, W, A = anything(loss)
    m = sign * (dense_of(X) @ by_lane(W))
    terms, scale = numpy_terms(m, by_lane(A), c, loss), np.full(LANES, 0.5, np.float32)
    sizes, sums = np.full(X.size, np.nan, np.float32), np.full(2 * LANES, np.nan)
    before = W.tobytes(), A.tobytes()
    arguments = (
        X.indptr, X.indices, X.data, X.squares, lanes.sign, lanes.c_pos, lanes.c_neg, lanes.loss,
        np.arange(X.size, dtype=np.int32), W, A, scale,
    )  # fmt: skip
    sweep(*arguments, np.float32(1e30), sizes, sums)
    assert (W.tobytes(), A.tobytes()) == before  # no row is worth a step
    assert_allclose(sums[:LANES], (c * loss_of(m, loss)).sum(axis=0), rtol=1e-3)
    assert_allclose(sums[LANES:], terms.sum(axis=0), rtol=1e-3)
    assert_allclose(sizes, (terms * scale).max(axis=1), rtol=1e-3, atol=1e-4)


def test_a_row_moves_where_its_size_is_above_the_least(loss):
    X, lanes, _, _, W, A = anything(loss)
    scale, sizes = np.ones(LANES, np.float32), np.zeros(X.size, np.float32)
    rows = np.arange(X.size, dtype=np.int32)
    arguments = (X.indptr, X.indices, X.data, X.squares, lanes.sign, lanes.c_pos, lanes.c_neg, lanes.loss)
    before, sums = by_lane(A).copy(), np.zeros(2 * LANES)
    for i in rows:  # one at a time: the size of a row depends on the steps before it
        W0, A0 = W.copy(), A.copy()
        sweep(*arguments, rows[i : i + 1], W, A, scale, np.float32(20), sizes, sums)
        moved = A.tobytes() != A0.tobytes()
        assert moved == (sizes[i] > 20)
        assert moved == (W.tobytes() != W0.tobytes())
        assert_array_equal(np.delete(by_lane(A), i, axis=0), np.delete(by_lane(A0), i, axis=0))
    changed = (by_lane(A) != before).any(axis=1)
    assert 0 < changed.sum() < X.size


def test_losses_of_certain_rows_do_not_overflow():
    """log(1 + exp(1e30)) is 1e30."""
    X, lanes = rows_of([[1.0], [-1.0]]), lanes_of([[1, 1]] * LANES)
    X.data[:] *= np.float32(1e30)
    W = np.concatenate([np.ones(LANES), np.zeros(LANES)]).astype(np.float32)
    sums = np.zeros(2 * LANES)
    certify(
        X.indptr, X.indices, X.data, lanes.sign, lanes.c_pos, lanes.c_neg, lanes.loss, np.arange(2, dtype=np.int32),
        W, np.zeros(2 * LANES, np.float32), np.ones(LANES, np.float32), np.zeros(2, np.float32), sums,
    )  # fmt: skip
    assert_allclose(sums, 1e30, rtol=1e-6)


def test_scores_are_those_of_the_rows_asked_for():
    X, y = noisy()
    solution = run(X, lanes_of([y, -y]), gap=1e-2)
    rows = np.array([88, 3, 3, 40], np.int32)
    Z = np.full(4 * LANES, np.nan, np.float32)
    margins(X.indptr, X.indices, X.data, rows, solution.W, Z)
    assert_allclose(by_lane(Z), (dense_of(X) @ by_lane(solution.W))[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unknown", [np.nan, -100.0])
@pytest.mark.parametrize("limit", [-1.0, 0.0, 2.2])
def test_rows_below_a_margin_are_found_in_the_lanes_that_are_known(limit, unknown):
    X, lanes, sign, _, W, _ = anything("logistic")
    known = np.arange(LANES) % 3 == 0
    W[-LANES:][~known] = unknown
    rows = np.arange(0, X.size, 2, dtype=np.int32)
    found = below(X.indptr, X.indices, X.data, lanes.sign, rows, W, known.astype(np.float32), limit)
    m = (sign * (dense_of(X) @ np.nan_to_num(by_lane(W))))[:, known]
    want = ((m < limit) & (sign[:, known] != 0)).any(axis=1)
    want[1::2] = False
    assert_array_equal(found, want)
    assert 0 < want.sum() < rows.size


def test_nonzeros_of_each_lane_are_numpys():
    W = np.random.default_rng(5).normal(size=(40, LANES)).astype(np.float32)
    W[np.abs(W) < 1] = 0
    W[:, 3], W[-1] = 0, 1  # a lane without weights; the bias is left out
    W[5, 2] = -0.0
    found = nonzeros(W.ravel())
    assert len(found) == LANES
    for lane, (features, weights) in enumerate(found):
        assert_array_equal(features, np.flatnonzero(W[:-1, lane]))
        assert_array_equal(weights, W[features, lane])
        assert (features.dtype, weights.dtype) == (np.int32, np.float32)
    assert found[3][0].size == 0


def test_tally_counts_signs():
    sign = np.random.default_rng(5).integers(-1, 2, (50, LANES)).astype(np.int8)
    sign[7] = 0
    sign[:, 3] = np.minimum(sign[:, 3], 0)
    positives, negatives, used = tally(sign.ravel())
    assert_array_equal(positives, (sign > 0).sum(axis=0))
    assert_array_equal(negatives, (sign < 0).sum(axis=0))
    assert_array_equal(used, (sign != 0).any(axis=1))
    assert positives[3] == 0 and not used[7]


def test_row_squares_are_added_up_row_by_row():
    lengths = np.array([3, 0, 1, 2])
    data = np.array([1e-4, 3, 1e4, 0.5, 1e-3, 2e-3], np.float32)
    parts = np.split(data.astype(np.float64), np.cumsum(lengths)[:-1])
    found = row_squares(lengths, data)
    assert found.dtype == np.float32
    assert_array_equal(found, np.float32([1 + np.sum(part**2) for part in parts]))


def test_a_lane_without_rows_has_no_gap():
    assert_array_equal(relative(np.array([0.0, 1.0]), np.array([0.0, 4.0])), [0, 0.25])
    nothing = np.zeros(0, np.float32)
    assert_array_equal(Solution(nothing, nothing, 0, 0, np.array([0, 8.0]), np.array([0, 2.0])).gaps, [0, 0.25])


# -- samples -----------------------------------------------------------------------------------------------------------


def estimated(X, lanes, pieces, W):
    """Losses of the pieces of a sample, (16,)."""
    total = np.zeros(LANES)
    for rows, c_pos, c_neg in pieces:
        piece = lanes._replace(c_pos=c_pos, c_neg=c_neg)
        c = np.stack([costs_of(piece, k) for k in range(LANES)], axis=1)[rows]
        m = (lanes.sign.reshape(-1, LANES) * (dense_of(X) @ W))[rows]
        total += (c * loss_of(m, "logistic")).sum(axis=0)
    return total


@pytest.mark.parametrize("whole", [False, True])
def test_a_sample_of_rows_that_come_in_sixteens_has_the_losses_of_all(whole, monkeypatch):
    X, y = noisy(n=200)
    copies = np.repeat(np.arange(X.size), 16)
    X = rows_of(dense_of(X)[copies, :-1])
    frequent, rare = y[copies], -np.ones(copies.size)
    rare[[5, 896, 3000]] = 1  # 896 is one of every sixteenth
    lanes = lanes_of([frequent, rare, frequent], [2.0, 3.0, 1.0] + [1.0] * 13, 0.5)
    W = np.random.default_rng(0).normal(size=(X.features + 1, LANES))
    rows, positives = np.arange(X.size, dtype=np.int32), tally(lanes.sign)[0]
    assert positives[1] < lockstep.FREQUENT < positives[0]
    chosen = np.isin(copies, np.arange(0, 200, 7)) if whole else None
    pieces = sampled(lanes, rows, positives, 16, chosen)
    everything = [(rows, lanes.c_pos, lanes.c_neg)]
    found, want = estimated(X, lanes, pieces, W), estimated(X, lanes, everything, W)
    assert_allclose(found[[0, 2]], want[[0, 2]], rtol=1e-6)
    if whole:
        assert_array_equal(pieces[0][0], np.flatnonzero(chosen))
    else:  # the rare lane's positives are all there, with their own C; a row of them is not also a negative
        counted = np.sort(np.concatenate([pieces[0][0], pieces[1][0]]))
        assert_array_equal(counted, np.unique(counted))
        assert set(np.flatnonzero(rare > 0)) <= set(counted)
        assert all(c_pos[1] == 3 for _, c_pos, _ in pieces)
        assert_allclose(found[1], want[1], rtol=0.01)
    assert sum(part.size for part, _, _ in pieces) < X.size / 3
    assert all(part.flags.c_contiguous for part, _, _ in pieces)  # kernels read them as they lie in memory


def test_a_sample_estimates_the_losses_of_all():
    X, y = noisy(n=20_000, density=0.2)
    rare = -np.ones(X.size)
    rare[::997] = 1
    lanes = lanes_of([y, rare], 2.0, 0.5)
    W = np.random.default_rng(0).normal(size=(X.features + 1, LANES))
    rows, positives = np.arange(X.size, dtype=np.int32), tally(lanes.sign)[0]
    want = estimated(X, lanes, [(rows, lanes.c_pos, lanes.c_neg)], W)[:2]
    for chosen in (None, np.random.default_rng(1).random(X.size) < 0.1):
        assert_allclose(estimated(X, lanes, sampled(lanes, rows, positives, 8, chosen), W)[:2], want, rtol=0.05)


# -- degenerate lanes --------------------------------------------------------------------------------------------------

ODD = np.random.default_rng(6)
DEGENERATE = {
    "one positive row": (np.array([[0.6, 0.8, 0.0]]), [1]),
    "one negative row": (np.array([[0.6, 0.8, 0.0]]), [-1]),
    "one row without features": (np.zeros((1, 3)), [-1]),
    "rows without features": (np.zeros((7, 3)), [1, -1, -1, -1, -1, -1, 1]),
    "some rows without features": (np.eye(6) * [1, 0, 1, 0, 1, 0], [1, 1, -1, -1, 1, -1]),
    "one feature a row": (np.eye(8)[ODD.integers(0, 8, 40)], np.where(ODD.random(40) < 0.3, 1, -1)),
    "an odd and a large number of features": (ODD.normal(size=(20, 301)) / 17, np.where(ODD.random(20) < 0.5, 1, -1)),
    "identical rows": (np.tile([0.6, 0.0, 0.8], (30, 1)), np.where(np.arange(30) < 9, 1, -1)),
    "identical rows of two signs": (np.tile([0.6, 0.0, 0.8], (2, 1)), [1, -1]),
    "only negatives": (np.eye(5), [-1] * 5),
    "only positives": (np.eye(5), [1] * 5),
    "one positive": (np.eye(50) + 0.1, [1] + [-1] * 49),
    "long rows": (ODD.normal(size=(30, 40)) * 5, np.where(ODD.random(30) < 0.5, 1, -1)),
}


@pytest.mark.parametrize("C", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_problems_are_solved_or_say_that_they_are_not(case, C, loss, start):
    X, y = rows_of(DEGENERATE[case][0]), np.array(DEGENERATE[case][1])
    lanes, dense = lanes_of([y], C, loss=loss), dense_of(X)
    c = costs_of(lanes, 0)
    best = objective(dense, y, c, optimum(dense, y, c, loss), loss)
    solution = run(X, lanes, gap=1e-3, max_epochs=400)
    assert (solution.gaps[0] <= 1e-3) != (solution.epochs == 400)
    # rows that contradict each other settle slowly under a large C; the gap then says so and stays a true bound
    assert solution.gaps[0] <= 1e-3 or C == 1e4
    assert best * (1 - 1e-5) <= solution.primal[0]
    assert solution.primal[0] * (1 - solution.gaps[0]) <= best * (1 + 1e-5)
    assert np.isfinite(solution.W).all()
    assert np.isfinite(solution.A).all()


def test_lanes_without_any_row_are_left_alone(loss, start):
    X, y = noisy()
    solution = run(X, lanes_of([y * 0], loss=loss))
    for array in (solution.W, solution.A, solution.primal, solution.gap, solution.gaps):
        assert_array_equal(array, 0)


@pytest.mark.parametrize("C", [20.0, 30.0, 50.0, 200.0, 1e3])
def test_a_large_C_needs_few_sweeps_where_the_classes_are_apart(C):
    """A row that overshoots its optimum on every visit never settles; from C = 30 on two Newton steps are too few."""
    X, _ = noisy(n=60)
    y = np.where(dense_of(X)[:, 0] > 0.1, 1, -1)
    solution = run(X, lanes_of([y], C), gap=1e-2, max_epochs=200)
    assert solution.gaps[0] <= 1e-2
    assert solution.visits < 30 * X.size


def same_products(X):
    """Dense (n, n) rows with the inner products of X and its bias: the same problem in few dimensions."""
    S = sp.csr_array((X.data.astype(np.float64), X.indices, X.indptr), (X.size, X.features))
    values, vectors = np.linalg.eigh((S @ S.T).toarray() + 1)
    return vectors * np.sqrt(np.maximum(values, 0))


@pytest.mark.parametrize("C", [1e-4, 1.0, 100.0])
def test_a_million_features_and_rows_of_one_and_of_100_000_of_them(C, loss):
    rng = np.random.default_rng(9)
    lengths = [1] * 10 + [100_000] * 3 + [0, 7, 1000]
    rows = [np.sort(rng.choice(1_000_000, k, replace=False)) for k in lengths]
    rows[0], rows[1] = rows[0] * 0, rows[1] * 0 + 999_999  # the first and the last feature
    values = [rng.normal(size=k) / math.sqrt(max(k, 1)) * 3 for k in lengths]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    X = rows_of(sp.csr_array((np.concatenate(values), np.concatenate(rows), indptr), (len(rows), 1_000_000)))
    y = np.where(np.arange(len(rows)) % 2, 1, -1)
    lanes = lanes_of([y], C, loss=loss)
    solution = run(X, lanes, gap=1e-4)
    assert solution.gaps[0] <= 1e-4
    dense, c = same_products(X), costs_of(lanes, 0)
    best = objective(dense, y, c, optimum(dense, y, c, loss), loss)
    assert_allclose(solution.primal[0], best, rtol=1e-4)
    used = np.unique(X.indices)
    assert_array_equal(np.flatnonzero(by_lane(solution.W)[:-1, 0]), used)
    assert {0, 999_999} <= set(used)


# -- any small problem -------------------------------------------------------------------------------------------------


@st.composite
def small_problems(draw):
    n, d = draw(st.integers(1, 12)), draw(st.integers(1, 6))
    values = st.one_of(st.just(0.0), st.floats(-3, 3, width=32, allow_subnormal=False))
    X = draw(arrays(np.float32, (n, d), elements=values))
    sign = draw(arrays(np.int8, (LANES, n), elements=st.integers(-1, 1)))
    costs = st.floats(-3, 2).map(lambda e: 10**e)
    c_pos, c_neg = (draw(arrays(np.float64, LANES, elements=costs)) for _ in range(2))
    return rows_of(X), lanes_of(list(sign), c_pos, c_neg, draw(st.sampled_from(list(LOSSES)))), draw(st.booleans())


@given(small_problems())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_small_problem_has_a_true_certificate(case):
    X, lanes, from_a_sample = case
    loss = list(LOSSES)[lanes.loss]
    with pytest.MonkeyPatch.context() as patch:
        if from_a_sample:
            patch.setattr(lockstep, "START", ((2, 3),))
            patch.setattr(lockstep, "START_ROWS", 1)
        solution = run(X, lanes, gap=1e-3, max_epochs=300)
    assert solution.gaps.max() <= 1e-3 or solution.epochs == 300
    dense = dense_of(X)
    for k in range(LANES):
        y, c = lanes.sign.reshape(-1, LANES)[:, k], costs_of(lanes, k)
        w, a = by_lane(solution.W)[:, k], by_lane(solution.A)[:, k]
        primal, drift = objective(dense, y, c, w, loss), w - dense.T @ (a * y)
        assert_allclose(solution.primal[k], primal, rtol=1e-5, atol=1e-9)
        gap = primal - dual_objective(dense, y, c, a, loss) - drift @ drift / 2
        assert_allclose(solution.gap[k], gap, rtol=1e-2, atol=2e-6 * primal + 1e-9)
        assert drift @ drift <= 1e-8 * (1 + w @ w)
        assert (a[y == 0] == 0).all()
    k = int(np.argmax(solution.gaps))
    y, c = lanes.sign.reshape(-1, LANES)[:, k], costs_of(lanes, k)
    best = objective(dense, y, c, optimum(dense, y, c, loss), loss)
    assert solution.primal[k] - solution.gap[k] <= best * (1 + 1e-5) + 1e-9
    assert best <= solution.primal[k] * (1 + 1e-5) + 1e-9
