"""The same labels on the same matrix with the same loss and C, ours against the peers, to the same objective."""

import functools

import numpy as np

from tests.bench.matrices import made
from tests.bench.peers import FLAT, rows
from tests.bench.processes import Skipped, ours, peer, peers_python
from tests.bench.report import Report, number, times

CORPORA = ("arxiv2010s", "eurlex57k")
GAPS = (0.01, 0.003, 0.001)  # ours runs at the first that is enough
WORSE = 0.001  # share by which the objective of a label may be above that of the peer
TOLERANCES = {"sklearn-liblinear": 0.1}  # the others have this or a similar one as their own
FASTEST = ("pecos-ova", "napkinxc-ovr")  # of `flat`
COLUMNS = {
    "corpus": str,
    "trainer": str,
    "labels": str,
    "CPU ms a label": number(1),
    "wall ms a label": number(1),
    "certified gap, worst": number(4),
    "ours at gap": lambda gap: "–" if gap is None else f"{gap:g}",
    "CPU, theirs / ours": times(),
    "wall, theirs / ours": times(),
    "objective, ours / theirs - 1: mean": number(3, sign=True, percent=True),
    "worst": number(3, sign=True, percent=True),
}


def flat(options):
    return _side_by_side(options, "flat", "one-vs-rest logistic, C 10", "logistic", 10, list(FLAT), 30)


def hinge(options):
    return _side_by_side(options, "hinge", "one-vs-rest squared hinge, C 1", "squared_hinge", 1, list(FLAT), 15)


def folds(options):
    title = "one-vs-rest logistic, C 10: final models and out-of-fold scores of 3 folds"
    names = list(FLAT) if options.all else list(FASTEST)
    return _side_by_side(options, "folds", title, "logistic", 10, names, 30)


def _side_by_side(options, part, title, loss, C, names, goal):
    report = Report(part, title, COLUMNS, [], [], [])
    for corpus in options.corpora or CORPORA:
        try:
            _corpus(report, made(corpus), corpus, options.labels, loss, C, names, goal)
        except LookupError as why:
            report.notes.append(f"{corpus} is skipped: {why}")
    if not report.rows:
        raise Skipped("; ".join(report.notes))
    if part == "folds":
        report.notes.append(
            "A peer makes four trainings, all rows and each fold left out; scoring the rows left out is not counted. "
            "Ours is the whole of fit_block: scores, curves and histograms too. Objectives are those of the final "
            "models."
        )
    ready = max(row["ready"] for row in report.rows if "ready" in row)
    report.notes.append(
        "Objectives are recomputed in float64 from the weights of each, label by label. Ours runs at the loosest gap "
        f"of {', '.join(f'{gap:g}' for gap in GAPS)} at which no label is more than {WORSE:.1%} above the peer. Up to "
        f"{ready:.1f} s to compile its kernels, or to read them from numba's cache, and to try them are not counted."
    )
    return report


def _corpus(report, folder, corpus, labels, loss, C, names, goal):
    same = ("--matrix", folder, "--labels", labels, "--loss", loss, "--C", C)
    work = "folds" if report.part == "folds" else "flat"

    @functools.cache
    def mine(gap):
        found = ours("ours", work, *same, "--gap", gap)
        return found | {"objective": objectives(folder, found["label_ids"], found["W"], loss, C)}

    compared, used = [], set()
    try:
        peers_python()
    except Skipped as why:
        names = []
        used.add(GAPS[-1])
        note = f"peers are skipped: {why}"
        report.notes.extend([note] if note not in report.notes else [])
    for name in names:
        try:
            theirs = _trained(name, work, same)
        except Skipped as why:
            report.notes.append(f"{corpus}: {name} is skipped: {why}")
            continue
        reached = objectives(folder, theirs["label_ids"], theirs["W"], loss, C)
        for gap in GAPS:
            above = mine(gap)["objective"] / reached - 1
            if above.max() <= WORSE:
                break
        used.add(gap)
        row = _row(corpus, name, theirs) | {
            "ours at gap": gap,
            "CPU, theirs / ours": float(theirs["cpu_seconds"] / mine(gap)["cpu_seconds"]),
            "wall, theirs / ours": float(theirs["wall_seconds"] / mine(gap)["wall_seconds"]),
            "objective, ours / theirs - 1: mean": float(above.mean()),
            "worst": float(above.max()),
            "objectives": reached.tolist(),
        }
        compared.append(row)
        report.versions.extend(v for v in str(theirs["version"]).split(", ") if v not in report.versions)
    for gap in sorted(used, reverse=True):
        found = mine(gap)
        row = _row(corpus, f"tagmill, gap {gap:g}", found) | {
            "certified gap, worst": float(found["gaps"].max()),
            "objectives": found["objective"].tolist(),
            "label_ids": found["label_ids"].tolist(),
            "ready": float(found["ready_seconds"]),
        }
        report.rows.append(row)
    report.rows.extend(compared)
    if compared:
        closest = min(compared, key=lambda row: row["CPU, theirs / ours"])
        enough = all(row["worst"] <= WORSE for row in compared)
        report.notes.append(
            f"{corpus}: {closest['CPU, theirs / ours']:.1f} times less CPU than {closest['trainer']}, the best of them "
            f"(goal: {goal}), objective {'not more' if enough else 'MORE'} than {WORSE:.1%} above any"
        )


def _trained(name, work, same):
    """One training, or that of all rows with the seconds of those that leave a fold out added."""
    options = ("--tolerance", TOLERANCES[name]) if name in TOLERANCES else ()
    found = peer(name, *same, *options)
    for fold in range(3) if work == "folds" else ():
        part = peer(name, *same, *options, "--left-out", fold)
        for key in ("cpu_seconds", "wall_seconds"):
            found[key] = found[key] + part[key]
    return found


def _row(corpus, trainer, found):
    labels = found["label_ids"].size
    return {
        "corpus": corpus,
        "trainer": trainer,
        "labels": labels,
        "CPU ms a label": float(found["cpu_seconds"] / labels * 1e3),
        "wall ms a label": float(found["wall_seconds"] / labels * 1e3),
    }


def objectives(folder, label_ids, W, loss, C):
    """1/2 |w|^2 + C sum_i loss(y_i w.x_i) of each label, (L,) float64; W (d + 1, L), the last row is the bias."""
    X, Y = rows(folder)
    W = W.astype(np.float64)
    margins = (X.astype(np.float64) @ W[:-1] + W[-1]) * (2.0 * Y[:, label_ids].toarray() - 1.0)
    losses = np.logaddexp(0.0, -margins) if loss == "logistic" else np.maximum(0.0, 1.0 - margins) ** 2
    return (W**2).sum(axis=0) / 2 + C * losses.sum(axis=0)
