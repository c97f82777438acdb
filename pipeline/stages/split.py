"""Split.

    documents, labels  ->  folds (row, fold), label_support (label_id, train, test, folds_without)

A document's fold is a function of its doc_id and the seed alone, so it survives repartitioning, reordering and new
documents.  A given split is used where it names test documents.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.learners.matrix import gold_pairs
from pipeline.stages.parts import Outcome, hashes, run_tasks, share
from pipeline.store import Run, write_part
from pipeline.tables import TABLES

TEST, UNUSED = -1, -2


def split(spark, run: Run, attempt: Path, cfg) -> Outcome:
    """Give every document its fold.  Raises DataError where no document is left to train on."""
    files = run.files("documents")
    given = run_tasks(spark, "split: look for a given split", _given, [str(path) for path in files])
    official = any("test" in names for names in given)
    dev = any("dev" in names for names in given)
    names = run.read("labels", ["label_id", "label"])["label"].to_pylist()
    done = run_tasks(
        spark,
        "split: draw folds",
        _draw,
        [(str(path), str(attempt), number, official, dev, names, cfg) for number, path in enumerate(files)],
    )
    counts = sum((counts for _, counts in done), np.zeros((len(names), max(cfg.train.folds, 2) + 2), np.int64))
    test, folds = counts[:, 0], counts[:, 2:]
    used = folds if cfg.train.folds else folds[:, :1]
    support = pa.table(
        {
            "label_id": np.arange(len(names), dtype=np.int32),
            "train": folds.sum(axis=1),
            "test": test,
            "folds_without": (used == 0).sum(axis=1).astype(np.int32),
        },
        schema=TABLES["label_support"].schema,
    )
    sizes = pc.value_counts(pa.concat_tables([pq.read_table(attempt / e["file"]) for e, _ in done])["fold"]).to_pylist()
    sizes = {item["values"]: item["counts"] for item in sizes}
    trained = sum(count for fold, count in sizes.items() if fold >= 0)
    if trained == 0:
        raise DataError("no document is left for training; expected some marked train, or split.test below 1")
    if not sizes.get(TEST):
        raise DataError(
            f"none of {trained} documents fell into the test fold (split.test = {cfg.split.test}); "
            "expected some marked test, a larger share or more documents"
        )
    facts = {
        "source": "given" if official else "hash of doc_id",
        "documents": {"train": trained, "test": sizes.get(TEST, 0), "unused": sizes.get(UNUSED, 0)},
        "labels_without_training_documents": int((support["train"].to_numpy() == 0).sum()),
        "labels_missing_from_a_fold": int((support["folds_without"].to_numpy() > 0).sum()),
    }
    return Outcome(
        {"folds": [e for e, _ in done], "label_support": [write_part(attempt, "label_support", support, 0)]}, facts
    )


def summary(facts: dict, rows: dict) -> str:
    documents = facts["documents"]
    return (
        f"{documents['train']:,} training and {documents['test']:,} test documents ({facts['source']}); "
        f"{facts['labels_missing_from_a_fold']:,} of {rows['label_support']:,} labels miss a fold, "
        f"{facts['labels_without_training_documents']:,} are in no training document"
    )


def folds_of(doc_ids, given: list[str | None], official: bool, dev: bool, cfg) -> np.ndarray:
    """Fold of each document, (m,) int32: -1 test, -2 unused, else 0 to K - 1.

    Args:
        doc_ids: Arrow strings.
        given: train, dev, test or None of each.
        official: some document of the corpus is marked test, so nothing is drawn for testing.
        dev: some document of the corpus is marked dev.
        cfg: Config; train.folds = 0 puts the held-out documents into fold 0 and the others into fold 1.
    """
    marks = np.array([mark or "train" for mark in given], dtype=object)
    seed = cfg.split.seed
    is_test = marks == "test" if official else share(hashes(doc_ids, f"test {seed}")) < cfg.split.test
    if cfg.train.folds:
        fold = (hashes(doc_ids, f"fold {seed}") % np.uint64(cfg.train.folds)).astype(np.int32)
    else:
        held = marks == "dev" if dev else share(hashes(doc_ids, f"dev {seed}")) < cfg.train.dev
        fold = np.where(held, 0, 1).astype(np.int32)
    if cfg.split.dev == "drop" and cfg.train.folds:
        fold[marks == "dev"] = UNUSED
    fold[is_test] = TEST
    return fold


def _given(path):
    return set(pq.read_table(path, columns=["split"])["split"].unique().to_pylist())


def _draw(task):
    path, attempt, number, official, dev, names, cfg = task
    documents = pq.read_table(path, columns=["row", "doc_id", "labels", "split"]).combine_chunks()
    fold = folds_of(documents["doc_id"], documents["split"].to_pylist(), official, dev, cfg)
    folds = pa.table({"row": documents["row"], "fold": fold})
    row, label_id = gold_pairs(documents, names)
    counts = np.zeros((len(names), max(cfg.train.folds, 2) + 2), np.int64)  # columns: test, unused, folds
    if row.size:
        of = fold[row - documents["row"][0].as_py()]
        np.add.at(counts, (label_id, np.where(of == TEST, 0, np.where(of == UNUSED, 1, of + 2))), 1)
    return write_part(Path(attempt), "folds", folds, number), counts
