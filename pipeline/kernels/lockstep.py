"""Dual coordinate ascent for sixteen binary problems ("lanes") at once, with a ridge penalty.

A lane is one binary problem: which rows take part, which of them are positive, C for positives and C for negatives.
All lanes of a group share one pass over X; the sixteen weights of a feature are one cache line.  Each lane minimises

    P(w) = 1/2 |w|^2 + sum_i C_i loss(y_i w.x_i)        (C multiplies the loss, as in liblinear)

through its dual variables a_i >= 0, with w = sum_i a_i y_i x_i (Hsieh et al.: A dual coordinate descent method for
large-scale linear SVM, 2008; Yu, Huang, Lin: Dual coordinate descent methods for logistic regression, 2011).

*Logistic*, log(1 + exp(-m)): one coordinate is optimal when a = C sigmoid(-t) and t = base + a q, where q = |x_i|^2 and
base is the margin without the row's own part.  The scalar root of h(t) = t - base - q C sigmoid(-t) has h' >= 1; h is
convex left of 0 and concave right of it, so Newton's step clamped to the side that holds the root converges without a
line search.  *Squared hinge*, max(0, 1 - m)^2: a = max(0, 2 C (1 - base) / (2 C q + 1)).

The duality gap is a sum over rows of terms that are never negative (Fenchel and Young),

    P - D = sum_i g_i,    g_i = C_i loss(m_i) + conjugate_i(a_i) + a_i m_i,    m_i = y_i w.x_i,

which for the logistic loss is C_i KL(a_i / C_i || sigmoid(-m_i)).  So a row's own term says whether it is worth a
visit, and the sum of those that are not visited is known to be small.  A w that has drifted by e from sum_i a_i y_i x_i
changes the sum by |e|^2 / 2 only.

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
    aligned,
    at,
    div,
    exp,
    exp64,
    f4,
    fma,
    largest,
    load,
    load_int8,
    log,
    log64,
    maximum,
    minimum,
    mul,
    narrow,
    prefetch,
    sigmoid,
    splat,
    splat64,
    store,
    sub,
    widen,
)

LOGISTIC, SQUARED_HINGE = 0, 1
LOSSES = {"logistic": LOGISTIC, "squared_hinge": SQUARED_HINGE}


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


class Lanes(NamedTuple):
    """Sixteen binary problems over the same rows."""

    sign: np.ndarray  # (n * 16,) int8: +1 positive, -1 negative, 0 the row is not in the lane
    c_pos: np.ndarray  # (16,) float32 > 0: C of positives
    c_neg: np.ndarray  # (16,) float32 > 0: C of negatives
    loss: int = LOGISTIC


@njit(inline="always")
def _dot(indices, data, start, stop, W, z):
    """z + x_i W for one row.  Four accumulators hide the latency of the fused multiply-add."""
    z2, z3, z4 = splat(f4(0.0)), splat(f4(0.0)), splat(f4(0.0))
    k = start
    while k + 3 < stop:
        z = fma(splat(at(data, k)), load(W, at(indices, k) * LANES), z)
        z2 = fma(splat(at(data, k + 1)), load(W, at(indices, k + 1) * LANES), z2)
        z3 = fma(splat(at(data, k + 2)), load(W, at(indices, k + 2) * LANES), z3)
        z4 = fma(splat(at(data, k + 3)), load(W, at(indices, k + 3) * LANES), z4)
        k += 4
    while k < stop:
        z = fma(splat(at(data, k)), load(W, at(indices, k) * LANES), z)
        k += 1
    return add(add(z, z2), add(z3, z4))


@njit(inline="always")
def _add_row(indices, data, start, stop, W, change):
    """W += x_i change for one row, without the bias."""
    for k in range(start, stop):
        place = at(indices, k) * LANES
        store(W, place, fma(splat(at(data, k)), change, load(W, place)))


@njit(inline="always")
def _ask_for(indptr, indices, data, row):
    """Start fetching a row that is not next in memory."""
    k, stop = at(indptr, row), at(indptr, row + 1)
    while k < stop:
        prefetch(indices, k)
        prefetch(data, k)
        k += 16
    prefetch(indices, stop)
    prefetch(data, stop)


@njit(inline="always")
def _gap_term(loss, c, a, margin):
    """g_i in float32 (see above); 0 where c is 0."""
    zero, one, tiny = splat(f4(0)), splat(f4(1)), splat(f4(1e-12))
    if loss == LOGISTIC:
        p = minimum(maximum(div(a, maximum(c, splat(f4(1e-30)))), tiny), one)
        rest = maximum(sub(one, p), tiny)
        soft = add(maximum(sub(zero, margin), zero), log(add(one, exp(sub(zero, absolute(margin))))))
        return mul(c, maximum(add(soft, fma(p, log(p), fma(rest, log(rest), mul(p, margin)))), zero))
    short = sub(a, mul(mul(splat(f4(2)), c), maximum(sub(one, margin), zero)))
    inside = div(mul(short, short), maximum(mul(splat(f4(4)), c), splat(f4(1e-30))))
    return fma(a, maximum(sub(margin, one), zero), inside)


@njit(cache=True, nogil=True, error_model="numpy")
def sweep(indptr, indices, data, squares, sign, c_pos, c_neg, loss, rows, W, A, scale, least, sizes, sums):
    """Visit `rows` once, in order, and move every lane's dual variable of a row to its optimum, or most of the way.

    Args:
        indptr (n + 1,) int64, indices (nnz,) int32, data (nnz,) float32: X, without the bias.
        squares (n,) float32: |x_i|^2 + 1.
        sign (n * 16,) int8: +1 positive, -1 negative, 0 the row is not in the lane.
        c_pos, c_neg (16,) float32 >= 0: C per lane for positives and for negatives.
        loss: LOGISTIC or SQUARED_HINGE.
        rows (m,) int32: the rows to visit.
        W ((d + 1) * 16,) float32, A (n * 16,) float32: weights and dual variables; updated in place.
        scale (16,) float32: weight of a lane's gap terms in `sizes`; 0 for a lane that is done.
        least: a row whose size is not above it stays as it is.
        sizes (n,) float32: for visited rows, the largest over the lanes of scale * g_i before the step.
        sums (2 * 16,) float64: overwritten with the losses and the gap terms of the visited rows, before their steps.
    """
    zero, one, half, big = splat(f4(0)), splat(f4(1)), splat(f4(0.5)), splat(f4(1e30))
    two = splat(f4(2))
    cp, cn, scales = load(c_pos, 0), load(c_neg, 0), load(scale, 0)
    bias_at = W.size - LANES
    bias = load(W, bias_at)
    # where the exponential rules, a step of Newton brings t about 1 nearer to a root that may be log(q C) away; with
    # too few steps a row with a large C overshoots on every visit and never settles
    farthest = np.log(np.float64(largest(maximum(cp, cn))) * squares.max()) if squares.size else 0.0
    newton = 2
    while newton < 40 and newton + 2 < farthest:
        newton += 1
    all_losses, all_terms = splat64(0.0), splat64(0.0)
    for visit in range(rows.size):
        i = at(rows, visit)
        if visit + 1 < rows.size:
            following = at(rows, visit + 1)
            _ask_for(indptr, indices, data, following)
            prefetch(sign, following * LANES)
            prefetch(A, following * LANES)
        start, stop = at(indptr, i), at(indptr, i + 1)
        z = _dot(indices, data, start, stop, W, bias)
        y = load_int8(sign, i * LANES)
        c = fma(maximum(y, zero), cp, mul(maximum(sub(zero, y), zero), cn))
        a_old, q = load(A, i * LANES), splat(at(squares, i))
        qc, margin = mul(q, c), mul(y, z)
        base = sub(margin, mul(q, a_old))
        if loss == LOGISTIC:
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
            value = add(maximum(sub(zero, margin), zero), log(add(one, exp(sub(zero, absolute(margin))))))
        else:
            a = maximum(div(mul(mul(two, c), sub(one, base)), fma(two, qc, one)), zero)
            short = maximum(sub(one, margin), zero)
            value = mul(short, short)
        term = _gap_term(loss, c, a_old, margin)
        all_losses = add(all_losses, widen(mul(c, value)))
        all_terms = add(all_terms, widen(term))
        size = largest(mul(term, scales))
        sizes[i] = size
        if size > least:
            store(A, i * LANES, a)
            change = mul(sub(a, a_old), y)
            bias = add(bias, change)
            _add_row(indices, data, start, stop, W, change)
    store(W, bias_at, bias)
    store(sums, 0, all_losses)
    store(sums, LANES, all_terms)


@njit(cache=True, nogil=True, error_model="numpy")
def certify(indptr, indices, data, sign, c_pos, c_neg, loss, rows, W, A, scale, sizes, sums):
    """The losses and the gap terms of `rows`, in float64 from float32 margins and dual variables.

    Arguments as for `sweep`; nothing moves.  sums (2 * 16,) float64: sum_i C_i loss(m_i), then sum_i g_i = P - D.
    """
    zero, one, tiny = splat64(0.0), splat64(1.0), splat64(1e-300)
    cp, cn, scales = widen(load(c_pos, 0)), widen(load(c_neg, 0)), widen(load(scale, 0))
    bias = load(W, W.size - LANES)
    all_losses, all_terms = splat64(0.0), splat64(0.0)
    for visit in range(rows.size):
        i = at(rows, visit)
        z = widen(_dot(indices, data, at(indptr, i), at(indptr, i + 1), W, bias))
        y, a = widen(load_int8(sign, i * LANES)), widen(load(A, i * LANES))
        c = fma(maximum(y, zero), cp, mul(maximum(sub(zero, y), zero), cn))
        m = mul(y, z)
        if loss == LOGISTIC:
            value = add(maximum(sub(zero, m), zero), log64(add(one, exp64(sub(zero, absolute(m))))))
            p = minimum(div(a, maximum(c, tiny)), one)
            rest = sub(one, p)
            entropy = fma(p, log64(maximum(p, tiny)), mul(rest, log64(maximum(rest, tiny))))
            term = mul(c, maximum(add(value, fma(p, m, entropy)), zero))
        else:
            short = maximum(sub(one, m), zero)
            value = mul(short, short)
            off = sub(a, mul(mul(splat64(2.0), c), short))
            term = fma(a, maximum(sub(m, one), zero), div(mul(off, off), maximum(mul(splat64(4.0), c), tiny)))
        all_losses = fma(c, value, all_losses)
        all_terms = add(all_terms, term)
        sizes[i] = largest(narrow(mul(term, scales)))
    store(sums, 0, all_losses)
    store(sums, LANES, all_terms)


@njit(cache=True, nogil=True, error_model="numpy")
def margins(indptr, indices, data, rows, W, Z):
    """Scores of `rows` (m,) int32 in every lane: Z (m * 16,) float32 = X W + bias."""
    bias = load(W, W.size - LANES)
    for visit in range(rows.size):
        i = at(rows, visit)
        store(Z, visit * LANES, _dot(indices, data, at(indptr, i), at(indptr, i + 1), W, bias))


@njit(cache=True, nogil=True, error_model="numpy")
def below(indptr, indices, data, sign, rows, W, known, limit):
    """(n,) bool: the margin of the row in some lane of which `known` (16,) float32 is 1 is below `limit`."""
    found = np.zeros(indptr.size - 1, np.bool_)
    bias, asked, least = load(W, W.size - LANES), load(known, 0), splat(f4(limit))
    for visit in range(rows.size):
        i = at(rows, visit)
        y = mul(load_int8(sign, i * LANES), asked)
        z = _dot(indices, data, at(indptr, i), at(indptr, i + 1), W, bias)
        # a row outside of the lane counts as far above
        found[i] = largest(mul(absolute(y), sub(least, mul(y, z)))) > f4(0)
    return found


@njit(cache=True, nogil=True, error_model="numpy")
def squared_norms(W):
    """|w|^2 per lane, (16,) float64; W ((d + 1) * 16,), bias included."""
    total = splat64(0.0)
    for k in range(0, W.size, LANES):
        w = widen(load(W, k))
        total = fma(w, w, total)
    out = np.empty(LANES)
    store(out, 0, total)
    return out


def nonzeros(W: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Features (m,) int32 ascending and weights (m,) float32 that are not 0, of each lane, without the bias."""
    count, features, weights = _nonzeros(W)
    ends = np.cumsum(count)
    return [(features[stop - size : stop], weights[stop - size : stop]) for size, stop in zip(count, ends, strict=True)]


