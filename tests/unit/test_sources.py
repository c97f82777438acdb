import csv
import gzip
import hashlib
import io
import json
import os
import string
import tempfile
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import sources
from pipeline.errors import ConfigError, InputError, PermissionError_, StorageError
from pipeline.sources import RAW_SCHEMA, SourceFormat, Split, plan, read_split

FMT = SourceFormat()
CONTENT = ("doc_id", "text", "labels", "split", "reason", "label_repairs")

DOCS = [
    {"doc_id": "1", "text": "a plain one", "labels": ["b", "a"], "split": "train"},
    {"doc_id": " 2", "text": 'quotes ", commas, tabs\t and\r\nlines\n\n', "labels": [" a ", "a", "c"], "split": "dev"},
    {"doc_id": "3", "text": "", "labels": [], "split": "validation"},
    {"doc_id": "4", "text": "é 漢字 😀 \u202e\u2028 ", "labels": ["\u00e9", "😀", "z", "", "z\u00a0"], "split": "test"},
]
KEPT = [
    ("1", "a plain one", ["a", "b"], "train", None, 0),
    (" 2", 'quotes ", commas, tabs\t and\r\nlines\n\n', ["a", "c"], "dev", None, 1),
    ("3", "", [], "dev", None, 0),
    ("4", "é 漢字 😀 \u202e\u2028 ", ["z", "é", "😀"], "test", None, 2),
]


def rows(path, fmt=FMT, target=64 << 20, need_labels=True):
    found = plan(str(path), fmt, target, need_labels)
    return [row for split in found.splits for batch in read_split(split, fmt) for row in as_rows(batch)]


def as_rows(batch):
    batch.validate(full=True)
    assert batch.schema.equals(RAW_SCHEMA)
    return batch.to_pylist()


def content(found):
    return [tuple(row[name] for name in CONTENT) for row in found]


def reasons(found):
    return [row["reason"] for row in found]


def line(doc):
    return json.dumps(doc).encode() + b"\n"


def encoded(docs, kind):
    """The bytes of a file of `docs`."""
    if kind == "jsonl":
        return b"".join(map(line, docs))
    if kind == "parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(docs), sink)
        return sink.getvalue()
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter="\t" if kind == "tsv" else ",")
    writer.writerow(docs[0])
    writer.writerows([["|".join(v) if isinstance(v, list) else v for v in doc.values()] for doc in docs])
    return sink.getvalue().encode()


def compressed(data, suffix):
    if suffix == ".gz":
        return gzip.compress(data[:50]) + gzip.compress(data[50:])  # two members make one file
    if suffix == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return data


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path, write_page_checksum=True)
    return path


def strings(*values):
    """Strings that may be no UTF-8, as a Parquet file may hold them."""
    return pa.array(values, pa.binary()).view(pa.string())


# What comes out


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
def test_text_formats_give_the_same_documents(tmp_path, kind, suffix):
    path = tmp_path / f"docs.{kind}{suffix}"
    path.write_bytes(compressed(encoded(DOCS, kind), suffix))
    assert content(rows(path)) == KEPT
    assert content(rows(path, target=1)) == KEPT


@pytest.mark.parametrize(
    ("doc_id", "text", "labels", "split"),
    [
        (pa.string(), pa.string(), pa.list_(pa.string()), pa.string()),
        (pa.large_string(), pa.large_string(), pa.large_list(pa.large_string()), pa.large_string()),
        (pa.string_view(), pa.string_view(), pa.list_(pa.string_view()), pa.string_view()),
    ],
)
def test_parquet_gives_the_same_documents(tmp_path, doc_id, text, labels, split):
    schema = pa.schema({"labels": labels, "split": split, "text": text, "doc_id": doc_id})
    pq.write_table(pa.Table.from_pylist(DOCS, schema), tmp_path / "docs.parquet")
    assert content(rows(tmp_path / "docs.parquet")) == KEPT


def test_parquet_dictionaries_and_a_string_of_labels(tmp_path):
    table = {name: [doc[name] for doc in DOCS] for name in DOCS[0]}
    table["labels"] = ["|".join(labels) for labels in table["labels"]]
    parquet(tmp_path / "docs.pq", **{name: pa.array(values).dictionary_encode() for name, values in table.items()})
    assert content(rows(tmp_path / "docs.pq")) == KEPT


def test_integer_ids_become_decimal_strings(tmp_path):
    parquet(tmp_path / "a.parquet", doc_id=pa.array([7, -1, None], pa.int64()), text=["x"] * 3, labels=[["a"]] * 3)
    (tmp_path / "b.jsonl").write_bytes(
        b"".join(line({"doc_id": i, "text": "x", "labels": ["a"]}) for i in (7, -1, None))
    )
    found = content(rows(tmp_path))
    assert found[:3] == found[3:]
    assert [row[0] for row in found[:3]] == ["7", "-1", None]
    assert found[2][4] == "missing_doc_id"


