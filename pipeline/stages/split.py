"""Split.

    documents, labels  ->  folds (row, fold), label_support (label_id, train, test, folds_without),
                           near_duplicates (row, other_row, similarity), label_relations (label_id, other_id, kind)

A document's fold is a function of its doc_id and the seed alone, so it survives repartitioning, reordering and new
documents.  A given split is used where it names test documents.  Here is also said what flatters scores or what one
sigmoid a label cannot know: test texts that stand in training too, labels that hang together, one label a document.
"""

import functools
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.learners import duplicates
from pipeline.learners.matrix import gold_pairs
from pipeline.learners.relations import PAIR_COLUMNS, Columns, columns, pairs, relations
from pipeline.stages.parts import Outcome, hashes, map_tasks, run_tasks, share
from pipeline.store import Run, replacing, write_part
from pipeline.tables import TABLES

log = logging.getLogger(__name__)

TEST, UNUSED = -1, -2


def split(spark, run: Run, attempt: Path, cfg) -> Outcome:
    """Give every document its fold.  Raises DataError where no document is left to train on."""
    files = run.files("documents")
    given = run_tasks(spark, "split: look for a given split", _given, [str(path) for path in files])
    official = any("test" in names for names in given)
    dev = any("dev" in names for names in given)
    labels = run.read("labels", ["label", "support"])
    names = labels["label"].to_pylist()
    done = run_tasks(
        spark,
        "split: draw folds",
        _draw,
        [(str(path), str(attempt), number, official, dev, names, cfg) for number, path in enumerate(files)],
    )
    counts = sum((counts for _, counts, _ in done), np.zeros((len(names), max(cfg.train.folds, 2) + 2), np.int64))
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
    parts = [pq.read_table(attempt / e["file"], columns=["fold"]) for e, _, _ in done]
    sizes = {item["values"]: item["counts"] for item in pc.value_counts(pa.concat_tables(parts)["fold"]).to_pylist()}
    trained = sum(count for fold, count in sizes.items() if fold >= 0)
    if trained == 0:
        raise DataError("no document is left for training; expected some marked train, or split.test below 1")
    if not sizes.get(TEST):
        raise DataError(
            f"none of {trained} documents fell into the test fold (split.test = {cfg.split.test}); "
            "expected some marked test, a larger share or more documents"
        )
    similarity = cfg.split.near_duplicates
    twins = near_duplicates(spark, files, attempt, [e["file"] for e, _, _ in done], similarity) if similarity else None
    known = columns(labels["support"].to_numpy(), sum(sizes.values()))
    related = label_relations(spark, files, names, known)
    facts = {
        "source": "given" if official else "hash of doc_id",
        "documents": {"train": trained, "test": sizes.get(TEST, 0), "unused": sizes.get(UNUSED, 0)},
        "labels_without_training_documents": int((support["train"].to_numpy() == 0).sum()),
        "labels_missing_from_a_fold": int((support["folds_without"].to_numpy() > 0).sum()),
        "near_duplicates": None if twins is None else twins.num_rows,
        "multi_class": len(names) > 1 and all(single for _, _, single in done),
        "labels_implied": len(_of_kind(related, "implies", "label_id")),
        "labels_same": len(_of_kind(related, "same", "label_id") | _of_kind(related, "same", "other_id")),
    }
    _warn(facts, similarity)
    if twins is None:
        twins = TABLES["near_duplicates"].schema.empty_table()
    return Outcome(
        {
            "folds": [e for e, _, _ in done],
            "label_support": [write_part(attempt, "label_support", support, 0)],
            "near_duplicates": [write_part(attempt, "near_duplicates", twins, 0)],
            "label_relations": [write_part(attempt, "label_relations", related, 0)],
        },
        facts,
    )


def summary(facts: dict, rows: dict) -> str:
    documents = facts["documents"]
    twins = facts["near_duplicates"]
    return (
        f"{documents['train']:,} training and {documents['test']:,} test documents ({facts['source']})"
        f"{'' if twins is None else f', {twins:,} of the latter near-duplicates of the former'}; "
        f"{facts['labels_missing_from_a_fold']:,} of {rows['label_support']:,} labels miss a fold, "
        f"{facts['labels_without_training_documents']:,} are in no training document"
    )


def _of_kind(related, kind, column):
    return set(related.filter(pc.equal(related["kind"], kind))[column].to_pylist())


def _warn(facts, similarity):
    """What a reader of the scores should know, a line each."""
    if facts["near_duplicates"]:
        log.warning(
            "split: %s of %s test documents are nearly the text of a training document (split.near_duplicates %g): "
            "scores on them flatter; tagmill show RUN --table near_duplicates",
            f"{facts['near_duplicates']:,}",
            f"{facts['documents']['test']:,}",
            similarity,
        )
    if facts["multi_class"]:
        log.warning(
            "split: every document carries exactly one label: the data is multi-class; one sigmoid a label still "
            "works, rules at_least and at_most with n 1 (calibrate.rules) make it choose one"
        )
    implied, same = facts["labels_implied"], facts["labels_same"]
    if implied or same:
        always = f"{implied:,} label{' always comes' if implied == 1 else 's always come'} with another one"
        exactly = f"{same:,} labels are on exactly the documents of another one"
        log.warning(
            "split: %s (tagmill show RUN --table label_relations); rules implies (calibrate.rules) can say so",
            ", ".join([always] * (implied > 0) + [exactly] * (same > 0)),
        )