@njit(cache=True, nogil=True)
def _nonzeros(W):
    last = W.size // LANES - 1
    count = np.zeros(LANES, np.int64)
    for k in range(last):
        for lane in range(LANES):
            count[lane] += W[k * LANES + lane] != 0
    place = np.cumsum(count) - count
    features, weights = np.empty(count.sum(), np.int32), np.empty(count.sum(), np.float32)
    for k in range(last):
        for lane in range(LANES):
            w = W[k * LANES + lane]
            if w != 0:
                features[place[lane]], weights[place[lane]] = k, w
                place[lane] += 1
    return count, features, weights


@njit(cache=True, nogil=True)
def tally(sign):
    """What the rows are to the lanes of a group.

    Returns:
        positives, negatives (16,) int64; used (n,) bool: the row is in some lane.
    """
    positives, negatives = np.zeros(LANES, np.int64), np.zeros(LANES, np.int64)
    used = np.zeros(sign.size // LANES, np.bool_)
    for i in range(used.size):
        for lane in range(LANES):
            y = sign[i * LANES + lane]
            positives[lane] += y > 0
            negatives[lane] += y < 0
            used[i] |= y != 0
    return positives, negatives, used


@njit(cache=True, nogil=True)
def _positive_in(sign, lanes):
    """(n,) bool: the row is positive in some lane of which `lanes` (16,) bool is true."""
    found = np.zeros(sign.size // LANES, np.bool_)
    for i in range(found.size):
        for lane in range(LANES):
            found[i] |= lanes[lane] and sign[i * LANES + lane] > 0
    return found


@njit(cache=True, nogil=True)
def row_squares(lengths, data):
    """|x_i|^2 + 1 of rows that follow one another in `data` (nnz,), float32; each row is added up by itself."""
    squares = np.empty(lengths.size, np.float32)
    at_ = 0
    for i in range(lengths.size):
        total = 1.0
        for k in range(at_, at_ + lengths[i]):
            total += np.float64(data[k]) * data[k]
        squares[i] = total
        at_ += lengths[i]
    return squares


class Solution(NamedTuple):
    """Sixteen solved lanes."""

    W: np.ndarray  # ((d + 1) * 16,) float32; the last row is the bias
    A: np.ndarray  # (n * 16,) float32, dual variables
    epochs: int  # sweeps made, over all rows or over those that move
    visits: int  # rows visited by all sweeps
    primal: np.ndarray  # (16,) float64
    gap: np.ndarray  # (16,) float64, P - D

    @property
    def gaps(self) -> np.ndarray:
        """Relative duality gap (P - D) / P per lane; 0 for a lane without rows."""
        return relative(self.gap, self.primal)


def relative(gap: np.ndarray, primal: np.ndarray) -> np.ndarray:
    return np.where(primal > 0, gap / np.where(primal > 0, primal, 1.0), 0.0)


START = ((16, 3),)  # (stride, sweeps): the start is solved on every 16th row, with C times 16
START_ROWS = 128  # a sample has at least so many rows
FREQUENT = 64  # a lane with so many positives is sampled in these too
HARD = 2.2  # margin below which an earlier model finds a row hard: a probability of 0.1 of being wrong
TOGETHER = 8  # neighbouring rows that stay together when an order is drawn
ABOVE = 8.0  # a row is visited while its gap term is so many times the average one
FEW = 0.03  # share of the rows; where fewer are above, the limit is lowered
SHARE = 0.7  # in the end, rows that are not visited hold at most this share of the gap that is allowed
SETTLED = 0.5  # and those that are visited this share, before all rows are looked at
LEAST = 0.05  # a row is not moved where its gap term is below this share of what makes it worth a visit
SHORT_SWEEPS = 10  # at most, over the rows that move, between two looks at all of them
STALLED = 0.5  # where a look at all finds more than this share of what the last one found, more rows are visited


def solve(
    X: Rows,
    lanes: Lanes,
    gap: float,
    max_epochs: int,
    seed: int,
    earlier: np.ndarray | None = None,
) -> Solution:
    """Sweep until every lane's relative duality gap is at most `gap`, or `max_epochs` sweeps are made.

    The order of rows is drawn from (seed, sweep) alone, the same for all groups.  A start is found on a sample of the
    rows; the first sweep visits all of them in stored order, which is random already.  Further sweeps visit the rows
    whose gap term was too large at the last visit; when those have settled, all rows are looked at in float64, and
    those with too large a term are visited again.

    Args:
        earlier: W of earlier models, NaN as bias of a lane that has none: rows near or beyond their boundary are all
            in the sample that the start is found on.
    """
    positives, negatives, used = tally(lanes.sign)
    rows = np.flatnonzero(used).astype(np.int32)
    solver = _Solver(X, lanes, rows, gap, max_epochs, seed, positives, negatives)
    solver.start_from_sample(earlier)
    # every row moves: a dual variable of the sample may lie above the C of its row, where its gap term means nothing
    solver.visit(rows, least=-1.0)
    while not solver.over():
        solver.settle()
        if solver.certified():
            break
    return solver.solution()


def sampled(lanes: Lanes, rows: np.ndarray, positives: np.ndarray, stride: int, whole: np.ndarray | None = None):
    """Every stride-th of `rows` with C times stride; beside them, all positives of rare lanes with their own C.

    Where `whole` (n,) bool is given, those rows are all there with their own C, and every stride-th of the others.

    Returns [(rows, c_pos, c_neg)], whose losses together estimate those of all rows.
    """
    boost = np.float32(stride)
    if whole is not None:
        rest = rows[~whole[rows]][::stride].copy()
        return [(rows[whole[rows]], lanes.c_pos, lanes.c_neg), (rest, boost * lanes.c_pos, boost * lanes.c_neg)]
    sample = rows[::stride].copy()  # numba would compile once more for a strided array
    frequent = positives >= FREQUENT
    rare = _positive_in(lanes.sign, ~frequent)
    rare[sample] = False
    own = np.where(frequent, 0, lanes.c_pos).astype(np.float32)
    boosted = np.where(frequent, stride, 1).astype(np.float32) * lanes.c_pos
    return [
        (np.flatnonzero(rare).astype(np.int32), own, np.zeros(LANES, np.float32)),
        (sample, boosted, boost * lanes.c_neg),
    ]


class _Solver:
    """State of one group while it is solved."""

    def __init__(self, X, lanes, rows, gap, max_epochs, seed, positives, negatives):
        self.X, self.lanes, self.rows, self.gap = X, lanes, rows, gap
        self.max_epochs, self.seed = max_epochs, seed
        self.positives, self.negatives = positives, negatives
        self.W, self.A = aligned((X.features + 1) * LANES), aligned(X.size * LANES)
        self.sizes = np.zeros(X.size, np.float32)
        self.sums = np.zeros(2 * LANES)
        self.epochs = self.visits = 0
        self.share = SHARE
        self.level = self.before = np.inf
        self.proof: tuple[np.ndarray, np.ndarray] | None = None
        total = np.maximum(positives + negatives, 1)
        # the loss of the base rate, an upper bound that is of the right size
        self.primal = sum(
            c * count * -np.log(np.maximum(count, 0.5) / total)
            for c, count in ((lanes.c_pos.astype(np.float64), positives), (lanes.c_neg.astype(np.float64), negatives))
        )
        self.open = positives + negatives > 0

    def _scale(self):
        rows = np.maximum(self.positives + self.negatives, 1)
        usable = self.open & (self.primal > 0)
        return np.where(usable, rows / np.where(usable, self.primal, 1.0), 0.0).astype(np.float32)

    def _sweep(self, rows, c_pos, c_neg, least):
        X = self.X
        sweep(
            X.indptr, X.indices, X.data, X.squares, self.lanes.sign, c_pos, c_neg, self.lanes.loss, rows,
            self.W, self.A, self._scale(), np.float32(least), self.sizes, self.sums,
        )  # fmt: skip
        self.visits += rows.size
        self.proof = None
        return self.sums.reshape(2, LANES).copy()

    def _order(self, rows):
        """Eights of neighbours in a random order: as good as single rows, and kinder to the memory."""
        blocks = -(-rows.size // TOGETHER)
        order = np.random.default_rng((self.seed, self.epochs)).permutation(blocks)
        places = (order[:, None] * TOGETHER + np.arange(TOGETHER)).ravel()
        return rows[places[places < rows.size]]

    def start_from_sample(self, earlier):
        """Solve on every k-th row with C times k; positives of rare labels are all there, with their own C."""
        hard = None
        if earlier is not None:
            known = np.isfinite(earlier[-LANES:]).astype(np.float32)
            if known.any():
                X = self.X
                hard = below(X.indptr, X.indices, X.data, self.lanes.sign, self.rows, earlier, known, HARD)
        for stride, times in START:
            times = min(times, self.max_epochs - 1)
            if self.rows.size < stride * START_ROWS or times < 1:
                continue
            pieces = sampled(self.lanes, self.rows, self.positives, stride, hard)
            for _ in range(times):
                seen = [self._sweep(self._order(rows), c_pos, c_neg, 0.0) for rows, c_pos, c_neg in pieces]
                self.epochs += 1
            self.primal = squared_norms(self.W) / 2 + sum(losses for losses, _ in seen)

    def visit(self, rows, least=None):
        """One sweep; returns the gap terms of the visited rows, as a share of the objective."""
        least = LEAST * self.share * self.gap if least is None else least
        seen = self._sweep(rows, self.lanes.c_pos, self.lanes.c_neg, least)
        self.epochs += 1
        if rows.size == self.rows.size:
            self.primal = squared_norms(self.W) / 2 + seen[0]
        left = relative(seen[1], self.primal)
        self.level = left[self.open].mean() if self.open.any() else 0.0
        return left

    def moving(self):
        """Rows that hold much of the gap: first those far above the average of the lanes that are open, at last those
        above what may be left; and whether it is the latter."""
        sizes = self.sizes[self.rows]
        while True:
            limit = max(self.share * self.gap, ABOVE * self.level)
            moving = self.rows[sizes > limit]
            last = limit == self.share * self.gap
            if moving.size > FEW * self.rows.size or last:
                return moving, last
            self.level /= 4

    def settle(self):
        """Visit the moving rows until what is left among them is small against the gap that is allowed."""
        for _ in range(SHORT_SWEEPS):
            moving, last = self.moving()
            if self.over() or moving.size == 0:
                return
            left = self.visit(self._order(moving))
            if last and not (left[self.open] > SETTLED * self.gap).any():
                return

    def certified(self):
        """Whether every lane is below the gap; finds objective, gap and the rows that are worth a visit."""
        X, lanes = self.X, self.lanes
        norms = squared_norms(self.W) / 2
        for _ in range(2):  # the size of a row's term is relative to the objective, which is known afterwards
            certify(
                X.indptr, X.indices, X.data, lanes.sign, lanes.c_pos, lanes.c_neg, lanes.loss, self.rows,
                self.W, self.A, self._scale(), self.sizes, self.sums,
            )  # fmt: skip
            losses, gap = self.sums.reshape(2, LANES).copy()
            before, self.primal = self.primal, norms + losses
            if (self.primal <= 3 * before + 1e-30).all():
                break
        self.proof = self.primal, gap
        self.open = relative(gap, self.primal) > self.gap
        self.level = relative(gap, self.primal)[self.open].max() if self.open.any() else 0.0
        if self.level > STALLED * self.before:  # what is left is spread over rows that were not visited
            self.share /= 8
        self.before = self.level
        return not self.open.any()

    def over(self):
        return self.epochs >= self.max_epochs

    def solution(self):
        if self.proof is None:
            self.certified()
        primal, gap = self.proof
        return Solution(self.W, self.A, self.epochs, self.visits, primal, gap)