def test_names_are_mapped_and_several_texts_joined(tmp_path):
    fmt = SourceFormat(doc_id="k.1", text=("title", "body"), labels="y", split=None, label_separator=";")
    docs = [{"k.1": "a", "title": "T", "body": "B", "y": "p;q", "split": "?"}]
    (tmp_path / "a.csv").write_bytes(encoded(docs, "csv"))
    docs = [
        docs[0] | {"y": ["q", "p"]},
        {"k.1": "b", "title": None, "body": "B", "y": None},
        {"k.1": "c", "title": None, "body": None, "y": []},
    ]
    (tmp_path / "b.jsonl").write_bytes(encoded(docs, "jsonl"))
    (tmp_path / "c.parquet").write_bytes(encoded(docs, "parquet"))
    first = ("a", "T\nB", ["p", "q"], None, None, 0)
    rest = [first, ("b", "B", [], None, None, 0), ("c", None, None, None, "missing_text", 0)]
    assert content(rows(tmp_path, fmt)) == [first, *rest, *rest]


def test_labels_are_null_where_there_is_no_such_column(tmp_path):
    docs = [{"doc_id": "a", "text": "x"}]
    for kind in ("csv", "jsonl", "parquet"):
        (tmp_path / f"a.{kind}").write_bytes(encoded(docs, kind))
    assert content(rows(tmp_path, need_labels=False)) == [("a", "x", None, None, None, 0)] * 3
    parquet(tmp_path / "a.parquet", doc_id=["a", "b"], text=strings(b"x", b"\xff"))  # each row by itself
    assert content(rows(tmp_path / "a.parquet", need_labels=False))[0] == ("a", "x", None, None, None, 0)
    with pytest.raises(ConfigError, match=r"input\.labels is empty"):
        plan(str(tmp_path), SourceFormat(labels=None))


def test_null_columns_of_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", doc_id=["a", "b"], text=["x", "y"], labels=[None, None], split=[None, None])
    assert content(rows(path)) == [("a", "x", [], None, None, 0), ("b", "y", [], None, None, 0)]
    path = parquet(tmp_path / "b.parquet", doc_id=["a", "b"], text=["x", "y"], labels=[[], [None]])
    assert content(rows(path)) == [("a", "x", [], None, None, 0), ("b", "y", [], None, None, 1)]


def test_repairs_count_each_given_string_once(tmp_path):
    cases = [
        (["a", "b"], 0),
        ([" a"], 1),
        (["a", " a"], 1),
        ([" a", "a "], 2),
        (["a", "a", "a"], 2),
        (["", " ", None], 3),
    ]
    docs = [{"doc_id": "d", "text": "x", "labels": labels} for labels, _ in cases]
    for kind in ("jsonl", "parquet"):
        (tmp_path / f"a.{kind}").write_bytes(encoded(docs, kind))
        assert [row["label_repairs"] for row in rows(tmp_path / f"a.{kind}")] == [repairs for _, repairs in cases]


odd_text = st.text(st.sampled_from("ab \t\n\0é😀\x1c\x85\u3000"), max_size=6)
doc_ids = st.none() | odd_text
documents = st.fixed_dictionaries(
    {
        "doc_id": doc_ids,
        "text": st.none() | odd_text,
        "labels": st.none() | st.lists(st.none() | odd_text, max_size=5),
        "split": st.sampled_from([None, "", "train", "val", "Train", "te\0st"]),
    }
)


@settings(max_examples=100, deadline=None)
@given(st.lists(documents, min_size=1, max_size=12))
def test_columns_at_once_give_what_records_one_by_one_give(docs):
    fmt = SourceFormat(max_document_bytes=8, max_labels_per_document=3, max_label_bytes=4)
    schema = pa.schema(
        {"doc_id": pa.string(), "text": pa.string(), "labels": pa.list_(pa.string()), "split": pa.string()}
    )
    with tempfile.TemporaryDirectory() as folder:
        pq.write_table(pa.Table.from_pylist(docs, schema), f"{folder}/a.parquet")
        Path(folder, "a.jsonl").write_bytes(encoded(docs, "jsonl"))
        found = rows(f"{folder}/a.parquet", fmt)
        assert content(found) == content(rows(f"{folder}/a.jsonl", fmt))
        assert [row["position"] for row in found] == list(range(len(docs)))


def test_whatever_is_white_space_to_python_is_no_id(tmp_path):
    blanks = [chr(c) for c in range(0x110000) if chr(c).isspace()]
    path = parquet(tmp_path / "a.parquet", doc_id=blanks, text=["x"] * len(blanks), labels=[blanks] * len(blanks))
    assert set(reasons(rows(path))) == {"missing_doc_id"}
    path = parquet(tmp_path / "a.parquet", doc_id=["a"], text=["x"], labels=[[f"{b}a{b}" for b in blanks]])
    assert rows(path)[0]["labels"] == ["a"]


# JSON Lines


def json_rows(tmp_path, *lines, fmt=FMT):
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    return rows(tmp_path / "a.jsonl", fmt)


