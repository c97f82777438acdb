"""CPU seconds of the lanes against scikit-learn's liblinear on the same matrix, loss and C: ratios of one run."""

import time

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import LogisticRegression

from pipeline.config import TrainConfig
from pipeline.kernels.lockstep import Rows, row_squares
from pipeline.kernels.simd import LANES
from pipeline.learners.ovr import Gold, fit_block, warm_up

FOLDS = 3


@pytest.mark.bench
def test_final_and_three_folds_against_liblinear(capsys, tmp_path):
    """Sixteen labels, a full group, and 20,000 rows: final and out-of-fold models, four trainings a label."""
    rng = np.random.default_rng(0)
    n, d, labels = 20_000, 20_000, LANES
    X = sp.random(n, d, 60 / d, "csr", np.float32, rng)
    X = (sp.diags(1 / np.sqrt(np.asarray(X.multiply(X).sum(axis=1)).ravel() + 1e-9)) @ X).tocsr().astype(np.float32)
    truth = rng.normal(size=(d, labels)) * 5
    Y = (X @ truth + rng.normal(size=(n, labels))) > 2
    fold = rng.integers(FOLDS, size=n).astype(np.int8)
    labels_of, rows = np.nonzero(Y.T)
    gold = Gold(np.searchsorted(labels_of, np.arange(labels + 1)), rows.astype(np.int32), fold)
    matrix = Rows(X.indptr.astype(np.int64), X.indices, X.data, row_squares(np.diff(X.indptr), X.data), d)
    cfg = TrainConfig(C=10, gap=1e-3, folds=FOLDS, prune=0)
    warm_up(tmp_path, cfg)

    start = time.process_time()
    models = fit_block(list(range(labels)), matrix, gold, cfg)["label_models"].to_pylist()
    ours = time.process_time() - start

    with_bias = sp.hstack([X, np.ones((n, 1), np.float32)]).tocsr()
    start = time.process_time()
    worst = 0.0
    for j in range(labels):
        for left_out in (None, *range(FOLDS)):
            used = np.ones(n, bool) if left_out is None else fold != left_out
            model = LogisticRegression(solver="liblinear", dual=True, C=10, tol=0.1, fit_intercept=False, max_iter=1000)
            model.fit(with_bias[used], Y[used, j])
            if left_out is None:
                w = model.coef_[0].astype(np.float64)
                margin = np.where(Y[:, j], 1, -1) * (with_bias @ w)
                objective = w @ w / 2 + 10 * np.logaddexp(0, -margin).sum()
                worst = max(worst, models[j]["objective"] / objective - 1)
    theirs = time.process_time() - start
    with capsys.disabled():
        print(f"\nCPU s: lanes {ours:.2f}, liblinear {theirs:.2f}, ratio {theirs / ours:.1f}")
        print(f"objective of the lanes against that of liblinear: {worst:+.2%} at worst")
    assert worst <= 1.1 * cfg.gap  # so says the certificate, whoever the other is
