"""The stage split: test texts that stand in training too, labels that hang together, one label a document."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import entry
from pipeline import config
from pipeline.learners import duplicates
from pipeline.stages import split
from pipeline.storage import digest
from tests.conftest import SMALL

TABLES = ("near_duplicates", "label_relations")


def documents(n=90, seed=0):
    """Distinct texts on both sides; among the test texts three copies and two near-copies of training texts."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        text = " ".join(f"w{k}" for k in rng.integers(0, 3000, 60))
        labels = ["broad", "narrow"] if i % 4 == 0 else (["broad"] if i % 4 == 1 else ["other"])
        labels = [*labels, "twin one", "twin two"] if i % 3 == 0 else labels
        split = "dev" if i % 10 == 9 else "test" if i % 3 == 1 else "train"
        rows.append({"doc_id": f"d{i:03d}", "text": text, "labels": labels, "split": split})
    train, test = ([r for r in rows if r["split"] == side] for side in ("train", "test"))
    for k in range(3):
        test[k]["text"] = train[k]["text"].upper() + "!"
    for k in (3, 4):
        test[k]["text"] = train[k]["text"] + f" {k}new"
    test[5]["text"] = test[6]["text"]  # of the same side: no matter
    test[7]["text"] = next(r for r in rows if r["split"] == "dev")["text"]
    test[8]["text"] = train[8]["text"] = "two words"
    test[9]["text"] = train[9]["text"] = "-"
    pairs = {test[k]["doc_id"]: train[k]["doc_id"] for k in range(5)}
    return rows, pairs, test[7]["doc_id"]


@pytest.fixture
def divided(spark, tmp_path):
    """divided(rows, *sets) -> Run: ingest and split only."""

    def call(rows, *sets):
        path = tmp_path / "documents.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
        cfg, _ = config.load(sets=[*SMALL, *sets])
        root = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        return entry.fit(str(root), str(path), cfg, False, only=("ingest", "split"))

    return call


def test_copies_across_the_split_are_found_and_told(divided, caplog):
    rows, pairs, of_dev = documents()
    with caplog.at_level(logging.WARNING, "pipeline"):
        run = divided(rows)
    found = run.read("near_duplicates").to_pylist()
    other = {r["doc_id"]: r["other_doc_id"] for r in found}
    assert {k: v for k, v in other.items() if k != of_dev} == pairs
    assert of_dev in other  # dev documents are trained on
    ids = run.read("documents", ["doc_id"])["doc_id"].to_pylist()
    fold = run.read("folds")["fold"].to_pylist()
    for r in found:
        assert (ids[r["row"]], ids[r["other_row"]]) == (r["doc_id"], r["other_doc_id"])
        assert fold[r["row"]] == -1
        assert fold[r["other_row"]] >= 0
    assert sorted(r["similarity"] for r in found) == pytest.approx([58 / 59] * 2 + [1.0] * 4)
    assert run.manifest("split")["near_duplicates"] == 6
    assert "6 of these near-duplicates of the former" in run.manifest("split")["summary"]
    tests = run.manifest("split")["documents"]["test"]
    assert f"split: 6 of {tests} test documents have nearly the text of a training document" in caplog.text
    assert not list((run.root / "split").glob("*/shingles*"))


def test_dev_documents_that_are_dropped_are_no_training_documents(divided):
    rows, _, of_dev = documents()
    assert of_dev not in divided(rows, "split.dev=drop").read("near_duplicates")["doc_id"].to_pylist()


def test_near_duplicates_are_not_looked_for(divided, monkeypatch, caplog):
    monkeypatch.setattr(split, "near_duplicates", lambda *_: pytest.fail("looked for"))
    run = divided(documents()[0], "split.near_duplicates=0")
    assert run.read("near_duplicates").num_rows == 0
    assert run.manifest("split")["near_duplicates"] is None
    assert "near" not in run.manifest("split")["summary"]
    assert "nearly" not in caplog.text


def test_few_near_duplicates_are_no_warning(divided, caplog, monkeypatch):
    monkeypatch.setattr(split, "MULTIPLE", 0.5)
    assert divided(documents()[0]).manifest("split")["near_duplicates"] == 6
    assert "nearly" not in caplog.text


@pytest.mark.parametrize("most", [0, 1, 11])
def test_at_most_so_many_test_documents_are_compared_whatever_the_parts(divided, monkeypatch, most):
    monkeypatch.setattr(split, "COMPARED", most)
    rows, *_ = documents()
    for row in rows:
        row["text"] = "the same text everywhere"
    for parts in (1, 5):
        run = divided(rows, f"spark.partitions={parts}")
        fold = run.read("folds")["fold"].to_numpy()
        found = run.read("near_duplicates")
        assert found["row"].to_pylist() == np.flatnonzero(fold == -1)[:most].tolist()
        assert set(found["other_row"].to_pylist()) <= {int(np.flatnonzero(fold >= 0)[0])}  # the first of equal ones
        assert run.manifest("split")["near_duplicates_among"] == most
        assert f"{most} of the first {most} near-duplicates" in run.manifest("split")["summary"]


def test_partitions_and_order_change_no_byte(divided):
    rows, *_ = documents()
    prints = [
        [[digest(path) for path in run.files(table)] for table in TABLES]
        for run in (
            divided(rows),
            divided(rows[::-1], "spark.partitions=1"),
            divided(rows, "spark.partitions=2"),
            divided(rows, "spark.partitions=97"),
        )
    ]
    assert all(found == prints[0] for found in prints)


def test_the_stage_finds_what_the_learner_finds(divided):
    run = divided(documents()[0], "split.near_duplicates=0.01")
    table, fold = run.read("documents", ["row", "doc_id", "text"]), run.read("folds")["fold"].to_numpy()
    sets, held = duplicates.shingle_sets(table.filter(pa.array(fold == -1)), 0.01)
    texts = duplicates.comparable([sets], 0.01)
    near = duplicates.nearest(table.filter(pa.array(fold >= 0)), texts.known, held, 0.01)
    assert run.read("near_duplicates").equals(duplicates.near_duplicates(pa.Table.from_batches([near]), texts))


def test_labels_that_depend_on_others(divided):
    run = divided(documents()[0])
    found = {(r["label"], r["other"], r["kind"], r["documents"]) for r in run.read("label_relations").to_pylist()}
    assert found == {
        ("narrow", "broad", "implies", 23),
        ("twin one", "twin two", "same", 30),
        ("broad", "other", "excludes", 46),
    }
    facts = run.manifest("split")
    assert (facts["label_relations"], facts["multi_class"]) == (3, False)
    assert facts["summary"].endswith(", 3 pairs of labels depend on each other")


def test_so_many_relations_are_told(divided, monkeypatch):
    monkeypatch.setattr(split, "RELATIONS", 1)
    assert [r["label"] for r in divided(documents()[0]).read("label_relations").to_pylist()] == ["narrow"]


def test_one_label_a_document_is_told(divided, caplog):
    rows, *_ = documents()
    for i, row in enumerate(rows):
        row["labels"] = ["abc"[i % 3]]
    with caplog.at_level(logging.WARNING, "pipeline"):
        run = divided(rows)
    assert run.manifest("split")["multi_class"] is True
    assert "split: every document carries exactly one label" in caplog.text
    assert run.read("label_relations").num_rows == 0
    rows[0]["labels"] = []
    assert divided(rows).manifest("split")["multi_class"] is False
    for row in rows:
        row["labels"] = ["a"]
    assert divided(rows).manifest("split")["multi_class"] is False  # there is nothing to choose from
