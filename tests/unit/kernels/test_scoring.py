import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal

from pipeline.kernels.scoring import count_per_feature, scatter_weights, score_rows, tags_of_rows

ORDINARY = settings(deadline=None, max_examples=60)


def csr(dense):
    dense = sp.csr_array(dense.astype(np.float32))
    return dense.indptr.astype(np.int64), dense.indices.astype(np.int32), dense.data


def problem(n=40, d=60, L=17, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * (rng.random((n, d)) < 0.3)
    X[n // 2] = 0
    W = rng.normal(size=(d, L)) * (rng.random((d, L)) < 0.4)
    W[:, L // 2] = 0
    W[d // 3] = 0
    return X.astype(np.float32), W.astype(np.float32), rng.normal(size=L).astype(np.float32)


def scored(X, W, bias):
    S = np.full((X.shape[0], bias.size), np.nan, np.float32)
    score_rows(*csr(X), *csr(W), bias, S)
    return S


def test_scores_are_the_product_and_the_bias():
    X, W, bias = problem()
    want = X.astype(np.float64) @ W.astype(np.float64) + bias
    assert_allclose(scored(X, W, bias), want, rtol=1e-5, atol=1e-5)


def test_a_row_without_features_scores_the_bias():
    X, W, bias = problem()
    assert_array_equal(scored(X, W, bias)[X.shape[0] // 2], bias)


@pytest.mark.parametrize("size", [1, 3, 16, 39])
def test_scores_do_not_depend_on_the_batch(size):
    X, W, bias = problem()
    whole = scored(X, W, bias)
    pieces = [scored(X[k : k + size], W, bias) for k in range(0, X.shape[0], size)]
    assert np.concatenate(pieces).tobytes() == whole.tobytes()
    assert scored(X[::-1], W, bias)[::-1].tobytes() == whole.tobytes()


def test_a_score_is_summed_in_float32_in_the_order_of_the_features():
    X, W, bias = problem(n=3, d=400)
    S = scored(X, W, bias)
    for i in range(3):
        for j in range(bias.size):
            total = bias[j]
            for x, w in zip(X[i], W[:, j], strict=True):
                total = total + x * w
            # a fused multiply-add rounds once where this loop rounds twice
            assert_allclose(S[i, j], total, rtol=0, atol=400 * 2**-24 * 8)


def test_weights_by_label_become_weights_by_feature():
    _, W, _ = problem()
    d, L = W.shape
    counts = np.zeros(d + 1, np.int64)
    by_label = [(np.flatnonzero(W[:, j]).astype(np.int32), W[W[:, j] != 0, j]) for j in range(L)]
    for indices, _ in by_label:
        count_per_feature(indices, counts)
    indptr = np.cumsum(counts)
    labels, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    cursor = indptr[:-1].copy()
    for j, (indices, weights) in enumerate(by_label):
        scatter_weights(j, indices, weights, cursor, labels, values)
    for found, want in zip((indptr, labels, values), csr(W), strict=True):
        assert_array_equal(found, want)
    assert_array_equal(cursor, indptr[1:])


@st.composite
def scores_and_thresholds(draw):
    m, L = draw(st.integers(0, 6)), draw(st.integers(0, 6))
    levels = st.sampled_from([-2.0, -0.5, 0.0, 0.1, 3.0])
    S = draw(arrays(np.float32, (m, L), elements=levels.map(lambda x: float(np.float32(x)))))
    thresholds = draw(arrays(np.float64, L, elements=levels | st.just(np.inf) | st.just(-np.inf)))
    return S, thresholds


@given(scores_and_thresholds())
@ORDINARY
def test_tags_are_the_labels_at_or_above_their_threshold(case):
    S, thresholds = case
    indptr, labels = tags_of_rows(S, thresholds)
    assert labels.dtype == np.int32
    for i in range(S.shape[0]):
        want = [j for j in range(S.shape[1]) if float(S[i, j]) >= thresholds[j]]
        assert labels[indptr[i] : indptr[i + 1]].tolist() == want


def test_many_tags_fit():
    S = np.random.default_rng(0).normal(size=(100, 70)).astype(np.float32)
    indptr, labels = tags_of_rows(S, np.zeros(70))
    row, want = np.nonzero(S >= 0)
    assert want.size > 2048
    assert_array_equal(labels, want)
    assert_array_equal(np.diff(indptr), np.bincount(row, minlength=100))


def test_a_threshold_is_compared_in_float64():
    """Half way between two float32 scores is no float32: rounding it would move one of them across."""
    low, high = np.float32(1), np.nextafter(np.float32(1), np.float32(2))
    S = np.array([[low], [high]], np.float32)
    indptr, _ = tags_of_rows(S, np.array([(float(low) + float(high)) / 2]))
    assert_array_equal(indptr, [0, 0, 1])
