"""Train.

    features, folds, documents (labels)  ->  label_models, curves, histograms, weights

One Spark job; a task is a block of labels.  The matrix is mapped once per host.  A block that is done has its marker,
so a second run solves only what is missing; what a block holds depends on the data and the settings alone, never on who
solved it.
"""

import json
import logging
import time
from pathlib import Path

import numpy as np

from pipeline.errors import DataError, shown
from pipeline.learners import matrix
from pipeline.learners.ovr import fit_block
from pipeline.learners.tagger import Weights
from pipeline.stages.parts import Outcome, run_tasks
from pipeline.store import Run, digest, entry, sync_file, write_json, write_part

log = logging.getLogger(__name__)

BLOCK_TABLES = ("label_models", "curves", "histograms")


def blocks(train_support: np.ndarray, per_block: int) -> list[list[int]]:
    """Label ids of each block.  Frequent labels, which cost most, come first; neighbours in support share a block."""
    order = np.argsort(-train_support, kind="stable")
    return [order[start : start + per_block].tolist() for start in range(0, order.size, per_block)]


def train(spark, run: Run, attempt: Path, cfg, key: str) -> Outcome:
    """Solve the blocks that are not solved yet, then turn the models into weights by feature.

    Args:
        attempt: folder of the blocks; it stays the same for the same fingerprint, so that a killed run is resumed.
        key: names the matrix in the host's cache.

    Raises DataError where more than train.max_failed labels failed.
    """
    support = run.read("label_support")["train"].to_numpy()
    names = run.read("labels", ["label"])["label"].to_pylist()
    features = run.finished("featurize")["terms"]
    todo = blocks(support, cfg.train.labels_per_block)
    done = {number: found for number in range(len(todo)) if (found := finished_block(attempt, number))}
    if done:
        log.info("train: %d of %d blocks are done already", len(done), len(todo))
    sources = {
        "cache_dir": cfg.spark.cache_dir,
        "key": key,
        "feature_files": [str(p) for p in run.files("features")],
        "fold_files": [str(p) for p in run.files("folds")],
        "document_files": [str(p) for p in run.files("documents")],
        "labels": names,
        "features": features,
    }
    shared = spark.sparkContext.broadcast(sources)
    missing = [number for number in range(len(todo)) if number not in done]
    solved = run_tasks(
        spark,
        f"train: {len(missing)} blocks of {cfg.train.labels_per_block} labels",
        _solver(shared, cfg.train),
        [(number, todo[number], str(attempt)) for number in missing],
    )
    matrix.clean(matrix.host_folder(cfg.spark.cache_dir, key))
    done.update(zip(missing, solved, strict=True))
    facts = [done[number] for number in range(len(todo))]
    _refuse_failures(attempt, facts, names, cfg.train.max_failed)
    tables = {name: [f["tables"][name] for f in facts] for name in BLOCK_TABLES}
    models = [attempt / e["file"] for e in tables["label_models"]]
    paths = Weights.build(attempt, models, features, len(names))
    for path in paths:
        sync_file(path)
    tables["weights"] = [entry(path, attempt, np.load(path, mmap_mode="r").shape[0]) for path in paths]
    statuses: dict[str, int] = {}
    for f in facts:
        for status, count in f["statuses"].items():
            statuses[status] = statuses.get(status, 0) + count
    return Outcome(
        tables,
        {
            "blocks": len(todo),
            "blocks_resumed": len(todo) - len(missing),
            "statuses": statuses,
            "nonzero_weights": tables["weights"][1]["rows"],
            "largest_gap": max(f["largest_gap"] for f in facts),
            "block_seconds": [round(f["seconds"], 2) for f in facts],
        },
    )


def summary(facts: dict, rows: dict) -> str:
    statuses = facts["statuses"]
    constant = sum(count for status, count in statuses.items() if status.startswith("no_"))
    resumed = f", {facts['blocks_resumed']:,} of them from before" if facts["blocks_resumed"] else ""
    text = (
        f"{rows['label_models']:,} labels in {facts['blocks']:,} blocks{resumed}; {constant:,} constant, "
        f"{statuses.get('not_converged', 0):,} not converged, largest gap {facts['largest_gap']:.2g}, "
        f"{facts['nonzero_weights']:,} weights"
    )
    return text


def finished_block(folder: Path, number: int) -> dict | None:
    """Facts of a block whose marker and files are whole, else None."""
    marker = folder / f"block-{number:05d}.json"
    try:
        facts = json.loads(marker.read_text())
        whole = all(digest(folder / e["file"]) == e["sha256"] for e in facts["tables"].values())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts if whole else None


def _solver(shared, cfg):
    def solve(task):
        number, label_ids, attempt = task
        started = time.monotonic()
        s = shared.value
        folder = matrix.shared(
            matrix.host_folder(s["cache_dir"], s["key"]),
            lambda part: matrix.build(
                part, s["feature_files"], s["fold_files"], s["document_files"], s["labels"], s["features"]
            ),
        )
        X, gold = matrix.open_shared(folder)
        opened = time.monotonic()
        tables = fit_block(label_ids, X, gold, cfg)
        models = tables["label_models"]
        statuses: dict[str, int] = {}
        for status in models["status"].to_pylist():
            statuses[status] = statuses.get(status, 0) + 1
        facts = {
            "tables": {name: write_part(Path(attempt), name, tables[name], number) for name in BLOCK_TABLES},
            "statuses": statuses,
            "largest_gap": max(models["gap"].to_pylist(), default=0.0),
            "seconds": time.monotonic() - opened,
            "seconds_to_map": opened - started,
        }
        write_json(Path(attempt) / f"block-{number:05d}.json", facts)
        return facts

    return solve


def _refuse_failures(attempt, facts, names, allowed):
    failed = {status: count for f in facts for status, count in f["statuses"].items() if status.startswith("failed")}
    count = sum(c for f in facts for status, c in f["statuses"].items() if status.startswith("failed"))
    if count > allowed:
        for number, f in enumerate(facts):
            if any(status.startswith("failed") for status in f["statuses"]):
                (attempt / f"block-{number:05d}.json").unlink(missing_ok=True)
        raise DataError(
            f"{count} of {len(names)} labels failed ({shown(next(iter(failed)), 200)}); "
            f"at most train.max_failed = {allowed} may"
        )