GOOD = b'{"doc_id": "d", "text": "x", "labels": []}'


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b'{"doc_id": "1", "text": "x"', "malformed_json"),
        (b'{"doc_id": "1", "text": "x"} {}', "malformed_json"),
        (b'{"doc_id": "1", "text": "tab\t"}', "malformed_json"),
        (b"\xef\xbb\xbf" + GOOD, "malformed_json"),
        (b'{"doc_id": "1", "text": "\xff"}', "invalid_utf8"),
        (b'{"doc_id": "1", "text": "\xed\xa0\x80"}', "invalid_utf8"),
        (b'{"doc_id": "1", "text": "\0"}', "nul_character"),
        (b'{"doc_id": "1", "text": "\\u0000"}', "nul_character"),
        (b'{"doc_id": "1\\u0000", "text": ""}', "nul_character"),
        (b'{"doc_id": "1", "text": "", "labels": ["\\u0000"]}', "nul_character"),
        (b'{"doc_id": "1", "text": "\\ud800"}', "surrogate"),
        (b'{"doc_id": "\\udfff", "text": ""}', "surrogate"),
        (b'{"doc_id": "1", "text": "", "labels": ["\\ud800"]}', "surrogate"),
        (b'{"doc_id": "1", "text": "\\ud83d\\ude00"}', None),
        (b'{"doc_id": "1", "text": "", "x": NaN}', "non_finite"),
        (b'{"doc_id": "1", "text": "", "x": -Infinity}', "non_finite"),
        (b'{"doc_id": "1", "text": "", "x": 1e999}', "non_finite"),
        (b'{"doc_id": "1", "text": "", "x": 1e99}', None),
        (b'{"doc_id": ' + b"7" * 5000 + b', "text": ""}', "number_range"),
        (b'{"doc_id": ' + b"7" * 4000 + b', "text": ""}', None),
        (b'{"doc_id": "1", "doc_id": "1", "text": ""}', "duplicate_key"),
        (b'{"doc_id": "1", "text": "", "x": {"a": 1, "a": 1}}', "duplicate_key"),
        (b'{"doc_id": "1", "text": "", "x": ' + b"[" * 99 + b"]" * 99 + b"}", None),
        (b'{"doc_id": "1", "text": "", "x": ' + b"[" * 100 + b"]" * 100 + b"}", "too_deep"),
        (b'{"doc_id": "1", "text": "", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "too_deep"),
        (b'{"doc_id": "1", "text": "' + b"[{" * 200 + b'"}', None),
        (b"[]", "not_an_object"),
        (b'"x"', "not_an_object"),
        (b"null", "not_an_object"),
        (b'{"text": ""}', "missing_doc_id"),
        (b'{"doc_id": null, "text": ""}', "missing_doc_id"),
        (b'{"doc_id": " \\t", "text": ""}', "missing_doc_id"),
        (b'{"doc_id": "1"}', "missing_text"),
        (b'{"doc_id": "1", "text": null}', "missing_text"),
        (b'{"doc_id": 1.5, "text": ""}', "type_error:doc_id"),
        (b'{"doc_id": true, "text": ""}', "type_error:doc_id"),
        (b'{"doc_id": "1", "text": 3}', "type_error:text"),
        (b'{"doc_id": "1", "text": "", "labels": "x"}', "type_error:labels"),
        (b'{"doc_id": "1", "text": "", "labels": [3]}', "type_error:labels"),
        (b'{"doc_id": "1", "text": "", "labels": {"x": 1}}', "type_error:labels"),
        (b'{"doc_id": "1", "text": "", "split": 3}', "type_error:split"),
        (b'{"doc_id": "1", "text": "", "split": "TRAIN"}', "unknown_split"),
        (b'{"doc_id": "1", "text": "", "split": ""}', None),
    ],
)
def test_a_bad_json_record_is_rejected_alone(tmp_path, record, reason):
    found = json_rows(tmp_path, GOOD, record, GOOD)
    assert reasons(found) == [None, reason, None]
    assert [row["position"] for row in found] == [0, len(GOOD) + 1, len(GOOD) + len(record) + 2]
    if reason:
        assert found[1]["text"] is found[1]["labels"] is found[1]["split"] is None
        head = record[:200].decode("utf-8", "backslashreplace")
        assert found[1]["sample"] == sources.shown(head, 10_000)


def test_a_reject_keeps_its_id_where_it_has_one(tmp_path):
    found = json_rows(tmp_path, b'{"doc_id": "7", "labels": []}', GOOD.replace(b'"d"', b"null"), GOOD)
    assert [row["doc_id"] for row in found] == ["7", None, "d"]


def test_blank_lines_marks_and_line_ends(tmp_path):
    found = json_rows(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r", b"", b"  \r", GOOD)
    assert reasons(found) == [None, None]
    assert [row["position"] for row in found] == [0, 3 + len(GOOD) + 2 + 1 + 4]
    assert json_rows(tmp_path, b"\xef\xbb\xbf") == []


record_bytes = st.sampled_from([GOOD, GOOD + b"\r", b"", b" ", b"{", b"\xff", b'{"doc_id": "d2", "text": ""}'])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(record_bytes, max_size=4),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    chunk=st.integers(1, 60),
    end=st.booleans(),
)
def test_a_record_belongs_to_one_split_wherever_the_cut_is(monkeypatch, lines, mark, chunk, end):
    data = mark + b"\n".join(lines) + b"\n" * end
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.jsonl"
        Path(path).write_bytes(data)

        def read(*cuts):
            splits = [Split(path, "jsonl", start, stop) for start, stop in pairwise(cuts)]
            return [row for split in splits for batch in read_split(split, FMT) for row in batch.to_pylist()]

        whole = read(0, len(data))
        assert len(whole) == sum(bool(line.strip()) for line in data.removeprefix(mark).split(b"\n"))
        monkeypatch.setattr(sources, "CHUNK", chunk)
        for cut in range(len(data) + 1):
            assert read(0, cut, len(data)) == whole
        assert read(*range(len(data) + 1)) == whole