def near_duplicates(spark, files: list[Path], attempt: Path, folds: list[str], similarity: float) -> pa.Table:
    """The table `near_duplicates`: test documents and the training document that each is most like.

    Two jobs: the shingles of test documents go to a file that all tasks map, their band keys to the driver and from
    there to the tasks that read training documents; so memory follows the number of test documents.
    """
    folder = attempt / "shingles"
    folder.mkdir(exist_ok=True)
    try:
        parts = [(str(path), str(attempt / fold)) for path, fold in zip(files, folds, strict=True)]
        sets = run_tasks(
            spark,
            "split: shingles of test documents",
            functools.partial(_shingle, similarity=similarity),
            [(*part, str(folder / f"{number:05d}.u8")) for number, part in enumerate(parts)],
        )
        texts = duplicates.comparable([found for found, _ in sets], similarity)
        whole = folder / "all.u8"
        with replacing(whole) as path, path.open("wb") as file:
            for _, name in sets:
                with open(name, "rb") as part:
                    shutil.copyfileobj(part, file)
        shared = spark.sparkContext.broadcast(texts.known)
        found = run_tasks(spark, "split: compare training documents", _comparer(shared, str(whole), similarity), parts)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    row, other, similarities = duplicates.merged(found, texts)
    ids = doc_ids(files, {*row.tolist(), *other.tolist()})
    return pa.table(
        {
            "row": row,
            "doc_id": [ids[r] for r in row.tolist()],
            "other_row": other,
            "other_doc_id": [ids[r] for r in other.tolist()],
            "similarity": similarities,
        },
        schema=TABLES["near_duplicates"].schema,
    )


def doc_ids(files: Iterable[Path | str], rows: set[int]) -> dict[int, str]:
    """doc_id of some rows, from the parts of `documents` that hold them, one part at a time."""
    found: dict[int, str] = {}
    wanted = np.array(sorted(rows), np.int64)
    for path in files:
        with pq.ParquetFile(path) as file:
            first, count = _rows_of(file)
            here = wanted[slice(*np.searchsorted(wanted, [first, first + count]))]
            if here.size:
                ids = file.read(columns=["doc_id"])["doc_id"].take(pa.array(here - first))
                found.update(zip(here.tolist(), ids.to_pylist(), strict=True))
    return found


def _rows_of(file):
    """First row and number of rows of a part of `documents`."""
    count = file.metadata.num_rows
    first = next(file.iter_batches(1, columns=["row"])).column(0)[0].as_py() if count else 0
    return first, count


def label_relations(spark, files: list[Path], names: list[str], known: Columns) -> pa.Table:
    """The table `label_relations`: parts give the pairs that hold in them, and Spark adds these up."""
    from pyspark.sql import functions as F

    spark.sparkContext.setJobDescription("split: labels that hang together")
    found = (
        map_tasks(spark, [str(path) for path in files], _pair_counter(names, known), PAIR_COLUMNS)
        .groupBy("label", "other", "needed")
        .agg(F.sum("documents").alias("documents"))
        .where(F.col("documents") == F.col("needed"))
        .toArrow()
    )
    return relations(found, known, names)


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
    single = pc.all(pc.equal(pc.list_value_length(documents["labels"]), 1)).as_py() is not False
    return write_part(Path(attempt), "folds", folds, number), counts, single


def _texts_of(documents, folds, kept):
    """Row and text of the documents of a part whose fold is `kept`."""
    fold = pq.read_table(folds, columns=["fold"])["fold"]
    mask = pc.equal(fold, TEST) if kept == "test" else pc.greater_equal(fold, 0)
    table = pq.read_table(documents, columns=["row", "text"]) if pc.any(mask).as_py() else None
    return TEXTS.empty_table() if table is None else table.filter(mask)


TEXTS = pa.schema([TABLES["documents"].schema.field(name) for name in ("row", "text")])


def _shingle(task, similarity):
    documents, folds, file = task
    sets, held = duplicates.shingle_sets(_texts_of(documents, folds, "test"), similarity)
    with replacing(Path(file)) as path:
        held.tofile(path)
    return sets, file


def _comparer(shared, file, similarity):
    def compare(task):
        path = Path(file)
        mapped = np.memmap(path, np.uint64, "r") if path.stat().st_size else np.empty(0, np.uint64)
        held = np.asarray(mapped)  # the kernel wants a plain array: a view on the same pages
        held.setflags(write=False)  # and compiles for either kind apart
        return duplicates.nearest(_texts_of(*task, "train"), shared.value, held, similarity)

    return compare


def _pair_counter(names, known):
    def count(path):
        documents = pq.read_table(path, columns=["row", "labels"]).combine_chunks()
        if documents.num_rows:
            row, label_id = gold_pairs(documents, names)
            yield from pairs(row - documents["row"][0].as_py(), label_id, documents.num_rows, known)

    return count
