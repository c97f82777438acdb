"""How CPU seconds and memory grow with documents and with labels, on a synthetic corpus.

    python -m tests.bench.growth FOLDER --labels N --out FILE.npz        (one size, as the part `growth` starts it)

Documents come in chunks, each from its own seed, so a smaller corpus is the beginning of a larger one and every label
keeps its share.  When labels grow, the documents stay: of 1,024 labels, every eighth by support is taken, every fourth,
every second, all.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np

from pipeline.config import TrainConfig
from pipeline.kernels.lockstep import row_squares
from pipeline.learners import placement
from pipeline.learners.matrix import open_shared
from pipeline.learners.ovr import candidates, fit_block, warm_up
from tests.bench.peers import timed
from tests.bench.processes import ours
from tests.bench.report import Report, number

FEATURES = 50_000
WORDS = 72  # of a document, Poisson; some 60 different ones with those of its labels
OWN, SAID = 12, 5  # words that a label has of its own, and of them said in a document
SILENT = 0.1  # share of a label's documents that say none of them
HELD_OUT = 0.1
CHUNK = 25_000
TIMES = (1, 2, 4, 8)
DOCUMENTS, LABELS = (CHUNK, 64), (CHUNK, 128)  # documents x labels at 1 times
LARGE = 1_000_000
REPEATS = 3  # the least of their seconds is taken
GOALS = (1.05, 1.3)
COLUMNS = {
    "grows": str,
    "documents": number(0),
    "labels": number(0),
    "non-zeros": number(0),
    "CPU s": number(2),
    "wall s": number(2),
    "process MB": number(0),
    "peak MB": number(0),
    "matrix MB": number(0),
    "block in flight MB": number(0),
    "peak / (1.3 matrix + block)": number(2),
}


def growth(options):
    report = Report("growth", "own runs, documents and labels times 1 to 8", COLUMNS, [], [], [])
    times = [*TIMES, LARGE // CHUNK] if options.large else TIMES
    with tempfile.TemporaryDirectory() as folder:
        documents, labels = DOCUMENTS
        for factor in times:
            matrix = Path(folder) / f"documents{factor}"
            synthetic(matrix, factor * documents, labels)
            if not report.rows:  # once for numba's cache: what compiles needs more memory
                _row("documents", matrix, labels)
            report.rows.append(_row("documents", matrix, labels))
        documents, labels = LABELS
        matrix = Path(folder) / "labels"
        synthetic(matrix, documents, labels * TIMES[-1])
        report.rows.extend(_row("labels", matrix, labels * factor) for factor in TIMES)
    for grows in ("documents", "labels"):
        rows = [row for row in report.rows if row["grows"] == grows]
        exponent = slope([row[grows] for row in rows], [row["CPU s"] for row in rows])
        report.notes.append(f"{grows}: exponent {exponent:.3f} (least squares in logarithms; goal: {GOALS[0]})")
    largest = max(row["peak / (1.3 matrix + block)"] for row in report.rows)
    report.notes.append(
        f"Peak memory is at most {largest:.2f} of {GOALS[1]} times the matrix and the block in flight (goal: 1), the "
        f"latter as placement.worker_bytes says, {placement.PROCESS / 1e6:.0f} MB of it for the process. Peak is the "
        "largest resident size of the process that solves, with the pages of the matrix that it maps; process is that "
        "before the matrix is mapped, with imports and kernels."
    )
    report.notes.append(
        f"Seconds are those of fit_block over all blocks, the least of {REPEATS} runs, with default settings but folds "
        "0 and a tenth of the documents held out. "
        f"{FEATURES:,} features; labels have Zipf shares and words of their own."
    )
    return report


def _row(grows, matrix, labels):
    found = ours("growth", matrix, "--labels", labels)
    limit = GOALS[1] * found["matrix"] + found["block"]
    return {
        "grows": grows,
        "documents": int(found["documents"]),
        "labels": labels,
        "non-zeros": int(found["nonzeros"]),
        "CPU s": float(found["cpu_seconds"]),
        "wall s": float(found["wall_seconds"]),
        "process MB": float(found["process"] / 1e6),
        "peak MB": float(found["peak"] / 1e6),
        "matrix MB": float(found["matrix"] / 1e6),
        "block in flight MB": float(found["block"] / 1e6),
        "peak / (1.3 matrix + block)": float(found["peak"] / limit),
        "not converged": int(found["not_converged"]),
    }


def slope(sizes, seconds) -> float:
    """Exponent e of seconds = a sizes^e, by least squares in logarithms.

    >>> round(slope([1, 2, 4], [3, 6, 12]), 6)
    1.0
    """
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def synthetic(folder: Path, documents: int, labels: int) -> None:
    """Write the arrays of `learners.matrix` for documents of Zipf words, unit length, and labels of Zipf shares."""
    folder.mkdir()
    word = 1 / (np.arange(FEATURES) + 2.7)
    word /= word.sum()
    idf = 1 - np.log(1 - (1 - word) ** WORDS)
    share = 0.3 / (np.arange(labels) + 3)
    own = np.random.default_rng((0, labels)).integers(FEATURES // 100, FEATURES, (labels, OWN))
    chunks = []
    for first in range(0, documents, CHUNK):
        chunks.append(
            _chunk(np.random.default_rng((1, labels, first)), min(CHUNK, documents - first), word, share, own)
        )
    lengths = np.concatenate([length for length, *_ in chunks])
    indices = np.concatenate([terms for _, terms, *_ in chunks])
    data = np.concatenate([counts for _, _, counts, *_ in chunks])
    data = (1 + np.log(data)) * idf[indices]
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    norms = np.sqrt(np.add.reduceat(data**2, indptr[:-1]))
    data = (data / np.repeat(norms, lengths)).astype(np.float32)
    label = np.concatenate([label for *_, label, _ in chunks])
    row = np.concatenate([number * CHUNK + row for number, (*_, row) in enumerate(chunks)])
    order = np.lexsort((row, label))
    arrays = {
        "indptr": indptr,
        "indices": indices.astype(np.int32),
        "data": data,
        "squares": row_squares(lengths, data),
        "fold": (np.random.default_rng(2).random(documents) >= HELD_OUT).astype(np.int8),
        "gold_indptr": np.concatenate([[0], np.cumsum(np.bincount(label, minlength=labels))]),
        "gold_rows": row[order].astype(np.int32),
        "features": np.array([FEATURES]),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def _chunk(rng, n, word, share, own):
    """Distinct words and their counts by row (lengths, terms, counts), and (label, row) of each assignment."""
    given = rng.binomial(n, share)
    pairs = np.unique(np.repeat(np.arange(share.size), given) * n + rng.integers(n, size=given.sum()))
    label, row = pairs // n, pairs % n
    says = rng.random(pairs.size) >= SILENT
    of_labels = own[np.repeat(label[says], SAID), rng.integers(OWN, size=SAID * says.sum())]
    # a document has a word at least
    lengths = np.maximum(rng.poisson(WORDS, n), 1)
    background = np.searchsorted(np.cumsum(word), rng.random(lengths.sum()), side="right").clip(max=word.size - 1)
    rows = np.concatenate([np.repeat(np.arange(n), lengths), np.repeat(row[says], SAID)])
    found, counts = np.unique(rows * word.size + np.concatenate([background, of_labels]), return_counts=True)
    return np.bincount(found // word.size, minlength=n), found % word.size, counts, label, row


def solve(folder: Path, labels: int) -> dict:
    """Fit `labels` of the corpus in `folder`, evenly spread over the supports, block by block as the stage does."""
    cfg = TrainConfig(folds=0)
    with tempfile.TemporaryDirectory() as locks:
        warm_up(Path(locks), cfg)
    process = peak_bytes()
    X, gold, _ = open_shared(folder)
    support = np.diff(gold.indptr)
    by_support = np.argsort(-support, kind="stable")
    chosen = by_support[:: support.size // labels][:labels]
    label_groups = placement.label_groups(support, cfg.labels_per_block, chosen)
    costs = [placement.expected_cost(support, group) for group in label_groups]
    blocks = placement.blocks(label_groups, costs, -(-labels // cfg.labels_per_block))

    def run():
        # a block's tables are written and let go
        return sum(
            sum(status != "ok" for status in fit_block(block, X, gold, cfg)["label_models"]["status"].to_pylist())
            for block in blocks
        )

    runs = [timed(run) for _ in range(REPEATS)]
    return {
        "documents": X.size,
        "nonzeros": X.indices.size,
        "not_converged": runs[0][0],
        "cpu_seconds": min(cpu for _, cpu, _ in runs),
        "wall_seconds": min(wall for *_, wall in runs),
        "process": process,
        "peak": peak_bytes(),
        "matrix": placement.matrix_bytes(X.size, X.indices.size, gold.rows.size),
        "block": placement.worker_bytes(X.size, X.features, len(candidates(cfg))),
    }


def peak_bytes() -> int:
    """Largest resident size of this process so far; getrusage would count what its parent had before it started."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made by `synthetic`")
    parser.add_argument("--labels", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help=".npz to write")
    args = parser.parse_args()
    np.savez(args.out, **solve(args.folder, args.labels))


if __name__ == "__main__":
    main()