def test_plan_cuts_json_lines_and_not_what_is_compressed(tmp_path):
    data = encoded(DOCS, "jsonl")
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    found = plan(str(tmp_path), FMT, target_bytes=100).splits
    spans = [(split.start, split.stop) for split in found if split.file.endswith("a.jsonl")]
    assert spans == [(start, min(start + 100, len(data))) for start in range(0, len(data), 100)]
    assert len(found) == len(spans) + 1


# Size


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_giant_line_is_rejected_in_flat_memory(tmp_path, suffix):
    size = 50_000_000
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compressed(GOOD + b"\n" + b"x" * size + b"\n" + GOOD, suffix))
    fmt = SourceFormat(max_document_bytes=1000)
    split = plan(str(path), fmt).splits[0]
    tracemalloc.start()
    found = [row for batch in read_split(split, fmt) for row in batch.to_pylist()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reasons(found) == [None, "record_too_large", None]
    assert found[1]["sample"] == f"{size} bytes: {'x' * 200}"
    assert found[2]["position"] == len(GOOD) + size + 2
    assert peak < 10_000_000


TRAP = 'd,"a document, that looks like one",l\r\n'.replace('"', '""')  # as a line of its own it would do as a record


@pytest.mark.parametrize("cell", [TRAP * 60_000, "x" * 4_000_000 + '""'], ids=["many lines", "one long line"])
def test_a_giant_cell_is_rejected_in_flat_memory_and_its_lines_are_not_taken_for_records(tmp_path, cell):
    path = tmp_path / "a.csv"
    path.write_text(f'doc_id,text,labels\r\n1,x,a\r\n2,"{cell}",b\r\n3,z,c\r\n', newline="")
    fmt = SourceFormat(max_document_bytes=1000)
    split = plan(str(path), fmt).splits[0]
    tracemalloc.start()
    found = [row for batch in read_split(split, fmt) for row in batch.to_pylist()]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(row["doc_id"], row["reason"]) for row in found] == [("1", None), (None, "record_too_large"), ("3", None)]
    assert found[1]["sample"].startswith(f"line 3, {len(cell) + 8} bytes: 2,")
    assert peak < 15_000_000


def test_a_document_over_the_limit_is_not_kept(tmp_path):
    fmt = SourceFormat(max_document_bytes=6)
    docs = [{"doc_id": "a", "text": "ééé", "labels": []}, {"doc_id": "b", "text": "éééx", "labels": []}]
    for kind in ("jsonl", "csv", "parquet"):
        (tmp_path / f"a.{kind}").write_bytes(encoded(docs, kind))
        fits, over = rows(tmp_path / f"a.{kind}", fmt)
        assert (fits["text"], fits["reason"]) == ("ééé", None)
        assert (over["doc_id"], over["text"], over["reason"]) == ("b", None, "document_too_large")
        assert over["sample"].startswith("7 bytes: ")


def test_limits_of_labels(tmp_path):
    fmt = SourceFormat(max_labels_per_document=2, max_label_bytes=4)
    cases = [["a", "b", " a ", ""], ["a", "b", "c"], ["  éé  "], ["ééx"]]
    docs = [{"doc_id": "a", "text": "x", "labels": labels} for labels in cases]
    for kind in ("jsonl", "csv", "parquet"):
        (tmp_path / f"a.{kind}").write_bytes(encoded(docs, kind))
        assert reasons(rows(tmp_path / f"a.{kind}", fmt)) == [None, "too_many_labels", None, "label_too_long"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_batches_are_bounded(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 1000)
    sizes = [10, 990, 1, 3000, 5, 500, 500, 1] + [0] * 2000
    docs = [{"doc_id": "a", "text": "x" * size, "labels": []} for size in sizes]
    (tmp_path / f"a.{kind}").write_bytes(encoded(docs, kind))
    split = plan(str(tmp_path / f"a.{kind}"), FMT).splits[0]
    batches = [[len(text) for text in batch["text"].to_pylist()] for batch in read_split(split, FMT)]
    assert [size for batch in batches for size in batch] == sizes
    assert all(len(batch) <= 1024 and (sum(batch) <= 1000 or len(batch) == 1) for batch in batches)
    assert len(batches) < 40 or kind == "parquet"


def test_a_dictionary_bomb_unfolds_a_part_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DICTIONARY_BYTES", 8 << 20)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int32()), ["x" * 1_000_000])
    table = pa.table({"doc_id": ["a"] * 200, "text": text, "labels": [["a"]] * 200})
    pq.write_table(table, tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 30, store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    split = plan(str(tmp_path), FMT).splits[0]
    batches = [(batch.num_rows, batch["text"].get_total_buffer_size()) for batch in read_split(split, FMT)]
    assert sum(count for count, _ in batches) == 200
    assert max(size for _, size in batches) < 10 << 20


# CSV and TSV


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (b"2,x", "ragged_row"),
        (b"2,x,a,train,more", "ragged_row"),
        (b" ", "ragged_row"),
        (b"2,\xff,a,", "invalid_utf8"),
        (b"2,\0,a,", "nul_character"),
        (b"2,x,a|\0,", "nul_character"),
        (b" ,x,a,", "missing_doc_id"),
        (b",x,a,", "missing_doc_id"),
        (b"2,,,", None),
        (b'2,"x" y,a,', "malformed_csv"),
        (b"2,x\ry,a,", "malformed_csv"),
        (b'2,"x\ry",a,', None),
        (b'2,5" disk,a,', None),
        (b"2,x,a,eval", "unknown_split"),
    ],
)
def test_a_bad_csv_record_is_rejected_alone(tmp_path, record, reason):
    (tmp_path / "a.csv").write_bytes(
        b"\xef\xbb\xbfdoc_id,text,labels,split\r\n1,x,a,\r\n\r\n" + record + b"\n3,x,a,test"
    )
    found = rows(tmp_path / "a.csv")
    assert reasons(found) == [None, reason, None]
    assert [row["position"] for row in found] == [0, 1, 2]
    if reason in ("ragged_row", "malformed_csv"):
        assert found[1]["sample"].startswith("line 4, ")


