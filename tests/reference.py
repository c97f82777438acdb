"""Slow, obvious versions of what the library does fast: loops over documents and labels, no tricks."""

import math

import numpy as np


def gold_of(Y):
    """Dense gold (m, L) -> indptr (m + 1,), label ids (pairs,)."""
    return np.concatenate([[0], np.cumsum(np.sum(Y, axis=1))]), np.nonzero(Y)[1]


def ranked_labels(scores):
    """Label ids by score descending, then by id ascending."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


def precision_at(Y, S, k):
    return np.mean([sum(gold[j] for j in ranked_labels(scores)[:k]) / k for gold, scores in zip(Y, S, strict=True)])


def recall_at(Y, S, k):
    found = []
    for gold, scores in zip(Y, S, strict=True):
        hits = sum(gold[j] for j in ranked_labels(scores)[:k])
        found.append(hits / sum(gold) if any(gold) else 0.0)
    return np.mean(found)


def r_precision_at(Y, S, k):
    found = []
    for gold, scores in zip(Y, S, strict=True):
        hits = sum(gold[j] for j in ranked_labels(scores)[:k])
        found.append(hits / min(k, sum(gold)) if any(gold) else 0.0)
    return np.mean(found)


def mean_average_precision_at(Y, S, k):
    found = []
    for gold, scores in zip(Y, S, strict=True):
        order = ranked_labels(scores)[:k]
        total = 0.0
        for place in range(1, len(order) + 1):
            if gold[order[place - 1]]:
                total += sum(gold[j] for j in order[:place]) / place
        found.append(total / min(k, sum(gold)) if any(gold) else 0.0)
    return np.mean(found)


def propensity(support, n, A=0.55, B=1.5):
    """1 / (1 + C exp(-A ln(N_l + B))), C = (ln N - 1)(B + 1)^A: the formula as printed, for n > e."""
    C = (math.log(n) - 1) * (B + 1) ** A
    return np.array([1 / (1 + C * math.exp(-A * math.log(N + B))) for N in support])


def psp_at(Y, S, p, k):
    """PSP@k of the ranking over PSP@k of the best ranking, with the 1/k written out."""
    got = best = 0.0
    for gold, scores in zip(Y, S, strict=True):
        got += sum(gold[j] / p[j] for j in ranked_labels(scores)[:k]) / k
        best += sum(sorted((gold[j] / p[j] for j in range(len(p))), reverse=True)[:k]) / k
    return got / best if best else 0.0


def expected_calibration_error(Y, P, bins):
    members = [[] for _ in range(bins)]
    for y, p in zip(np.ravel(Y), np.ravel(P), strict=True):
        members[min(math.floor(p * bins), bins - 1)].append((y, p))
    gaps = [abs(np.mean([y for y, _ in b]) - np.mean([p for _, p in b])) * len(b) for b in members if b]
    return sum(gaps) / np.size(P)
