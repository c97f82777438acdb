"""Damaged bytes for everything that reads: a result, or one line with an exit code, and within a second."""

import contextlib
import csv
import io
import json
import random
import re
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.entry import one_line, translated
from pipeline import config, versions
from pipeline.errors import TagmillError
from pipeline.learners.document_rules import DocumentRule
from pipeline.learners.label_rules import read_rules
from pipeline.learners.tagger import KNOTS, READ, Tagger, save
from pipeline.sources import SourceFormat
from pipeline.stages import poison
from pipeline.storage import digest
from pipeline.store import MANIFEST, Run
from tests.unit.learners.test_tagger import SETTINGS, tagged
from tests.unit.learners.test_tagger import folder as saved_tagger  # noqa: F401  (a fixture)
from tests.unit.test_sources import DOCS, compressed, encoded, rows
from tests.unit.test_store import publish

SECONDS = 1.0  # of CPU for one input
MEMORY = 512 << 20  # bytes that the process may grow by
LIMITED = SourceFormat(max_document_bytes=500, max_labels_per_document=3, max_label_bytes=20)
# what has a meaning somewhere: quotes, brackets, numbers at the edge of a type, tags of YAML, lengths of Thrift
TOKENS = [
    b'"', b"'", b"\\", b"{", b"}", b"[", b"]", b"[" * 300, b",", b":", b"|", b"\n", b"\r\n", b"\t", b"\0", b"\xff",
    b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"\\u0000", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-1",
    b"0", b"2147483648", b"9223372036854775808", b"1" * 5000, b"..", b"/etc/passwd", b"../" * 9, b"a" * 600, b"&a ",
    b"*a", b"<<: ", b"!!python/object:os.system ", b"? ", b"- ", b"# ", b"PAR1", b"\x1f\x8b", b"\x28\xb5\x2f\xfd",
    b"\x80\x80\x80\x80\x08", b"\xff\xff\xff\x7f", b"doc_id", b"labels", b"sha256", b"attempt",
]  # fmt: skip


def damaged(draw, data):
    """`data` after up to five random edits."""
    for _ in range(draw.randint(1, 5)):
        at, long = draw.randrange(len(data) + 1), draw.randint(1, 200)
        new = draw.choice(TOKENS) if draw.random() < 0.7 else draw.randbytes(draw.randrange(9))
        edit = draw.choice(("flip", "cut", "end", "repeat", "insert", "replace"))
        if edit == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        elif edit == "cut":
            data = data[:at] + data[at + long :]
        elif edit == "end":
            data = data[:at]
        elif edit == "repeat":
            data = data[: at + long] + data[at:]
        elif edit == "insert":
            data = data[:at] + new + data[at:]
        elif edit == "replace":
            data = data[:at] + new + data[at + len(new) :]
    return data


ODD = [
    None, True, -1, 0, 2**31, 2**63, 1.5, 1e308, "", "x", "label 3", "../x", "\0", "é" * 300, [], ["x"], {}, {"x": 1},
]  # fmt: skip
OTHERS = {pa.string(): "x", pa.binary(): b"x", pa.bool_(): True, pa.int64(): 1, pa.int32(): 1, pa.float32(): 1}