def test_an_unclosed_quote_is_rejected_at_its_line(tmp_path):
    (tmp_path / "a.csv").write_text('doc_id,text,labels\n1,x,a\n2,"x,a\n3,x,a\n')
    found = rows(tmp_path / "a.csv")
    assert reasons(found) == [None, "unclosed_quote"]
    assert found[1]["sample"].startswith('line 3, 13 bytes: 2,"x,a')


def test_an_unclosed_quote_that_swallows_more_than_a_record_fails_the_file(tmp_path):
    (tmp_path / "a.csv").write_text('doc_id,text,labels\n1,x,a\n2,"x,a\n' + "3,x,a\n" * 500_000)
    with pytest.raises(InputError, match=r"a\.csv has a quote in the record at line 3"):
        rows(tmp_path / "a.csv", SourceFormat(max_document_bytes=1000))


def test_columns_of_csv_are_found_by_name(tmp_path):
    (tmp_path / "a.tsv").write_text("labels\tx\ttext\tdoc_id\na|b\t1\tthe text\tthe id\n")
    assert content(rows(tmp_path / "a.tsv")) == [("the id", "the text", ["a", "b"], None, None, 0)]


cells = st.text(st.sampled_from('a,"\n\r\t |é '), max_size=8)


@settings(max_examples=120, deadline=None)
@given(
    table=st.lists(st.tuples(cells, cells, cells), max_size=8),
    kind=st.sampled_from(["csv", "tsv"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_csv_reads_what_the_standard_library_reads(table, kind, quoting):
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/a.{kind}"
        delimiter = "\t" if kind == "tsv" else ","
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter, quoting=quoting)
            writer.writerows([("text", "doc_id", "other"), *((text, f"d{name}", other) for text, name, other in table)])
        with open(path, newline="") as file:
            expected = [(row["doc_id"], row["text"]) for row in csv.DictReader(file, delimiter=delimiter, strict=True)]
        found = rows(path, need_labels=False)
        assert [(row["doc_id"], row["text"]) for row in found] == expected
        assert set(reasons(found)) <= {None}


# Parquet


def test_row_groups_make_splits_and_rows_keep_their_number(tmp_path):
    table = pa.table({"doc_id": [str(i) for i in range(10)], "text": ["x"] * 10, "labels": [["a"]] * 10})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=3)
    each = plan(str(tmp_path), FMT, target_bytes=1).splits
    assert [(split.start, split.stop) for split in each] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    size = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).total_byte_size
    pairs = plan(str(tmp_path), FMT, target_bytes=2 * size).splits
    assert [(split.start, split.stop) for split in pairs] == [(0, 2), (2, 4)]
    for splits in (each, pairs):
        found = [row for split in splits for batch in read_split(split, FMT) for row in batch.to_pylist()]
        assert [(row["position"], row["doc_id"]) for row in found] == [(i, str(i)) for i in range(10)]


def test_strings_of_parquet_are_checked(tmp_path):
    bad, nul = b"\xff", b"\0"
    ids = strings(b"1", bad, b"3", b"4", b"5", nul, b"7", b"8")
    text = strings(b"x", b"x", bad, b"x", b"x", b"x", nul, b"\xed\xa0\x80")
    lists = pa.ListArray.from_arrays(pa.array(range(9), pa.int32()), strings(b"a", b"a", b"a", bad, *[b"a"] * 4))
    split = strings(b"dev", b"", b"", b"", bad, b"", b"", b"")
    found = rows(parquet(tmp_path / "a.parquet", doc_id=ids, text=text, labels=lists, split=split))
    assert reasons(found) == [None, *["invalid_utf8"] * 4, "nul_character", "nul_character", "invalid_utf8"]
    assert content(found)[0] == ("1", "x", ["a"], "dev", None, 0)
    assert found[2]["sample"] == "\\xff"
    lists = pa.ListArray.from_arrays(pa.array([0, 1, 2, 3], pa.int32()), strings(b"a", b"a\0", b" b"))
    found = rows(parquet(tmp_path / "b.parquet", doc_id=["1", "2", "3"], text=["x"] * 3, labels=lists))
    assert [(row["labels"], row["reason"]) for row in found] == [(["a"], None), (None, "nul_character"), (["b"], None)]


