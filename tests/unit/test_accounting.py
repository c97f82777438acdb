"""Random corpora with damage of every kind: each record is a document or a reject with the reason that it was given."""

import collections
import csv
import io
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources import SourceFormat, plan, read_split
from pipeline.stages import ingest
from tests.unit.test_sources import compressed, strings

FMT = SourceFormat(max_document_bytes=2000, max_labels_per_document=4, max_label_bytes=30)
WORDS = ["a", "word", "é", "漢字", "😀", "\u202e", '"', ",", "|", "\r\n", "\n", "\t", "'", "{", "\\"]
NOBODY = "nobody"  # stands for an id in the lines below


def jsonl(**changes):
    return json.dumps({"doc_id": NOBODY, "text": "x", "labels": []} | changes).encode()


# by reason, the records that have it; doc_ids are put in where they have one
JSONL = {
    "malformed_json": [b'{"doc_id": "nobody", "text": "x"', b"{", jsonl() + b" {}", jsonl()[:-1] + b",}"],
    "invalid_utf8": [jsonl().replace(b"x", b"\xff"), b"\xc3"],
    "nul_character": [jsonl(text="\0"), jsonl(labels=["\0"]), b"\0"],
    "surrogate": [jsonl(text="\ud800"), jsonl(labels=["\udfff"])],
    "duplicate_key": [jsonl()[:-1] + b', "text": "x"}', jsonl(x={})[:-2] + b'"a": 1, "a": 2}}'],
    "non_finite": [jsonl(x=float("nan")), jsonl(x=float("inf")), jsonl()[:-1] + b', "x": 1e999}'],
    "number_range": [jsonl()[:-1] + b', "x": ' + b"1" * 5000 + b"}"],
    "too_deep": [jsonl()[:-1] + b', "x": ' + b"[" * n + b"]" * n + b"}" for n in (100, 50_000)],
    "not_an_object": [b"[]", b"7", b'"text"', b"null"],
    "type_error:doc_id": [jsonl(doc_id=1.5), jsonl(doc_id=True), jsonl(doc_id=["a"])],
    "type_error:text": [jsonl(text=1), jsonl(text=["x"])],
    "type_error:labels": [jsonl(labels="a"), jsonl(labels=[1]), jsonl(labels={})],
    "type_error:split": [jsonl(split=1)],
    "record_too_large": [jsonl(x="y" * 1_100_000)],
    "document_too_large": [jsonl(text="é" * 1001)],
    "missing_doc_id": [jsonl(doc_id=None), jsonl(doc_id=" \u3000"), b'{"text": "x"}'],
    "missing_text": [jsonl(text=None), b'{"doc_id": "nobody", "labels": []}'],
    "too_many_labels": [jsonl(labels=list("abcde"))],
    "label_too_long": [jsonl(labels=["é" * 16])],
    "unknown_split": [jsonl(split="TRAIN")],
}
CSV = {
    "invalid_utf8": [b"nobody,\xff,,", b"\xff,,,", b"nobody,x,\xff,"],
    "nul_character": [b"nobody,\0,,", b"nobody,x,\0,"],
    "malformed_csv": [b'nobody,"x"y,,'],
    "ragged_row": [b"nobody", b"nobody,x,,train,more"],
    "record_too_large": [b"nobody,x,," + b"y" * 1_100_000, b'nobody,"x' + b"\r\n" * 600_000 + b'",,'],
    "document_too_large": [b"nobody," + b"x" * 2001 + b",,"],
    "missing_doc_id": [b",x,,", b'" ",x,,'],
    "too_many_labels": [b"nobody,x,a|b|c|d|e,"],
    "label_too_long": [b"nobody,x," + b"a" * 31 + b","],
    "unknown_split": [b"nobody,x,,no"],
}
LAST = [b'nobody,"x,,', b'nobody,x,"a,\r\n', b'"']  # quotes that stay open: unclosed_quote
PARQUET = {
    "invalid_utf8": [{"text": b"\xff"}, {"doc_id": b"\xed\xa0\x80"}, {"labels": [b"\xff"]}, {"split": b"\xff"}],
    "nul_character": [{"text": b"\0"}, {"doc_id": b"\0"}, {"labels": [b"a", b"\0"]}],
    "document_too_large": [{"text": b"x" * 2001}],
    "missing_doc_id": [{"doc_id": None}, {"doc_id": b""}, {"doc_id": b" \t"}],
    "missing_text": [{"text": None}],
    "too_many_labels": [{"labels": [b"a", b"b", b"c", b"d", b"e"]}],
    "label_too_long": [{"labels": [b"a" * 31]}],
    "unknown_split": [{"split": b"Test"}],
}
KINDS = {"jsonl": JSONL, "csv": CSV, "tsv": CSV, "parquet": PARQUET}
REASONS = {*JSONL, *CSV, *PARQUET, "unclosed_quote", "duplicate", "id_conflict"}


