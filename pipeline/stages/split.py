"""Split.

    documents, labels  ->  folds (row, fold), label_support (label_id, train, test, folds_without),
                          near_duplicates (row, other_row, similarity), label_relations (label_id, other_id, kind)

A document's fold is a function of its doc_id and the seed alone, so it survives repartitioning, reordering and new
documents.  A given split is used where it names test documents.  Problems of the data that show before any model are
found here: test texts that training documents nearly have too, labels that depend on others, one label a document.
"""

import functools
import logging
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError
from pipeline.host import host_folder
from pipeline.learners import duplicates
from pipeline.learners.matrix import gold_pairs
from pipeline.learners.relations import PAIR_COLUMNS, Columns, columns, pairs, relations
from pipeline.learners.vectorizer import batches
from pipeline.stages.parts import Outcome, hashes, map_tasks, run_tasks, share
from pipeline.stages.poison import Guard
from pipeline.storage import Mapped, ObjectPath, Place, digest, place, read_table, remove, replacing
from pipeline.store import Run, write_part
from pipeline.tables import TABLES

log = logging.getLogger(__name__)

TEST, UNUSED = -1, -2
COMPARED = 500_000  # test documents that near-duplicates are looked for: the driver and every worker hold their keys
RELATIONS = 100_000  # pairs of labels that are told
MULTIPLE = 0.01  # share of near-duplicates among test documents from which on there is a warning


def split(spark, run: Run, attempt: Place, cfg) -> Outcome:
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
    K = max(cfg.train.folds, 2)
    counts = sum((part.gold for part in done), np.zeros((len(names), K + 2), np.int64))
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
    sizes = sum((part.documents for part in done), np.zeros(K + 2, np.int64))
    tests, unused, trained = int(sizes[0]), int(sizes[1]), int(sizes[2:].sum())
    if trained == 0:
        raise DataError("no document is left for training; expected some marked train, or split.test below 1")
    if tests == 0:
        raise DataError(
            f"none of {trained} documents fell into the test fold (split.test = {cfg.split.test}); "
            "expected some marked test, a larger share or more documents"
        )
    if cfg.split.near_duplicates:
        near = near_duplicates(spark, run, files, attempt, done, cfg)
    else:
        near = TABLES["near_duplicates"].schema.empty_table()
    relations = label_relations(spark, files, names, columns(labels["support"].to_numpy(), int(sizes.sum())))
    facts = {
        "source": "given" if official else "hash of doc_id",
        "documents": {"train": trained, "test": tests, "unused": unused},
        "labels_without_training_documents": int((support["train"].to_numpy() == 0).sum()),
        "labels_missing_from_a_fold": int((support["folds_without"].to_numpy() > 0).sum()),
        "near_duplicates": near.num_rows if cfg.split.near_duplicates else None,
        "near_duplicates_among": min(tests, COMPARED),
        "label_relations": relations.num_rows,
        "multi_class": len(names) > 1 and all(part.one_label_each for part in done),
    }
    _warn(facts)
    return Outcome(
        {
            "folds": [part.entry for part in done],
            "label_support": [write_part(attempt, "label_support", support, 0)],
            "near_duplicates": [write_part(attempt, "near_duplicates", near, 0)],
            "label_relations": [write_part(attempt, "label_relations", relations, 0)],
        },
        facts,
    )


def summary(facts: dict, rows: dict) -> str:
    documents, near, among = facts["documents"], facts["near_duplicates"], facts["near_duplicates_among"]
    these = "these" if among == documents["test"] else f"the first {among:,}"
    of_them = "" if near is None else f", {near:,} of {these} near-duplicates of the former"
    related = facts["label_relations"]
    return (
        f"{documents['train']:,} training and {documents['test']:,} test documents ({facts['source']}){of_them}; "
        f"{facts['labels_missing_from_a_fold']:,} of {rows['label_support']:,} labels miss a fold, "
        f"{facts['labels_without_training_documents']:,} are in no training document, "
        f"{related:,} pair{' of labels depends' if related == 1 else 's of labels depend'} on each other"
    )


def _warn(facts):
    """What flatters every score, and what one sigmoid a label cannot know."""
    near, among = facts["near_duplicates"], facts["near_duplicates_among"]
    if near and near >= MULTIPLE * among:
        log.warning(
            "split: %s of %s test documents have nearly the text of a training document, which flatters the metrics: "
            "tagmill show RUN --table near_duplicates",
            f"{near:,}",
            f"{among:,}",
        )
    if facts["multi_class"]:
        log.warning(
            "split: every document carries exactly one label: the data is multi-class; rules at_least and at_most with "
            "n 1 (calibrate.rules) choose one"
        )


class Part(NamedTuple):
    """What is known of one part of `documents` when its folds are drawn."""

    entry: dict  # of its file of `folds`
    documents: np.ndarray  # (K + 2,) int64: in the test fold, unused, in each training fold
    gold: np.ndarray  # (L, K + 2) int64: the same of each label
    one_label_each: bool