def revalued(draw, value):
    """JSON with another value, one less, or one twice, somewhere in it."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        at = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = value.copy()
        if draw.random() < 0.15:
            value.pop(at)
        elif isinstance(value, list) and draw.random() < 0.15:
            value.append(value[at])
        else:
            value[at] = revalued(draw, value[at])
        return value
    return draw.choice(ODD)


def recolumned(draw, table):
    """A table with another type, order or value in a column, or without it."""
    at = draw.randrange(table.num_columns)
    column, field = table.column(at), table.field(at)
    change = draw.choice(("drop", "type", "order", "value", "rows"))
    if change == "drop":
        return table.remove_column(at)
    if change == "rows":
        return table.slice(draw.randrange(2), draw.randrange(table.num_rows + 1))
    if change == "type":
        kind = draw.choice(list(OTHERS))
        return table.set_column(at, field.name, pa.array([OTHERS[kind]] * table.num_rows, kind))
    values = column.to_pylist()
    if change == "order":
        draw.shuffle(values)
    else:
        some = [None, -1, 0, 7, 2**31 - 1, 1e300, float("nan"), float("inf"), "", "label 3", [], [2.0, 1.0]]
        values[draw.randrange(len(values))] = draw.choice(some)
    return table.set_column(at, field, pa.array(values, field.type))


def spoiled(draw, path, whole):
    """The bytes of a file after edits of its bytes, or of what they stand for."""
    if draw.random() < 0.5:
        with contextlib.suppress(pa.ArrowException, TypeError, ValueError, OverflowError):  # it does not fit the column
            if path.suffix == ".json":
                return json.dumps(revalued(draw, json.loads(whole))).encode()
            if path.suffix == ".parquet" and path.stem in READ:
                sink = io.BytesIO()
                pq.write_table(recolumned(draw, pq.read_table(io.BytesIO(whole))), sink)
                return sink.getvalue()
    return damaged(draw, whole)


# A reader: the files that are damaged in turn, and what reads the folder that holds them.


@pytest.fixture(params=["jsonl", "jsonl.gz", "csv", "csv.zst", "tsv", "parquet"])
def documents(request, tmp_path):
    kind, _, packed = request.param.partition(".")
    path = tmp_path / f"a.{request.param}"
    path.write_bytes(compressed(encoded(DOCS * 3, kind), f".{packed}"))
    return [path], lambda: rows(path, LIMITED, target=200)


@pytest.fixture
def settings_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(
        "train:\n  C: [1, 1e1]\n  positive_weight: balanced\nspark:\n  options: {spark.executor.memory: 2g}\n"
        "featurize: {min_df: 2, max_features: 1_000}\ninput:\n  text: [title, body]\n"
    )
    return [path], lambda: config.load(path)


@pytest.fixture
def rules_file(tmp_path):
    path, hierarchy = tmp_path / "rules.yaml", tmp_path / "tree.csv"
    path.write_text(
        "hierarchy: tree.csv\nimplies: {a: [b, c]}\nexcludes: [[a, d], [e, f]]\nat_most: [{n: 2, of: [g, h, i]}]\n"
        "at_least: [{n: 1, of: [e, f], when: a}]\nexclude: [z]\nsynonyms: {old: new}\n"
    )
    with hierarchy.open("w", newline="") as file:
        csv.writer(file).writerows([("child", "parent"), ("a", "b"), ("c, d", 'x"y')])
    return [path, hierarchy], lambda: read_rules(path)


@pytest.fixture
def run_folder(tmp_path):
    """What a run keeps beside its tables; the tables are checked by SHA-256 before they are read."""
    run = Run(tmp_path / "run")
    run.prepare()
    with run.writing():
        run.create({"config": config.Config().model_dump(mode="json"), "input": "x"})
        publish(run, 1)
    verdict = {"doc_id": "d", "reason": "oom", "stage": "split", "what": "needs more than 4 GB", "input": "x"}
    (run.root / poison.LIST).write_text(json.dumps({"of": "mark", "documents": [verdict]}))
    kept = run.root / versions.FOLDER / "0001"
    kept.mkdir(parents=True)
    manifest = {**run.finished("split"), "recipe": {"settings": {}, "inputs": {}}}
    (kept / versions.CARD).write_text(json.dumps({"number": 1, "calibrate": manifest, "evaluate": None, "when": 0}))

    def read():
        refusals = []
        for part in (
            lambda: run.info,
            lambda: run.damage("split"),
            lambda: run.read("folds", verify=True),
            lambda: run.files("label_support", verify=True),
            lambda: poison.listed(run, "mark"),
            lambda: versions.kept(run),
        ):
            try:
                part()
            except (TagmillError, OSError) as error:  # what is wrong for one of them must not hide the next
                refusals.append(error)
        if refusals:
            raise refusals[0]

    split = run.root / "split" / MANIFEST
    return [run.root / "run.json", split, run.root / poison.LIST, kept / versions.CARD], read


@pytest.fixture
def tagger(saved_tagger, tmp_path):  # noqa: F811
    """The folder of a model with all that one may have: rules of both kinds, and knots."""
    vocabulary, labels, thresholds = (pq.read_table(saved_tagger / f"{name}.parquet") for name in READ)
    for name in KNOTS:
        knots = pa.array([[0.0, 1.0], [], [-1.0, 0.5, 2.0], *[[]] * (thresholds.num_rows - 3)], pa.list_(pa.float64()))
        thresholds = thresholds.append_column(name, knots)
    rules = tmp_path / "rules.yaml"
    rules.write_text(
        "implies: {label 1: [label 2]}\nexcludes: [[label 3, label 4]]\nat_most: [{n: 1, of: [label 5, label 6]}]\n"
        "at_least: [{n: 1, of: [label 7, label 8], when: label 1}]\nsynonyms: {label 0: label 2}\n"
    )
    folder = tmp_path / "model"
    folder.mkdir()
    document = DocumentRule(rule="rcut", k=3, at_least_one=True)
    weights = sorted(saved_tagger.glob("weights-*.npy"))
    save(folder, vocabulary, labels, thresholds, weights, SETTINGS, read_rules(rules), document)
    return folder


@pytest.fixture
def model(tagger):
    """Files under a card that has the hashes of just these files, and the card itself, which has none."""
    card = tagger / "tagger.json"
    names = json.loads(card.read_text())["sha256"]
    known = card.read_bytes()

    def read():
        if card.read_bytes() == known:
            now = {**json.loads(known), "sha256": {name: digest(tagger / name) for name in names}}
            card.write_text(json.dumps(now))
        try:
            tagged(Tagger.load(tagger))
        finally:
            card.write_bytes(known)

    return [*(tagger / name for name in names), card, card], read


COUNTS = [500, pytest.param(10_000, marks=[pytest.mark.chaos, pytest.mark.timeout(1800)])]


def attack(count, files, read):
    """Damage one of `files`, read, and put it back, `count` times; how often it was read or refused."""
    whole = {path: path.read_bytes() for path in files}
    read()  # compiles what it needs
    with contextlib.suppress(OSError):  # not every container lets a process
        Path("/proc/self/clear_refs").write_text("5")  # begin its peak of memory anew
    before = peak()
    outcomes = {"read": 0, "refused": 0}
    for seed in range(count):
        draw = random.Random(seed)
        path = draw.choice(files)
        content = spoiled(draw, path, whole[path])
        if content == whole[path]:
            continue
        path.write_bytes(content)
        began = time.process_time()
        try:
            read()
            outcomes["read"] += 1
        except (TagmillError, OSError) as error:
            line = str(error) if isinstance(error, TagmillError) else one_line(translated(error))
            assert "\n" not in line and len(line) < 4000 and line.isprintable(), (
                f"{path.name}, seed {seed}: {line[:500]}"
            )
            outcomes["refused"] += 1
        except Exception as error:
            error.add_note(f"{path.name}, seed {seed}: {content[:1000]!r}")
            raise
        assert time.process_time() - began < SECONDS, f"{path.name}, seed {seed}"
        path.write_bytes(whole[path])
    assert peak() - before < MEMORY
    return outcomes


def peak():
    """The most memory that this process has had, in bytes."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


@pytest.mark.parametrize("count", COUNTS)
def test_documents(documents, count):
    assert attack(count, *documents)["read"]  # of Parquet hardly any


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("reader", ["settings_file", "rules_file", "run_folder", "model"])
def test_files_of_settings_rules_runs_and_models(request, reader, count):
    assert min(attack(count, *request.getfixturevalue(reader)).values()) > count / 50
