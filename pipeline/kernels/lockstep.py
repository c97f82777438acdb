"""Dual coordinate ascent for sixteen binary problems ("lanes") at once: logistic loss, ridge penalty.

A lane is one binary problem: which rows take part, which of them are positive, C for positives and C for negatives.
All lanes of a group share one pass over X; the sixteen weights of a feature are one cache line.  Each lane minimises

    P(w) = 1/2 |w|^2 + sum_i C_i log(1 + exp(-y_i w.x_i))        (C multiplies the loss, as in liblinear)

through its dual (Yu, Huang, Lin: Dual coordinate descent methods for logistic regression, 2011)

    D(a) = -1/2 |sum_i a_i y_i x_i|^2 + sum_i C_i H(a_i / C_i),  0 < a_i < C_i,  H(p) = -p log p - (1-p) log(1-p).

With w = sum_i a_i y_i x_i, one coordinate is optimal when a = C sigmoid(-t) and t = base + a q, where q = |x_i|^2 and
base is the margin without the row's own part.  The scalar root of h(t) = t - base - q C sigmoid(-t) has h' >= 1; h is
convex left of 0 and concave right of it, so Newton's step clamped to the side that holds the root converges without a
line search.

The bias is one more feature with value 1: learned and regularised like the others.  Its weights stay in registers
during a sweep and are the last row of W.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from pipeline.kernels.simd import (
    LANES,
    absolute,
    add,
    div,
    f4,
    fma,
    largest,
    load,
    load_int8,
    maximum,
    minimum,
    mul,
    sigmoid,
    splat,
    store,
    sub,
)


@njit(inline="always")
def _dot(indices, data, start, stop, W, z):
    """z + x_i W for one row.  Two accumulators hide the latency of the fused multiply-add."""
    z2 = splat(f4(0.0))
    k = start
    while k + 1 < stop:
        z = fma(splat(data[k]), load(W, indices[k] * LANES), z)
        z2 = fma(splat(data[k + 1]), load(W, indices[k + 1] * LANES), z2)
        k += 2
    if k < stop:
        z = fma(splat(data[k]), load(W, indices[k] * LANES), z)
    return add(z, z2)


@njit(cache=True, nogil=True, error_model="numpy")
def sweep(indptr, indices, data, squares, sign, c_pos, c_neg, rows, W, A, steps):
    """Visit `rows` once, in order, and move every lane's dual variable of a row to its optimum.

    Args:
        indptr (n + 1,) int64, indices (nnz,) int32, data (nnz,) float32: X, without the bias.
        squares (n,) float32: |x_i|^2 + 1.
        sign (n * 16,) int8: +1 positive, -1 negative, 0 the row is not in the lane.
        c_pos, c_neg (16,) float32: C per lane for positives and for negatives.
        rows (m,) int32: the rows to visit.
        W ((d + 1) * 16,) float32, A (n * 16,) float32: weights and dual variables; updated in place.
        steps (n,) float32: for visited rows, the largest |change of a| / C over the lanes.
    """
    zero, one, half, big = splat(f4(0)), splat(f4(1)), splat(f4(0.5)), splat(f4(1e30))
    cp, cn = load(c_pos, 0), load(c_neg, 0)
    widest = maximum(cp, cn)
    bias_at = W.size - LANES
    bias = load(W, bias_at)
    # where the exponential rules, a step of Newton brings t about 1 nearer to a root that may be log(q C) away; with
    # too few steps a row with a large C overshoots on every visit and never settles
    farthest = np.log(np.float64(largest(widest)) * squares.max()) if squares.size else 0.0
    newton = 2
    while newton < 40 and newton + 2 < farthest:
        newton += 1
    for visit in range(rows.size):
        i = rows[visit]
        start, stop = indptr[i], indptr[i + 1]
        z = _dot(indices, data, start, stop, W, bias)
        y = load_int8(sign, i * LANES)
        c = fma(maximum(y, zero), cp, mul(maximum(sub(zero, y), zero), cn))
        a_old, q = load(A, i * LANES), splat(squares[i])
        qc, margin = mul(q, c), mul(y, z)
        base = sub(margin, mul(q, a_old))
        # h(0) = -base - qC/2 has the sign opposite to the root's; the bounds keep Newton on that side
        right = minimum(maximum(mul(fma(qc, half, base), big), zero), one)
        low, high = mul(sub(right, one), big), mul(right, big)
        t = minimum(maximum(margin, low), high)
        for _ in range(newton):
            g = sigmoid(sub(zero, t))
            h = sub(sub(t, base), mul(qc, g))
            slope = fma(mul(qc, g), sub(one, g), one)
            t = minimum(maximum(sub(t, div(h, slope)), low), high)
        a = mul(c, sigmoid(sub(zero, t)))
        step = sub(a, a_old)
        store(A, i * LANES, a)
        size = largest(div(absolute(step), widest))
        steps[i] = size
        if size > f4(1e-7):
            change = mul(step, y)
            bias = add(bias, change)
            for k in range(start, stop):
                at = indices[k] * LANES
                store(W, at, fma(splat(data[k]), change, load(W, at)))
    store(W, bias_at, bias)


@njit(cache=True, nogil=True, error_model="numpy")
def margins(indptr, indices, data, W, Z):
    """Scores of every row in every lane: Z (n * 16,) float32 = X W + bias."""
    bias_at = W.size - LANES
    bias = load(W, bias_at)
    for i in range(indptr.size - 1):
        store(Z, i * LANES, _dot(indices, data, indptr[i], indptr[i + 1], W, bias))


@njit(cache=True, nogil=True, error_model="numpy")
def losses(Z, sign, c_pos, c_neg):
    """sum_i C_i log(1 + exp(-y_i z_i)) per lane, (16,) float64, accumulated in float64."""
    total = np.zeros(LANES)
    for at in range(Z.size):
        y = sign[at]
        if y != 0:
            lane = at % LANES
            margin = y * np.float64(Z[at])
            c = c_pos[lane] if y > 0 else c_neg[lane]
            total[lane] += c * (max(-margin, 0.0) + np.log1p(np.exp(-abs(margin))))
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def entropies(A, sign, c_pos, c_neg):
    """sum_i C_i H(a_i / C_i) per lane, (16,) float64: the part of the dual that is not the norm."""
    total = np.zeros(LANES)
    for at in range(A.size):
        y = sign[at]
        if y != 0:
            lane = at % LANES
            c = np.float64(c_pos[lane] if y > 0 else c_neg[lane])
            p = min(max(A[at] / c, 0.0), 1.0)
            if 0.0 < p < 1.0:
                total[lane] -= c * (p * np.log(p) + (1.0 - p) * np.log1p(-p))
    return total


def squared_norms(W):
    """|w|^2 per lane, (16,) float64; W ((d + 1) * 16,), bias included."""
    return np.square(W.reshape(-1, LANES), dtype=np.float64).sum(axis=0)


@njit(cache=True, nogil=True)
def row_squares(lengths, data):
    """|x_i|^2 + 1 of rows that follow one another in `data` (nnz,), float32; each row is added up by itself."""
    squares = np.empty(lengths.size, np.float32)
    at = 0
    for i in range(lengths.size):
        total = 1.0
        for k in range(at, at + lengths[i]):
            total += np.float64(data[k]) * data[k]
        squares[i] = total
        at += lengths[i]
    return squares


class Rows(NamedTuple):
    """X without the bias column: CSR arrays that may be memory-mapped, and |x_i|^2 + 1 of each row."""

    indptr: np.ndarray  # (n + 1,) int64
    indices: np.ndarray  # (nnz,) int32, ascending within a row
    data: np.ndarray  # (nnz,) float32
    squares: np.ndarray  # (n,) float32
    features: int

    @property
    def size(self) -> int:
        return self.indptr.size - 1


class Solution(NamedTuple):
    """Sixteen solved lanes."""

    W: np.ndarray  # ((d + 1) * 16,) float32; the last row is the bias
    Z: np.ndarray  # (n * 16,) float32, scores
    epochs: int  # sweeps made, full or not
    primal: np.ndarray  # (16,) float64
    dual: np.ndarray  # (16,) float64

    @property
    def gaps(self) -> np.ndarray:
        """Relative duality gap (P - D) / P per lane; 0 for a lane without rows."""
        return relative_gap(self.primal, self.dual)


def relative_gap(primal: np.ndarray, dual: np.ndarray) -> np.ndarray:
    return np.where(primal > 0, (primal - dual) / np.where(primal > 0, primal, 1.0), 0.0)


MOVING = 1e-3  # a row is visited again between two full sweeps while its last step exceeded this share of C
SHORT_SWEEPS = 3  # sweeps over the moving rows after each full one


def solve(
    X: Rows, sign: np.ndarray, c_pos: np.ndarray, c_neg: np.ndarray, gap: float, max_epochs: int, seed: int
) -> Solution:
    """Sweep until every lane's relative duality gap is at most `gap`, or `max_epochs` sweeps are made.

    The order of the rows is a permutation drawn from (seed, sweep) alone, the same for all groups.
    After two full sweeps each cycle is three sweeps over the rows that still move, a check in float64, one full sweep.

    Args:
        sign (n * 16,) int8; c_pos, c_neg (16,) float32 > 0; see `sweep`.
    """
    W = np.zeros((X.features + 1) * LANES, np.float32)
    A = np.zeros(X.size * LANES, np.float32)
    Z = np.empty(X.size * LANES, np.float32)
    steps = np.full(X.size, np.inf, np.float32)
    plan = [True, True] + [False] * SHORT_SWEEPS
    epochs = 0
    while True:
        for full in plan:
            rows = np.random.default_rng((seed, epochs)).permutation(X.size).astype(np.int32)
            if not full:
                rows = rows[steps[rows] > MOVING]
            sweep(X.indptr, X.indices, X.data, X.squares, sign, c_pos, c_neg, rows, W, A, steps)
            epochs += 1
            if epochs >= max_epochs:
                break
        norms = squared_norms(W) / 2
        margins(X.indptr, X.indices, X.data, W, Z)
        solution = Solution(
            W, Z, epochs, norms + losses(Z, sign, c_pos, c_neg), entropies(A, sign, c_pos, c_neg) - norms
        )
        if epochs >= max_epochs or not (solution.gaps > gap).any():
            return solution
        plan = [True] + [False] * SHORT_SWEEPS


@njit(cache=True, nogil=True)
def _budget_cut(w, budget):
    """The largest cut, on a grid of eight per octave, below which the squares of w sum to at most `budget`."""
    bits = w.view(np.int32)
    sums = np.zeros(2048)
    for k in range(w.size):
        sums[(bits[k] & 0x7FFFFFFF) >> 20] += np.float64(w[k]) * w[k]
    total = 0.0
    edge = 0
    while edge < 2040 and total + sums[edge] <= budget:
        total += sums[edge]
        edge += 1
    return edge


PRUNE_SHARES = (0.7, 0.4, 0.2, 0.1), (0.05, 0.02, 0.01, 0.005)


def prune_cuts(X: Rows, solution: Solution, lanes, sign, c_pos, c_neg, share: float) -> np.ndarray:
    """For each of `lanes`, a cut such that dropping |w| < cut raises its objective by at most `share` of it.

    Dropping weights of norm delta raises P by about delta' H delta / 2 with H >= I, so a cut with |delta|^2 / 2 at a
    share of what is allowed is a guess from below.  Four guesses a lane are tried as lanes of one pass over X, the
    largest that holds is taken; where none holds, four smaller ones, else nothing is dropped.

    Returns (len(lanes),) float32, 0 where nothing is dropped.
    """
    cuts = np.zeros(len(lanes), np.float32)
    columns = solution.W.reshape(-1, LANES)
    open_ = list(range(len(lanes))) if share > 0 else []
    for shares in PRUNE_SHARES:
        guesses = []
        for j in open_:
            w = np.ascontiguousarray(columns[:-1, lanes[j]])
            for part in shares:
                edge = _budget_cut(w, 2.0 * share * part * solution.primal[lanes[j]])
                guesses.append((j, np.array([edge << 20], np.int32).view(np.float32)[0]))
        for start in range(0, len(guesses), LANES):
            batch = guesses[start : start + LANES]
            primal = _objectives_when_cut(X, columns, [(lanes[j], cut) for j, cut in batch], sign, c_pos, c_neg)
            for (j, cut), value in zip(batch, primal, strict=False):
                if value <= solution.primal[lanes[j]] * (1.0 + share):
                    cuts[j] = max(cuts[j], cut)
        open_ = [j for j in open_ if cuts[j] == 0]
        if not open_:
            break
    return cuts


def _objectives_when_cut(X, columns, guesses, sign, c_pos, c_neg):
    source = np.array([lane for lane, _ in guesses] + [guesses[0][0]] * (LANES - len(guesses)))
    trial = np.ascontiguousarray(columns[:, source])
    for k, (_, cut) in enumerate(guesses):
        drop_small(trial, k, cut)
    Z = np.empty(X.size * LANES, np.float32)
    margins(X.indptr, X.indices, X.data, trial.ravel(), Z)
    signs = np.ascontiguousarray(sign.reshape(-1, LANES)[:, source]).ravel()
    return squared_norms(trial.ravel()) / 2 + losses(Z, signs, c_pos[source], c_neg[source])


@njit(cache=True, nogil=True)
def drop_small(columns, lane, cut):
    """Set weights with |w| < cut of one lane to zero, in place; the bias (last row) stays."""
    for k in range(columns.shape[0] - 1):
        if abs(columns[k, lane]) < cut:
            columns[k, lane] = 0.0
