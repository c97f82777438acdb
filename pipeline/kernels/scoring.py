"""Scores of documents for all labels, from weights stored feature by feature."""

import numpy as np
from numba import njit


@njit(cache=True, nogil=True, error_model="numpy")
def score_rows(indptr, indices, values, w_indptr, w_labels, w_values, bias, S):
    """S (m, L) float32 = X W + bias.

    Every score is added up over the features of its document in ascending order, in float32, so that it does not depend
    on which other documents are scored with it (a matrix product through BLAS would).

    Args:
        indptr (m + 1,), indices, values: X (m, d), CSR, indices ascending.
        w_indptr (d + 1,), w_labels, w_values: W (d, L), CSR: the labels that weigh each feature.
        bias (L,) float32.
    """
    for i in range(indptr.size - 1):
        row = S[i]
        row[:] = bias
        for k in range(indptr[i], indptr[i + 1]):
            x, feature = values[k], indices[k]
            for j in range(w_indptr[feature], w_indptr[feature + 1]):
                row[w_labels[j]] += x * w_values[j]


@njit(cache=True, nogil=True)
def count_per_feature(indices, w_indptr):
    """Add the number of weights of each feature to w_indptr (d + 1,) int64, one place on (first half of a sort)."""
    for feature in indices:
        w_indptr[feature + 1] += 1


@njit(cache=True, nogil=True)
def scatter_weights(label, indices, weights, cursor, w_labels, w_values):
    """Put one label's weights in their place (second half of the sort).  `cursor` (d,) int64 moves on."""
    for k in range(indices.size):
        at = cursor[indices[k]]
        w_labels[at], w_values[at] = label, weights[k]
        cursor[indices[k]] = at + 1


@njit(cache=True, nogil=True)
def tags_of_rows(S, thresholds):
    """Labels at or above their threshold: indptr (m + 1,) int64, label ids int32 ascending within a row.

    S (m, L) float32, thresholds (L,) float64; +inf is never reached.
    """
    indptr = np.zeros(S.shape[0] + 1, np.int64)
    labels = np.empty(1024, np.int32)
    count = 0
    for i in range(S.shape[0]):
        for j in range(S.shape[1]):
            if S[i, j] >= thresholds[j]:
                if count == labels.size:
                    grown = np.empty(2 * labels.size, np.int32)
                    grown[:count] = labels
                    labels = grown
                labels[count] = j
                count += 1
        indptr[i + 1] = count
    return indptr, labels[:count].copy()
