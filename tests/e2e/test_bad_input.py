"""Bad input gets a clear answer and nothing is lost: a counted reject, or one line and its exit code."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import entry
from pipeline import config
from tests.conftest import SMALL


@pytest.fixture
def outcome(spark, tmp_path, capsys):
    """outcome(path, *sets) -> (exit code, the line on stderr, run folder)."""

    def call(path, *sets, run=None):
        folder = run or tmp_path / "run"

        def fit():
            cfg, _ = config.load(sets=[*SMALL, *sets])
            entry.fit(str(folder), str(path), cfg)

        capsys.readouterr()
        code = entry.guarded(fit)
        return code, capsys.readouterr().err.strip(), folder

    return call


def rows(count=30, **columns):
    """Documents about apples and pears."""
    out = []
    for i in range(count):
        fruit = ("apple", "pear")[i % 2]
        row = {"doc_id": f"d{i}", "text": f"a ripe {fruit} from the garden number{i % 3}", "labels": [fruit]}
        out.append({**row, **{key: value(i) for key, value in columns.items()}})
    return out


def parquet(path, documents):
    pq.write_table(pa.Table.from_pylist(documents), path)
    return path


def lines(path, documents):
    path.write_bytes(b"".join(d if isinstance(d, bytes) else json.dumps(d).encode() + b"\n" for d in documents))
    return path


def rejects(folder):
    from pipeline.store import Run

    run = Run(folder)
    table = run.read("rejects").to_pylist()
    facts = run.manifest("ingest")
    assert facts["records"] == facts["accepted"] + sum(facts["rejected"].values())
    assert len(table) == sum(facts["rejected"].values())
    return sorted(row["reason"] for row in table)


# -- the whole input is refused ----------------------------------------------------------------------------------------


def refused(result, code, *words):
    found, line, folder = result
    assert found == code, line
    assert line.startswith("tagmill: ")
    assert "\n" not in line
    for word in words:
        assert word in line
    assert not (folder / "metrics.json").exists()
    assert not (folder / "train").exists()


def test_missing_file(outcome, tmp_path):
    refused(outcome(tmp_path / "nothing.parquet"), 66, "nothing.parquet", "no such file")
    assert not (tmp_path / "run").exists()


def test_missing_column(outcome, tmp_path):
    path = parquet(tmp_path / "in.parquet", [{"doc_id": "1", "body": "x", "labels": ["a"]}])
    refused(outcome(path), 66, "in.parquet", "text", "body", "input.text")


def test_columns_are_mapped(outcome, tmp_path):
    documents = [{"id": i, "title": "t", "body": r["text"], "topics": r["labels"]} for i, r in enumerate(rows())]
    path = parquet(tmp_path / "in.parquet", documents)
    code, line, folder = outcome(path, "input.doc_id=id", "input.text=[title,body]", "input.labels=topics")
    assert code == 0, line
    assert rejects(folder) == []


def test_empty_input(outcome, tmp_path):
    refused(outcome(lines(tmp_path / "in.jsonl", [])), 66, "in.jsonl", "no record")
    empty = pa.Table.from_pylist(rows(1)).slice(0, 0)
    pq.write_table(empty, tmp_path / "in.parquet")
    refused(outcome(tmp_path / "in.parquet"), 66, "no record")


def test_no_document_has_a_label(outcome, tmp_path):
    refused(outcome(lines(tmp_path / "in.jsonl", rows(labels=lambda i: []))), 65, "30 documents", "label")


def test_corrupt_parquet(outcome, tmp_path):
    path = parquet(tmp_path / "in.parquet", rows())
    path.write_bytes(path.read_bytes()[:-40])
    refused(outcome(path), 66, "in.parquet")


def test_mostly_broken_lines(outcome, tmp_path):
    path = lines(tmp_path / "in.jsonl", [b"{broken\n"] * 10 + rows())
    first = f"the first are {path} at 0 (malformed_json): {{broken, {path} at 8 (malformed_json)"
    refused(outcome(path), 65, "10 of 40 records", "(10 malformed_json)", first, "ingest.max_rejected")
    code, line, folder = outcome(path, "ingest.max_rejected=0.5")
    assert code == 0, line
    assert rejects(folder) == ["malformed_json"] * 10


def test_no_vocabulary(outcome, tmp_path):
    refused(outcome(lines(tmp_path / "in.jsonl", rows(text=lambda i: ""))), 65, "no term", "min_df")


def test_no_test_documents(outcome, tmp_path):
    code, line, folder = outcome(lines(tmp_path / "in.jsonl", rows()), "split.test=0")
    assert code == 65
    assert "test fold" in line
    assert not (folder / "metrics.json").exists()


def test_output_folder_of_somebody_else(outcome, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("important")
    code, line, _ = outcome(lines(tmp_path / "in.jsonl", rows()), run=folder)
    assert code == 78
    assert "thesis.txt" in line
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


def test_output_folder_is_a_file(outcome, tmp_path):
    path = lines(tmp_path / "in.jsonl", rows())
    code, line, _ = outcome(path, run=path)
    assert code in (74, 78)
    assert "in.jsonl" in line


def test_output_folder_of_another_configuration(outcome, tmp_path):
    path = lines(tmp_path / "in.jsonl", rows())
    assert outcome(path)[0] == 0
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    code, line, _ = outcome(path, "featurize.min_df=3")
    assert code == 78
    assert "featurize.min_df is 3, 2 in the run" in line
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before


def test_no_permission(outcome, tmp_path, monkeypatch):
    """As the operating system says it: root is refused nothing, so a file system that is read-only."""
    code, line, _ = outcome(lines(tmp_path / "in.jsonl", rows()), run="/proc/tagmill-run")
    assert code in (66, 77)
    assert "/proc/tagmill-run" in line


# -- single records are refused, counted and kept apart ----------------------------------------------------------------


def test_every_bad_record_is_a_reject_with_its_reason(outcome, tmp_path):
    good = rows(60)
    bad = [
        b'{"doc_id": "x1", "text": "broken\n',
        b'{"doc_id": "x2", "text": "caf\xe9", "labels": []}\n',
        {"doc_id": None, "text": "no id", "labels": []},
        {"doc_id": "  ", "text": "blank id", "labels": []},
        {"doc_id": "x3", "labels": ["apple"]},
        {"doc_id": "x4", "text": "nul \x00 here", "labels": []},
        {"doc_id": "x5", "text": "wrong labels", "labels": "apple"},
        {"doc_id": "x6", "text": "y" * 3000, "labels": []},
        {"doc_id": "x7", "text": "marked", "labels": [], "split": "training?"},
    ]
    twice = [{**good[0]}, {**good[1], "text": "another text for the same id"}]
    path = lines(tmp_path / "in.jsonl", [*bad, *good, *twice])
    code, line, folder = outcome(path, "input.max_document_bytes=2000", "ingest.max_rejected=0.5")
    assert code == 0, line
    assert rejects(folder) == sorted(
        [
            "malformed_json",
            "invalid_utf8",
            "missing_doc_id",
            "missing_doc_id",
            "missing_text",
            "nul_character",
            "type_error:labels",
            "document_too_large",
            "unknown_split",
            "duplicate",
            "id_conflict",
            "id_conflict",
        ]
    )
    from pipeline.store import Run

    assert Run(folder).manifest("ingest")["accepted"] == 59


def test_a_document_of_50_megabytes(outcome, tmp_path):
    big = {"doc_id": "big", "text": "word " * 10_000_000, "labels": ["apple"]}
    code, line, folder = outcome(lines(tmp_path / "in.jsonl", [*rows(), big]))
    assert code == 0, line
    assert rejects(folder) == ["record_too_large"]


def test_labels_are_cleaned_and_counted(outcome, tmp_path):
    documents = rows(30, labels=lambda i: [" apple ", "", "apple"] if i % 2 else ["pear"])
    code, line, folder = outcome(lines(tmp_path / "in.jsonl", documents))
    assert code == 0, line
    from pipeline.store import Run

    run = Run(folder)
    assert run.read("labels")["label"].to_pylist() == ["apple", "pear"]
    assert run.manifest("ingest")["label_repairs"] > 0


def test_label_on_every_document_and_empty_texts(outcome, tmp_path):
    documents = rows(40, labels=lambda i: ["all", ("apple", "pear")[i % 2]])
    documents += [{"doc_id": f"e{i}", "text": "", "labels": ["all"]} for i in range(4)]
    code, line, folder = outcome(lines(tmp_path / "in.jsonl", documents))
    assert code == 0, line
    from pipeline.store import Run

    run = Run(folder)
    status = dict(
        zip(
            run.read("labels")["label"].to_pylist(),
            run.read("label_models").sort_by("label_id")["status"].to_pylist(),
            strict=True,
        )
    )
    assert status == {"all": "no_negatives", "apple": "ok", "pear": "ok"}
    everywhere = run.read("label_counts").to_pylist()[0]
    assert everywhere["recall"] == everywhere["precision"] == 1.0
    assert run.manifest("featurize")["documents_without_features"] == 4