def document(draw, ids):
    """A sound one; its id may have been given away before, with the same content or another."""
    if ids and draw.random() < 0.1:
        doc = dict(draw.choice(ids))
        return doc | {"text": doc["text"] + "!"} if draw.random() < 0.4 else doc
    text = " ".join(draw.choices(WORDS, k=draw.randrange(8)))
    labels = sorted(draw.sample(["a", "b b", "é", "😀", "x" * 30], draw.randrange(4)))
    doc = {"doc_id": f"d{len(ids)}", "text": text, "labels": labels, "split": draw.choice(["", "train", "test"])}
    ids.append(doc)
    return doc


def drawn(draw, kind, ids):
    """Records of a file: (reason or None, a document or what stands in its place)."""
    out = []
    for _ in range(draw.randrange(30)):
        if draw.random() < 0.7:
            out.append((None, document(draw, ids)))
        else:
            # the two that are longer than a megabyte take as long as all others
            wanted = [r for r in KINDS[kind] if r != "record_too_large" or draw.random() < 0.1]
            reason = draw.choice(wanted)
            out.append((reason, draw.choice(KINDS[kind][reason])))
    if kind in ("csv", "tsv") and draw.random() < 0.1:
        out.append(("unclosed_quote", draw.choice(LAST)))
    return out


def encoded(draw, record):
    return json.dumps(record, ensure_ascii=draw.random() < 0.5).encode()


def lines_of(draw, records):
    """JSON Lines, with blank ones between them; the position of each record."""
    sink, positions = io.BytesIO(), []
    sink.write(draw.choice([b"", b"\xef\xbb\xbf"]) if records else b"")
    for number, (reason, record) in enumerate(records):
        sink.write(draw.choice([b"", b"", b"\n", b" \r\n"]) if number else b"")
        positions.append(sink.tell() if number else 0)
        sink.write(record.replace(b"nobody", b"bad%d" % draw.randrange(3)) if reason else encoded(draw, record))
        sink.write(draw.choice([b"\n", b"\r\n"]))
    return sink.getvalue(), positions


def cells_of(draw, records, delimiter):
    """CSV or TSV; positions are record numbers."""
    lines = [delimiter.join(("doc_id", "text", "labels", "split")).encode()]
    for reason, record in records:
        if reason:
            lines.append(record.replace(b",", delimiter.encode()).replace(b"nobody", b"bad%d" % draw.randrange(3)))
            continue
        sink = io.StringIO()
        csv.writer(sink, delimiter=delimiter).writerow([record["doc_id"], record["text"], "|".join(record["labels"]),
                                                        record["split"]])  # fmt: skip
        lines.append(sink.getvalue().encode().removesuffix(b"\r\n"))
    end = b"" if records and records[-1][0] == "unclosed_quote" else draw.choice([b"", b"\n", b"\r\n\r\n"])
    return draw.choice([b"\n", b"\r\n"]).join(lines) + end, list(range(len(records)))


def columns_of(draw, records):
    sound = {"doc_id": b"bad", "text": b"x", "labels": [], "split": b""}
    rows = []
    for reason, record in records:
        fields = record.items() if reason else (
            (k, [x.encode() for x in v] if isinstance(v, list) else v.encode()) for k, v in record.items()
        )  # fmt: skip
        rows.append(sound | dict(fields))
    lists = [row["labels"] for row in rows]
    ends = pa.array([0, *(sum(map(len, lists[: k + 1])) for k in range(len(lists)))], pa.int32())
    flat = strings(*(x for row in lists for x in row))
    table = {name: strings(*(row[name] for row in rows)) for name in ("doc_id", "text", "split")}
    sink = io.BytesIO()
    pq.write_table(
        pa.table({**table, "labels": pa.ListArray.from_arrays(ends, flat)}),
        sink,
        row_group_size=draw.choice([3, 100]),
        use_dictionary=draw.random() < 0.5,
    )
    return sink.getvalue(), list(range(len(records)))


