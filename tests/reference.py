"""Slow, obvious versions of what the library does fast: loops over documents and labels, no tricks."""

import itertools
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


def loss_of(margin, loss):
    """log(1 + exp(-m)), or max(0, 1 - m)^2."""
    return np.logaddexp(0.0, -margin) if loss == "logistic" else np.maximum(0.0, 1.0 - margin) ** 2


def objective(X, y, c, w, loss="logistic"):
    """1/2 |w|^2 + sum_i c_i loss(y_i w.x_i); X (n, d) dense with the bias column, y -1, +1, or 0: not in the lane."""
    return w @ w / 2 + np.sum(c * (y != 0) * loss_of(y * (X @ w), loss))


def dual_objective(X, y, c, a, loss="logistic"):
    """-1/2 |sum a_i y_i x_i|^2 - sum conjugate_i(a_i): below every `objective`; -inf where an a_i is not allowed."""
    w = X.T @ (a * y)
    total = -(w @ w) / 2
    for a_i, c_i, y_i in zip(a, c, y, strict=True):
        if y_i == 0:
            continue
        if a_i < 0 or (loss == "logistic" and a_i > c_i):
            return -np.inf
        if loss == "logistic":
            p = a_i / c_i
            total -= c_i * sum(x * math.log(x) for x in (p, 1 - p) if x > 0)
        else:
            total += a_i - a_i**2 / (4 * c_i)
    return total


def optimum(X, y, c, loss="logistic"):
    """The minimiser of `objective`: Newton's method with halving, the (generalised) Hessian written out."""
    X, y, c = np.asarray(X, np.float64), np.asarray(y, np.float64), c * (np.asarray(y) != 0)
    w = np.zeros(X.shape[1])
    for _ in range(200):
        m = y * (X @ w)
        if loss == "logistic":
            p = 1.0 / (1.0 + np.exp(np.clip(m, -700, 700)))  # probability of the wrong side
            slope, curvature = c * p, c * p * (1 - p)
        else:
            slope, curvature = 2 * c * np.maximum(0, 1 - m), 2 * c * (m < 1)
        gradient = w - X.T @ (slope * y)
        if np.abs(gradient).max() < 1e-9:
            break
        step = np.linalg.solve(np.eye(w.size) + X.T @ (curvature[:, None] * X), gradient)
        size, now = 1.0, objective(X, y, c, w, loss)
        while size > 1e-9 and objective(X, y, c, w - size * step, loss) > now:
            size /= 2
        w = w - size * step
    return w


def best_dual(base, q, c, loss="logistic"):
    """The a that is optimal for one row whose margin is base + q a: the root of a falling function, by bisection."""

    def wanted(a):  # what a would be at the margin that it makes itself
        m = base + q * a
        if loss == "squared_hinge":
            return 2 * c * max(0.0, 1.0 - m)
        return c / (1 + math.exp(m)) if m < 700 else 0.0

    low, high = 0.0, max(wanted(0.0), 1e-300)
    for _ in range(300):
        a = (low + high) / 2
        low, high = (a, high) if wanted(a) > a else (low, a)
    return (low + high) / 2


def splitmix64(key, count):
    """The first numbers of the generator `key`, 64 bits each (Steele, Lea, Flood 2014), in whole numbers of Python."""
    mask, found = 2**64 - 1, []
    for i in range(1, count + 1):
        z = (key + i * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def least_makespan(costs, count):
    """The smallest possible load of the fullest of `count` blocks, by trying every assignment."""
    loads = {(0.0,) * count}
    for cost in costs:
        loads = {tuple(sorted((*load[:k], load[k] + cost, *load[k + 1 :]))) for load in loads for k in range(count)}
    return min(max(load) for load in loads)


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


def expected_f1_of_sets(p, if_undefined=0.0):
    """{set of labels: expected F1 when it is said}, every set, over every gold set of independent labels."""
    subsets = [s for k in range(len(p) + 1) for s in itertools.combinations(range(len(p)), k)]
    found = dict.fromkeys(subsets, 0.0)
    for gold in subsets:
        chance = math.prod(p[j] if j in gold else 1 - p[j] for j in range(len(p)))
        for said in subsets:
            size = len(said) + len(gold)
            found[said] += chance * (2 * len(set(said) & set(gold)) / size if size else if_undefined)
    return found
