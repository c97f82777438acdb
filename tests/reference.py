"""Slow, obvious versions of what the library does fast: loops over documents and labels, no tricks."""

import math
import re

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


def logistic_objective(X, y, c, w):
    """1/2 |w|^2 + sum_i c_i log(1 + exp(-y_i w.x_i)); X (n, d) dense with the bias column, y -1 or +1."""
    return w @ w / 2 + np.sum(c * np.logaddexp(0.0, -y * (X @ w)))


def logistic_optimum(X, y, c):
    """The minimiser of `logistic_objective`: Newton's method with halving, the Hessian written out."""
    X = np.asarray(X, np.float64)
    w = np.zeros(X.shape[1])
    for _ in range(200):
        p = 1.0 / (1.0 + np.exp(np.clip(y * (X @ w), -700, 700)))  # probability of the wrong side
        gradient = w - X.T @ (c * y * p)
        if np.abs(gradient).max() < 1e-9:
            break
        step = np.linalg.solve(np.eye(w.size) + X.T @ ((c * p * (1 - p))[:, None] * X), gradient)
        size, now = 1.0, logistic_objective(X, y, c, w)
        while size > 1e-9 and logistic_objective(X, y, c, w - size * step) > now:
            size /= 2
        w = w - size * step
    return w


def terms_of(text, ngrams):
    """Terms of a lower-case text as scikit-learn has them: by position of the last token, shortest first."""
    tokens = re.findall(r"(?u)\b\w\w+\b", text)
    return [
        " ".join(tokens[end - run : end])
        for end in range(1, len(tokens) + 1)
        for run in range(1, ngrams + 1)
        if run <= end
    ]


def counts_at(scores, positive, cut):
    """Positives and negatives with score >= cut."""
    said = [y for s, y in zip(scores, positive, strict=True) if s >= cut]
    return sum(said), len(said) - sum(said)


def best_f1(scores, positive):
    """The largest F1 over every set of rows that a cut can say."""
    total = sum(positive)
    found = [counts_at(scores, positive, cut) for cut in set(scores)]
    return max(2 * tp / (tp + fp + total) for tp, fp in found)