def corpus(draw, folder):
    """Write files; what must come of each record: {(file, position): (reason or None, document)}."""
    expected, ids = {}, []
    for number in range(draw.randint(1, 4)):
        kind = draw.choice(list(KINDS))
        records = drawn(draw, kind, ids)
        if kind == "parquet":
            data, positions = columns_of(draw, records)
            suffix = ""
        else:
            data, positions = (
                lines_of(draw, records) if kind == "jsonl" else cells_of(draw, records, "\t,"[kind == "csv"])
            )
            suffix = draw.choice(["", "", ".gz", ".zst"])
            data = compressed(data, suffix)
        path = folder / draw.choice(["", "part=1", "é {x}"]) / f"{number}.{kind}{suffix}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        for position, (reason, record) in zip(positions, records, strict=True):
            expected[str(path), position] = (reason, None if reason else record)
    return expected


def after_repetitions(expected):
    """Of equal documents the first stays, of different ones with one id none does: the rule of ingest, said slowly."""
    out = {place: reason for place, (reason, _) in expected.items()}
    by_id = collections.defaultdict(list)
    for place, (reason, doc) in sorted(expected.items()):
        if reason is None:
            by_id[doc["doc_id"]].append(place)
    for places in by_id.values():
        alike = all(expected[place] == expected[places[0]] for place in places)
        for place in places[1:] if alike else places:
            out[place] = "duplicate" if alike else "id_conflict"
    return out


def ingested(found, folder):
    """What the tasks of ingest make of it, on one part and without Spark."""
    read = ingest._reader(FMT, 1)
    batches = [batch for split in found.splits for batch in read(split)]
    order = [(name, "ascending") for name in ("key", "doc_id", "file", "position")]
    table = pa.Table.from_batches(batches, ingest.KEYED).sort_by(order)
    answer = ingest._write_sorted(table.to_batches(max_chunksize=7), folder, 0, {}).to_pylist()[0]
    facts = json.loads(answer["facts"])
    rejects = pq.read_table(folder / facts["rejects"]["file"]).to_pylist()
    with pa.ipc.open_file(folder / facts["documents"]["file"]) as file:
        return facts, rejects, file.read_all().to_pylist()


def check(seed, folder):
    draw = random.Random(seed)
    files = folder / "in"
    files.mkdir()
    expected = corpus(draw, files)
    found = plan(str(files), FMT, target_bytes=draw.choice([50, 1 << 20]))
    raw = [row for split in found.splits for batch in read_split(split, FMT) for row in batch.to_pylist()]
    assert {(row["file"], row["position"]): row["reason"] for row in raw} == {p: r for p, (r, _) in expected.items()}
    assert len(raw) == len(expected)

    (folder / "out").mkdir()
    wanted = after_repetitions(expected)
    facts, rejects, documents = ingested(found, folder / "out")
    assert {(row["file"], row["position"]): row["reason"] for row in rejects} == {p: r for p, r in wanted.items() if r}
    assert len(rejects) + len(documents) == len(expected)
    kept = {expected[place][1]["doc_id"]: expected[place][1] for place, reason in wanted.items() if reason is None}
    assert {d["doc_id"]: (d["text"], d["labels"], d["split"] or "") for d in documents} == {
        doc_id: (doc["text"], doc["labels"], doc["split"]) for doc_id, doc in kept.items()
    }
    assert facts["reasons"] == collections.Counter(reason for reason in wanted.values() if reason)
    assert facts["documents"]["rows"] == len(documents)
    return set(facts["reasons"])


@pytest.mark.parametrize("corpora", [60, pytest.param(1000, marks=pytest.mark.chaos)])
def test_what_was_broken_is_rejected_for_it_and_nothing_else_is(tmp_path, corpora):
    seen = set()
    for seed in range(corpora):
        folder = Path(tmp_path, str(seed))
        folder.mkdir()
        try:
            seen |= check(seed, folder)
        except AssertionError as error:
            raise AssertionError(f"corpus {seed}: {error}") from error
    assert seen == REASONS
    assert len(REASONS) == 25