def near_duplicates(spark, run: Run, files: list[Place], attempt: Place, drawn: list[Part], cfg) -> pa.Table:
    """The table `near_duplicates`: test documents and the training document that each is most like.

    Two jobs: the shingles of test documents go to a file that all tasks map, their band keys to the driver and from
    there to the tasks that read training documents.  Rows are in the order of a hash, so the first `COMPARED` test
    documents are a random sample; memory is bounded by them, whatever the number of documents.
    """
    from pyspark.sql import functions as F

    similarity = cfg.split.near_duplicates
    locks = functools.partial(host_folder, cfg.spark.cache_dir, "")
    guard = Guard.of("split", attempt, cfg.spark)
    folder = attempt / "shingles"
    folder.mkdir(exist_ok=True)
    try:
        parts = [(str(path), str(attempt / part.entry["file"])) for path, part in zip(files, drawn, strict=True)]
        tests = np.array([part.documents[0] for part in drawn])
        wanted = np.clip(COMPARED - (np.cumsum(tests) - tests), 0, None).tolist()
        sets = run_tasks(
            spark,
            "split: shingles of test documents",
            functools.partial(_shingle, guard=guard, similarity=similarity, locks=locks),
            [
                (*part, most, str(folder / f"{number:05d}.u8"))
                for number, (part, most) in enumerate(zip(parts, wanted, strict=True))
            ],
        )
        texts = duplicates.comparable([found for found, _ in sets], similarity)
        whole = folder / "all.u8"
        with replacing(whole) as path:
            with path.open("wb") as file:
                for _, name in sets:
                    with place(name).open("rb") as held:
                        shutil.copyfileobj(held, file)
            mark = digest(path) if isinstance(whole, ObjectPath) else ""
        texts_held = Mapped(f"{run.root} shingles", (str(whole),), (mark,), cfg.spark.cache_dir)
        known = spark.sparkContext.broadcast(texts.known)
        spark.sparkContext.setJobDescription("split: compare training documents")
        found = (
            map_tasks(spark, parts, _comparer(known, texts_held, guard, similarity, locks), duplicates.FOUND_COLUMNS)
            .groupBy("place")
            # the largest similarity, then the smallest row, which has its doc_id with it
            .agg(F.max(F.struct("similarity", (-F.col("row")).alias("minus_row"), "doc_id")).alias("best"))
            .select("place", "best.similarity", (-F.col("best.minus_row")).alias("row"), "best.doc_id")
            .toArrow()
        )
        texts_held.forget()
    finally:
        remove(folder)
    return duplicates.near_duplicates(found, texts)


def label_relations(spark, files: list[Place], names: list[str], known: Columns) -> pa.Table:
    """The table `label_relations`: parts give the pairs that hold in them, and Spark adds these up.

    The first `RELATIONS` by label_id are told: what always comes in hundreds makes pairs by the square.
    """
    from pyspark.sql import functions as F

    spark.sparkContext.setJobDescription("split: labels that depend on each other")
    found = (
        map_tasks(spark, [str(path) for path in files], _pair_counter(names, known), PAIR_COLUMNS)
        .groupBy("label", "other", "needed")
        .agg(F.sum("documents").alias("documents"))
        .where(F.col("documents") == F.col("needed"))
        .orderBy("label", "other")
        .limit(RELATIONS)
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
    return set(read_table(path, columns=["split"])["split"].unique().to_pylist())


def _draw(task):
    path, attempt, number, official, dev, names, cfg = task
    documents = read_table(path, columns=["row", "doc_id", "labels", "split"]).combine_chunks()
    fold = folds_of(documents["doc_id"], documents["split"].to_pylist(), official, dev, cfg)
    folds = pa.table({"row": documents["row"], "fold": fold})
    column = np.where(fold == TEST, 0, np.where(fold == UNUSED, 1, fold + 2))
    row, label_id = gold_pairs(documents, names)
    gold = np.zeros((len(names), max(cfg.train.folds, 2) + 2), np.int64)
    if row.size:
        np.add.at(gold, (label_id, column[row - documents["row"][0].as_py()]), 1)
    single = pc.all(pc.equal(pc.list_value_length(documents["labels"]), 1), min_count=0).as_py()
    entry = write_part(place(attempt), "folds", folds, number)
    return Part(entry, np.bincount(column, minlength=gold.shape[1]), gold, single)


TEXTS = pa.schema([TABLES["documents"].schema.field(name) for name in ("row", "doc_id", "text")])


def _texts(documents, folds, kept, most=None):
    """The first `most` documents of a part whose fold is `kept`; without them the texts are not read."""
    mask = kept(read_table(folds, columns=["fold"])["fold"])
    if most == 0 or not pc.any(mask).as_py():
        return TEXTS.empty_table()
    return read_table(documents, columns=TEXTS.names).filter(mask).slice(0, most)


def _shingle(task, guard, similarity, locks):
    documents, folds, most, file = task
    duplicates.warm_up(locks())
    tests = _texts(documents, folds, lambda fold: pc.equal(fold, TEST), most)
    parts = []
    with replacing(place(file)) as path, path.open("wb") as out:
        for sets, held in guard.over(batches(tests), functools.partial(duplicates.shingle_sets, similarity=similarity)):
            parts.append(sets)
            held.tofile(out)
    return duplicates.joined(parts, similarity), file


def _comparer(known, file, guard, similarity, locks):
    def compare(part):
        duplicates.warm_up(locks())
        path = file.folder() / Path(file.files[0]).name
        mapped = np.memmap(path, np.uint64, "r") if path.stat().st_size else np.empty(0, np.uint64)
        held = np.asarray(mapped)  # the kernel wants a plain array: a view on the same pages
        held.setflags(write=False)  # and compiles for either kind apart

        def nearest(batch):
            return duplicates.nearest(batch, known.value, held, similarity)

        yield from guard.over(batches(_texts(*part, lambda fold: pc.greater_equal(fold, 0))), nearest)

    return compare


def _pair_counter(names, known):
    def count(path):
        documents = read_table(path, columns=["row", "labels"]).combine_chunks()
        if documents.num_rows:
            row, label_id = gold_pairs(documents, names)
            yield from pairs(row - documents["row"][0].as_py(), label_id, documents.num_rows, known)

    return count
