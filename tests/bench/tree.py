"""All labels: the full one-vs-rest against the peers' tree approximations, by what the tags are worth."""

import numpy as np

from tests.bench.matrices import made
from tests.bench.peers import TREES, rows
from tests.bench.processes import Skipped, ours, peer
from tests.bench.report import Report, number

CORPUS = "eurlex57k"
C = 20
GAPS = (0.05, 0.01)
GOAL = 0.6  # of the CPU of the faster peer
DEPTHS = (1, 3, 5)
COLUMNS = {
    "corpus": str,
    "trainer": str,
    "labels": str,
    "CPU s": number(1),
    "wall s": number(1),
    **{f"P@{k}": number(4) for k in DEPTHS},
    "certified gap: mean": number(4),
    "worst": number(4),
}


def tree(options):
    report = Report("tree", "all labels, one-vs-rest without folds against trees", COLUMNS, [], [], [])
    for corpus in options.corpora or (CORPUS,):
        try:
            _corpus(report, made(corpus), corpus)
        except LookupError as why:
            report.notes.append(f"{corpus} is skipped: {why}")
    if not report.rows:
        raise Skipped("; ".join(report.notes))
    report.notes.append(
        f"tagmill: C {C:g}, no weight dropped, ranked by raw scores. The peers have their own defaults. Seconds are "
        "those of training, with a peer's clustering of labels; making the input, compiling and prediction are not in."
    )
    return report


def _corpus(report, folder, corpus):
    mine, theirs = [], []
    for gap in GAPS:
        found = ours("ours", "tree", "--matrix", folder, "--C", C, "--gap", gap)
        certificate = {"certified gap: mean": float(found["gaps"].mean()), "worst": float(found["gaps"].max())}
        mine.append(_row(folder, corpus, f"tagmill, gap {gap:g}", found["gaps"].size, found) | certificate)
    _, Y = rows(folder)
    for name in TREES:
        try:
            found = peer(name, "--matrix", folder)
        except Skipped as why:
            report.notes.append(f"{corpus}: {name} is skipped: {why}")
            continue
        theirs.append(_row(folder, corpus, name, Y.shape[1], found))
        report.versions.append(str(found["version"]))
    report.rows.extend(mine + theirs)
    if theirs:
        faster = min(theirs, key=lambda row: row["CPU s"])
        for row in mine:
            better = [f"P@{k}" for k in DEPTHS if row[f"P@{k}"] > faster[f"P@{k}"]]
            report.notes.append(
                f"{corpus}, {row['trainer']}: {row['CPU s'] / faster['CPU s']:.2f} of the CPU of {faster['trainer']}, "
                f"the faster of them (goal: {GOAL}); better at {', '.join(better) or 'no depth'}"
            )


def _row(folder, corpus, trainer, labels, found):
    precision = precisions(folder, found["top5"])
    return {
        "corpus": corpus,
        "trainer": trainer,
        "labels": int(labels),
        "CPU s": float(found["cpu_seconds"]),
        "wall s": float(found["wall_seconds"]),
        **{f"P@{k}": float(value) for k, value in zip(DEPTHS, precision, strict=True)},
    }


def precisions(folder, top5):
    """P@1, P@3 and P@5 over the test rows; top5 (n, 5), label ids, best first, -1 where there is none."""
    _, Y = rows(folder, "test_")
    gold = np.zeros((Y.shape[0], Y.shape[1] + 1), bool)  # the last column is for -1
    gold[:, :-1] = Y.toarray() > 0
    hits = np.take_along_axis(gold, top5, 1)
    return [hits[:, :k].mean() for k in DEPTHS]