def test_a_flipped_bit_never_changes_a_record(tmp_path):
    path = parquet(tmp_path / "a.parquet", doc_id=["a", "b"], text=["one", "two"], labels=[["x"], ["y", "z"]])
    whole, expected = path.read_bytes(), rows(path)
    refused = 0
    for place in range(0, len(whole), 2):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place // 2 % 8]) + whole[place + 1 :])
        try:
            assert rows(path) == expected, place
        except InputError as error:
            assert "a.parquet" in str(error)
            refused += 1
    assert refused > len(whole) / 6


def test_values_under_a_list_that_is_null_belong_to_nobody(tmp_path):
    """Arrow lets them be there; a flipped bit of Parquet makes some."""
    lists = pa.ListArray.from_arrays([0, 1, 3, 4], list("abcd"), mask=pa.array([False, True, False]))
    batch = pa.record_batch({"doc_id": list("123"), "text": ["x"] * 3, "labels": lists})
    found = sources._checked(batch, FMT, "f", 0)
    assert [row["labels"] for row in as_rows(found)] == [["a"], [], ["d"]]


def test_a_damaged_page_names_the_row_group(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [os.urandom(8).hex() for _ in range(4)]
    table = pa.table({"doc_id": list("abcd"), "text": texts, "labels": [["a"]] * 4})
    pq.write_table(table, path, row_group_size=2, write_page_checksum=True, compression="none")
    splits = plan(str(path), FMT, target_bytes=1).splits
    data = path.read_bytes()
    path.write_bytes(data.replace(texts[3].encode(), texts[2].encode()))
    assert len(list(read_split(splits[0], FMT))) == 1
    with pytest.raises(InputError, match=r"a\.parquet row group 1 is damaged"):
        list(read_split(splits[1], FMT))


@pytest.mark.parametrize("keep", [0, 3, 8, 100, -1, -8, -30])
def test_a_truncated_parquet_file_is_refused_by_plan(tmp_path, keep):
    path = parquet(tmp_path / "a.parquet", doc_id=["a"], text=["x"], labels=[["y"]])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"a\.parquet (is damaged|has 0 bytes|does not begin and end)") as refused:
        plan(str(tmp_path), FMT)
    assert refused.value.code == 66


def test_files_that_shrink_or_go_after_plan_fail_the_split(tmp_path):
    for kind in ("jsonl", "csv", "parquet"):
        (tmp_path / f"a.{kind}").write_bytes(encoded(DOCS * 3, kind))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(encoded(DOCS, "jsonl")))
    pq.write_table(pa.Table.from_pylist(DOCS), tmp_path / "b.parquet", row_group_size=1)
    splits = plan(str(tmp_path), FMT, target_bytes=1 << 30).splits
    assert len(splits) == 5
    pq.write_table(pa.Table.from_pylist(DOCS), tmp_path / "b.parquet")
    for split in splits:
        if not split.file.endswith("b.parquet"):
            os.truncate(split.file, os.path.getsize(split.file) - 10)
        with pytest.raises(InputError) as refused:
            list(read_split(split, FMT))
        assert split.file in str(refused.value)
        os.remove(split.file)
        with pytest.raises(InputError, match="no such file"):
            list(read_split(split, FMT))


# Plan


def test_every_entry_is_read_or_listed_as_ignored(tmp_path):
    read = ["a.jsonl", "b[1].jsonl", "c{x}*?,:% é\n.jsonl", "d.JSON", "e.ndjson", "part=1/f.jsonl", "part=1/g/h.csv"]
    ignored = {
        "_SUCCESS": "hidden",
        ".a.jsonl.swp": "hidden",
        "_temporary": "hidden",
        "part=1/.f.jsonl.crc": "hidden",
        "x.crc": "left by another program",
        "x.jsonl.tmp": "left by another program",
        "x.zip": "an archive",
        "x.tar.gz": "an archive",
        "README": "unknown kind of file",
        "x.jsonl.bz2": "unknown kind of file",
        "gone.jsonl": "broken link",
        "pipe.jsonl": "not a regular file",
        "loop": "link to a folder",
    }
    (tmp_path / "part=1/g").mkdir(parents=True)
    (tmp_path / "_temporary").mkdir()
    (tmp_path / "_temporary/a.jsonl").write_bytes(line(DOCS[0]))
    for name in read:
        (tmp_path / name).write_bytes(encoded(DOCS[:1], "csv" if name.endswith("csv") else "jsonl"))
    os.symlink("nowhere", tmp_path / "gone.jsonl")
    os.symlink(tmp_path, tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name in ignored:
        if not os.path.lexists(tmp_path / name):
            (tmp_path / name).write_bytes(b"x")
    found = plan(str(tmp_path), FMT)
    assert [file for file, _, _ in found.files] == sorted(str(tmp_path / name) for name in read)
    assert dict(found.ignored) == {str(tmp_path / name): reason for name, reason in ignored.items()}
    assert [split.file for split in found.splits] == [file for file, _, _ in found.files]
    assert len(rows(tmp_path)) == len(read)
    for file, size, digest in found.files:
        data = Path(file).read_bytes()
        assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())


