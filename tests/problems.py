"""Small problems for the trainer, and the same numbers as dense arrays."""

import numpy as np
import scipy.sparse as sp

from pipeline.kernels.lockstep import LOSSES, Lanes, Rows
from pipeline.kernels.simd import LANES


def rows_of(X):
    """Dense or sparse X (n, d) without the bias -> Rows."""
    X = sp.csr_array(X, dtype=np.float32)
    X.sort_indices()
    squares = np.asarray(X.astype(np.float64).multiply(X.astype(np.float64)).sum(axis=1)).ravel() + 1
    return Rows(X.indptr.astype(np.int64), X.indices.astype(np.int32), X.data, squares.astype(np.float32), X.shape[1])


def dense_of(X):
    """Rows -> (n, d + 1) float64 with the bias column."""
    dense = sp.csr_array((X.data, X.indices, X.indptr), (X.size, X.features)).toarray().astype(np.float64)
    return np.hstack([dense, np.ones((X.size, 1))])


def lanes_of(columns, c_pos=1.0, c_neg=None, loss="logistic"):
    """Columns of -1, 0 and +1, each (n,), and C, one or one a lane -> Lanes; lanes that are left are not used."""
    sign = np.zeros((len(columns[0]), LANES), np.int8)
    for k, y in enumerate(columns):
        sign[:, k] = y
    c_pos = np.broadcast_to(np.float32(c_pos), LANES).copy()
    c_neg = c_pos.copy() if c_neg is None else np.broadcast_to(np.float32(c_neg), LANES).copy()
    return Lanes(sign.ravel(), c_pos, c_neg, LOSSES[loss])


def by_lane(flat):
    """(m * 16,) -> (m, 16) float64."""
    return flat.reshape(-1, LANES).astype(np.float64)


def costs_of(lanes, lane):
    """C of every row in one lane, (n,) float64; 0 where the row is not in it."""
    sign = lanes.sign.reshape(-1, LANES)[:, lane]
    return np.select([sign > 0, sign < 0], [lanes.c_pos[lane], lanes.c_neg[lane]], 0).astype(np.float64)


def noisy(n=90, d=25, density=0.3, seed=0):
    """Rows and y (n,) of -1 and +1 with some structure and some noise."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * (rng.random((n, d)) < density)
    X /= np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-9)
    y = np.where(X @ rng.normal(size=d) + 0.5 * rng.normal(size=n) > 0.4, 1, -1)
    return rows_of(X), y


def texts(n=400, d=900, seed=7):
    """Rows of unit length over features with falling frequency, and three labels that hang on a few of them."""
    rng = np.random.default_rng(seed)
    X = (rng.random((n, d)) < 0.4 / (1 + np.arange(d) / 10)).astype(np.float64) * rng.uniform(0.5, 2, (n, d))
    X /= np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-9)
    return rows_of(X), [np.where(X[:, k] + X[:, k + 7] > 0.1, 1, -1) for k in (2, 30, 60)]
