"""Influence values against the metric itself, with one document weighing a little more."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from pipeline.kernels import influence, ranking


@pytest.fixture(params=[0, 1, 2])
def fold(request):
    rng = np.random.default_rng(request.param)
    n, L = 40, 6
    Y = rng.random((n, L)) < 0.3
    Y[:, 4], Y[:, 5] = False, True  # curves that are not defined
    S = np.round(rng.normal(size=(n, L)) + Y, 1)  # many ties
    gold = np.concatenate([[0], np.cumsum(Y.sum(axis=1))]), np.nonzero(Y)[1]
    return S, Y, gold


def counted(S, gold, pooled=False):
    cuts = ranking.positive_cuts(*ranking.positive_scores(S, *gold), S.shape[1], pooled=pooled)
    counts = ranking.no_negatives(cuts)
    ranking.count_negatives(S, *gold, cuts, *counts)
    return cuts, counts


def moved(metric, n, i, step=1e-6):
    """n times the derivative of metric(weights) by the weight of document i."""
    up, down = np.ones(n), np.ones(n)
    up[i] += step
    down[i] -= step
    return n * (metric(up) - metric(down)) / (2 * step)


def test_average_precision_moves_as_said(fold):
    S, Y, gold = fold
    cuts, counts = counted(S, gold)
    values = influence.of_documents(S, *gold, cuts, influence.average_precision_steps(cuts, *counts, len(S)))

    def macro(w):
        return np.mean([average_precision_score(Y[:, j], S[:, j], sample_weight=w) for j in (0, 1, 2, 3, 5)])

    assert values == pytest.approx([moved(macro, len(S), i) for i in range(len(S))], abs=1e-5)
    assert values.sum() == pytest.approx(0, abs=1e-9)


def test_pooled_average_precision_moves_as_said(fold):
    S, Y, gold = fold
    cuts, counts = counted(S, gold, pooled=True)
    values = influence.of_documents(S, *gold, cuts, influence.average_precision_steps(cuts, *counts, len(S)))

    def micro(w):
        return average_precision_score(Y.ravel(), S.ravel(), sample_weight=np.repeat(w, S.shape[1]))

    assert values == pytest.approx([moved(micro, len(S), i) for i in range(len(S))], abs=1e-5)


def test_roc_auc_moves_as_said(fold):
    S, Y, gold = fold
    cuts, counts = counted(S, gold)
    values = influence.of_documents(S, *gold, cuts, influence.roc_auc_steps(cuts, *counts, len(S)))

    def macro(w):
        return np.mean([roc_auc_score(Y[:, j], S[:, j], sample_weight=w) for j in (0, 1, 2, 3)])

    assert values == pytest.approx([moved(macro, len(S), i) for i in range(len(S))], abs=1e-5)
    assert values.sum() == pytest.approx(0, abs=1e-9)


def test_no_positive_anywhere_adds_nothing():
    S, gold = np.zeros((3, 2)), (np.zeros(4, int), np.empty(0, int))
    cuts, counts = counted(S, gold)
    for steps in (influence.average_precision_steps, influence.roc_auc_steps):
        assert not influence.of_documents(S, *gold, cuts, steps(cuts, *counts, 3)).any()