def test_a_name_that_is_no_utf8_is_read(tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.jsonl"
    Path(os.fsdecode(path)).write_bytes(line(DOCS[0]))
    assert rows(tmp_path)[0]["file"] == f"{tmp_path}/\\udcff.jsonl"


def test_a_pattern_and_a_literal_name(tmp_path, monkeypatch):
    for name in ("b1.jsonl", "b[1].jsonl", "c/_x/d.jsonl", "c/e.jsonl", "_f.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(line(DOCS[0]))

    def names(path):
        return [os.path.relpath(file, tmp_path) for file, _, _ in plan(str(path), FMT).files]

    assert names(tmp_path / "b[1].jsonl") == ["b[1].jsonl"]
    assert names(tmp_path / "b[0-9].jsonl") == ["b1.jsonl"]
    assert names(tmp_path / "?1*") == ["b1.jsonl"]
    assert names(tmp_path / "**/*.jsonl") == ["b1.jsonl", "b[1].jsonl", "c/e.jsonl"]
    assert names(tmp_path / "[c]") == ["c/e.jsonl"]
    assert names(tmp_path / "_f.jsonl") == ["_f.jsonl"]  # named by the user
    assert names(f"file://{tmp_path}/c") == ["c/e.jsonl"]
    monkeypatch.chdir(tmp_path)
    assert plan("c", FMT).splits[0].file == str(tmp_path / "c/e.jsonl")


def test_nothing_to_read_is_an_error(tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "x.zip").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe")
    for path in ("none", "x.zip", "pipe"):
        with pytest.raises(InputError, match=r"expected \.parquet, \.jsonl/\.json/\.ndjson, \.csv, \.tsv"):
            plan(str(tmp_path / path), FMT)
    with pytest.raises(InputError, match="1 ignored: an archive"):
        plan(str(tmp_path / "*.zip"), FMT)
    for path in ("gone", "gone/*.csv", "x.zip/a"):
        with pytest.raises(InputError, match="no such file or folder"):
            plan(str(tmp_path / path), FMT)


def test_files_without_records_are_fine(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b"\n\n")
    (tmp_path / "c.csv").write_bytes(b"")
    (tmp_path / "d.csv").write_bytes(b"doc_id,text,labels\n")
    (tmp_path / "e.csv.gz").write_bytes(gzip.compress(b""))
    empty = pa.schema({"doc_id": pa.string(), "text": pa.string(), "labels": pa.list_(pa.string())})
    pq.write_table(empty.empty_table(), tmp_path / "f.parquet")
    assert rows(tmp_path) == []
    assert len(plan(str(tmp_path), FMT).files) == 6


def test_no_permission(tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # unlike tmp_path, below folders that everybody may enter
        os.chmod(folder, 0o755)
        path = Path(folder, "a.jsonl")
        path.write_bytes(line(DOCS[0]))
        split = plan(str(path), FMT).splits[0]
        path.chmod(0)
        user = os.geteuid()
        if user == 0:  # who may read everything
            os.seteuid(65534)
        try:
            for attempt in (lambda: plan(folder, FMT), lambda: list(read_split(split, FMT))):
                with pytest.raises(PermissionError_, match=r"a\.jsonl may not be read") as refused:
                    attempt()
                assert refused.value.code == 77
        finally:
            os.seteuid(user)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that cannot be read")
def test_an_input_error_of_the_disk_is_no_damaged_file():
    with pytest.raises(StorageError, match="/proc/self/mem could not be read"):
        plan("/proc/self/mem", SourceFormat(format="jsonl"))


def test_a_file_is_what_its_bytes_say(tmp_path):
    data = encoded(DOCS, "jsonl")
    (tmp_path / "a.jsonl").write_bytes(gzip.compress(data))
    (tmp_path / "b.jsonl.gz").write_bytes(data)
    (tmp_path / "c.jsonl.gz").write_bytes(compressed(data, ".zst"))
    (tmp_path / "d.jsonl").write_bytes(encoded(DOCS, "parquet"))
    (tmp_path / "part-00000").write_bytes(encoded(DOCS, "parquet"))
    assert content(rows(tmp_path)) == KEPT * 5
    for name in ("a.parquet", "a.parquet.gz"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"{name} does not begin and end as a Parquet file"):
            plan(str(tmp_path / name), FMT)


def test_a_given_format_goes_before_the_name(tmp_path):
    (tmp_path / "a.txt").write_bytes(encoded(DOCS, "tsv"))
    (tmp_path / "b.csv").write_bytes(encoded(DOCS, "tsv"))
    assert content(rows(tmp_path, SourceFormat(format="tsv"))) == KEPT * 2


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "jsonl.gz"])
def test_another_encoding_is_refused_by_name(tmp_path, encoding, kind):
    data = encoded(DOCS, kind.removesuffix(".gz")).decode()
    data = (data if encoding in ("utf-16", "utf-32") else "\ufeff" + data).encode(encoding)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    with pytest.raises(InputError, match=rf"is encoded in {encoding[:6].upper()}; expected UTF-8"):
        plan(str(path), FMT)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_damaged_compressed_file_is_refused(tmp_path, kind, suffix):
    docs = [doc | {"text": os.urandom(30).hex()} for doc in DOCS] * 300
    data = compressed(encoded(docs, kind), suffix)
    flipped = bytearray(data)
    flipped[-7 if suffix == ".gz" else 8] ^= 255  # the checksum of gzip; zstd as it is written here has none
    for broken in (bytes(flipped), data[:-1], data[: len(data) // 2]):
        path = tmp_path / f"a.{kind}{suffix}"
        path.write_bytes(broken)
        with pytest.raises(InputError, match=rf"a\.{kind}{suffix} is damaged"):
            rows(path)


def test_all_discrepancies_come_in_one_error(tmp_path):
    parquet(tmp_path / "a.parquet", doc_id=[1.5], text=[["x"]], labels=[3], split=[1])
    parquet(tmp_path / "b.parquet", id=["a"], body=["x"], labels=[["a"]])
    (tmp_path / "c.csv").write_text("doc_id,text\n1,x\n")
    (tmp_path / "d.csv").write_text("doc_id,text\n1,x\n")
    (tmp_path / "e.tsv").write_text("doc_id\ttext\tlabels\ttext\n")
    (tmp_path / "f.jsonl").write_bytes(b'{"doc_id": "1", "body": "x", "labels": []}\n' * 100 + GOOD)
    (tmp_path / "g.csv").write_bytes(b'doc_id,"text\n')
    (tmp_path / "h.parquet").write_bytes(b"PAR1PAR1")
    (tmp_path / "i.jsonl").write_bytes(b'{"doc_id": "1", "body": "x", "labels": []}\n' * 99 + GOOD)  # one has it: fine
    with pytest.raises(InputError) as refused:
        plan(str(tmp_path), FMT)
    said = str(refused.value)
    for problem in (
        "a.parquet has a column 'doc_id' of double; expected strings or integers; convert it or set input.doc_id",
        "a.parquet has a column 'text' of list<element: string>; expected strings; convert it or set input.text",
        "a.parquet has a column 'labels' of int64; expected lists of strings",
        "a.parquet has a column 'split' of int64",
        "b.parquet has no column 'doc_id', its columns are id, body, labels; set input.doc_id to one of them",
        "b.parquet has no column 'text', its columns are id, body, labels; set input.text to one of them",
        "c.csv (and 1 more) has no column 'labels', its columns are doc_id, text; set input.labels to one of them",
        "e.tsv has columns of the same name (text)",
        "f.jsonl has no column 'text', its columns are doc_id, body, labels",
    ):
        assert problem in said
    assert "and 1 more" in said.split("; ")[-1]
    assert "\n" not in said and "i.jsonl" not in said


def test_two_parquet_columns_of_one_name_are_refused(tmp_path):
    table = pa.table([["a"], ["x"], ["y"]], names=["doc_id", "text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has 2 columns 'text'; expected one"):
        plan(str(tmp_path), FMT, need_labels=False)


# Accounting


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(st.integers(0, 7), min_size=1, max_size=60))
def test_every_record_is_accepted_or_rejected(tmp_path, kind, faults):
    fmt = SourceFormat(max_document_bytes=100, max_labels_per_document=2)
    damage = [{}, {"doc_id": ""}, {"text": "\0"}, {"text": "x" * 200}, {"labels": ["a", "b", "c"]}, {"split": "no"}]
    sound = {"doc_id": "a", "text": "x", "labels": ["l"], "split": "train"}
    docs = [sound | damage[fault % len(damage)] for fault in faults]
    path = tmp_path / f"a.{kind}"
    data = encoded(docs, kind)
    count = len(docs)
    if kind == "parquet":
        count = pq.ParquetFile(io.BytesIO(data)).metadata.num_rows
    elif kind == "jsonl":
        data = data.replace(b'"x"}', b'"x"').replace(b"{", b"", faults[0]) + b"\n\n\xff\n{}"
        count = sum(not line.isspace() for line in data.splitlines(keepends=True))
    else:
        data = data.replace(b"train", b"train,more", faults[0]) + b"\xff,,,\r\n\r\nragged\r\n"
        count += 2
    path.write_bytes(data)
    found = rows(path, fmt, target=50)
    accepted = [row for row in found if row["reason"] is None]
    rejected = [row for row in found if row["reason"]]
    assert len(accepted) + len(rejected) == count
    assert len({row["position"] for row in found}) == count
    assert all(row["text"] is not None and row["sample"] is None for row in accepted)
    assert all(row["text"] is None and row["sample"] is not None for row in rejected)


def test_any_object_with_the_attributes_will_do(tmp_path):
    class Section:
        doc_id, text, labels, split = "doc_id", ["text"], "labels", "split"
        label_separator, format = "|", "auto"
        max_document_bytes, max_labels_per_document, max_label_bytes = 100, 10, 10

    for kind in ("jsonl", "csv", "parquet"):
        (tmp_path / f"a.{kind}").write_bytes(encoded(DOCS, kind))
    assert content(rows(tmp_path, Section())) == KEPT * 3


def test_samples_are_escaped(tmp_path):
    found = json_rows(tmp_path, "\u202e\x1b[31m{".encode() + b"\xff", GOOD)
    assert found[0]["sample"] == "\\u202e\\x1b[31m{\\xff"
    assert set(found[0]["sample"]) <= set(string.printable)
