"""Drop small weights as long as a lane's own objective rises by no more than a given share.

DiSMEC (Babbar and Schoelkopf, 2017) drops |w| < 0.01 whatever that costs; here the cost is given, and the cut
follows from it.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from pipeline.kernels import lockstep
from pipeline.kernels.lockstep import Lanes, Rows, Solution
from pipeline.kernels.simd import LANES, aligned

STRIDE = 8  # the first guess is tried on every 8th row
FIRST = 0.2  # of what is allowed: half the squared norm of what the first guess drops
AIM = 0.8  # of what is allowed: what the second guess should cost
TRIES = 3  # over all rows; each costs one pass


class Pruned(NamedTuple):
    """Weights that are left of a group of lanes."""

    W: np.ndarray  # ((d + 1) * 16,) float32
    cuts: np.ndarray  # (16,) float32: |w| < cut was dropped; 0 where nothing was
    primal: np.ndarray  # (16,) float64, the objective of these weights


def prune(X: Rows, lanes: Lanes, solution: Solution, share: float) -> Pruned:
    """For each lane the largest cut found such that dropping |w| < cut raises its objective by at most `share` of it.

    Dropping weights of norm r raises the objective by about rho r^2 / 2, where rho >= 1 depends on the lane.  A guess
    that must be too small is tried on a sample of the rows and gives rho; the cut that follows is tried on all rows,
    and smaller ones where it costs too much.
    """
    cuts = np.zeros(LANES, np.float32)
    if share == 0 or not (solution.primal > 0).any():
        return Pruned(solution.W, cuts, solution.primal)
    positives, _, used = lockstep.tally(lanes.sign)
    rows = np.flatnonzero(used).astype(np.int32)
    allowed = share * solution.primal
    squares = _squares_by_size(solution.W)
    trial = aligned(solution.W.size)

    # a sample of few rows misjudges rho, up to a larger share that drops less; all of few rows cost little
    stride = STRIDE if rows.size >= STRIDE * lockstep.START_ROWS else 1
    pieces = lockstep.sampled(lanes, rows, positives, stride)
    guess, dropped = _cuts(squares, FIRST * allowed)
    keep_large(solution.W, guess, trial)
    cost = (
        sum(
            (
                _losses(X, lanes._replace(c_pos=c_pos, c_neg=c_neg), rows, trial, solution.A)
                - _losses(X, lanes._replace(c_pos=c_pos, c_neg=c_neg), rows, solution.W, solution.A)
            )
            for rows, c_pos, c_neg in pieces
        )
        - dropped
    )
    rho = np.where(dropped > 0, np.maximum(cost, 0.1 * dropped) / np.maximum(dropped, 1e-300), 1.0)
    target = AIM * allowed / np.maximum(rho, 1.0)

    best = solution.primal.copy()
    waiting = solution.primal > 0
    for _ in range(TRIES):
        guess, _ = _cuts(squares, np.where(waiting, target, 0.0))
        guess = np.where(waiting, guess, cuts)
        keep_large(solution.W, guess, trial)
        primal = lockstep.squared_norms(trial) / 2 + _losses(X, lanes, rows, trial, solution.A)
        good = waiting & (primal <= solution.primal + allowed)
        cuts[good], best[good] = guess[good], primal[good]
        waiting &= ~good
        if not waiting.any():
            break
        rise = np.maximum((primal - solution.primal) / np.where(allowed > 0, allowed, np.inf), 1.0)
        target = np.where(waiting, target * AIM / rise, target)
    keep_large(solution.W, cuts, trial)
    return Pruned(trial, cuts, best)


def _losses(X, lanes, rows, W, A):
    sums = np.zeros(2 * LANES)
    nothing = np.zeros(LANES, np.float32)
    lockstep.certify(
        X.indptr, X.indices, X.data, lanes.sign, lanes.c_pos, lanes.c_neg, lanes.loss, rows,
        W, A, nothing, np.empty(X.size, np.float32), sums,
    )  # fmt: skip
    return sums[:LANES]


@njit(cache=True, nogil=True)
def _squares_by_size(W):
    """(16, 2048) float64: sums of w^2 by the size of |w|, eight bins an octave; the bias is left out."""
    bits = W.view(np.int32)
    sums = np.zeros((LANES, 2048))
    for k in range(0, W.size - LANES, LANES):
        for lane in range(LANES):
            w = np.float64(W[k + lane])
            sums[lane, (bits[k + lane] & 0x7FFFFFFF) >> 20] += w * w
    return sums


def _cuts(squares, budget):
    """Per lane the largest cut, on the grid of `squares`, below which half the squares sum to at most `budget`.

    Returns (16,) float32 and half the squares that it drops, (16,) float64.
    """
    half = np.cumsum(squares, axis=1) / 2
    edges = (half <= np.asarray(budget)[:, None]).sum(axis=1)
    edges = np.minimum(edges, 2039)
    dropped = np.where(edges > 0, half[np.arange(LANES), np.maximum(edges, 1) - 1], 0.0)
    return (edges.astype(np.int32) << 20).view(np.float32), dropped


@njit(cache=True, nogil=True)
def keep_large(W, cuts, out):
    """out = W without |w| < cut of each lane; the bias (last row) stays.  W, out ((d + 1) * 16,), cuts (16,)."""
    last = W.size - LANES
    for k in range(0, last, LANES):
        for lane in range(LANES):
            w = W[k + lane]
            out[k + lane] = w if abs(w) >= cuts[lane] else np.float32(0.0)
    out[last:] = W[last:]
