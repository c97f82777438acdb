"""Damaged bytes for everything that reads: a result, or one line with an exit code, and within a second."""

import contextlib
import csv
import json
import random
import resource
import time

import pytest

from jobs.entry import one_line, translated
from pipeline import config, versions
from pipeline.errors import ConfigError, DataError, InputError, TagmillError
from pipeline.learners.label_rules import read_rules
from pipeline.learners.tagger import Tagger
from pipeline.sources import SourceFormat
from pipeline.stages import poison
from pipeline.storage import digest
from pipeline.store import MANIFEST, Run
from tests.unit.learners.test_tagger import folder as saved_tagger  # noqa: F401  (a fixture)
from tests.unit.learners.test_tagger import tagged
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
        for part in (
            lambda: run.info,
            lambda: run.damage("split"),
            lambda: run.read("folds", verify=True),
            lambda: run.files("label_support", verify=True),
            lambda: poison.listed(run, "mark"),
            lambda: versions.kept(run),
        ):  # what is wrong for one of them must not hide the next
            with contextlib.suppress(DataError, InputError, ConfigError):
                part()

    split = run.root / "split" / MANIFEST
    return [run.root / "run.json", split, run.root / poison.LIST, kept / versions.CARD], read


@pytest.fixture
def model(saved_tagger):  # noqa: F811
    """A model with damaged files under a card that has the hashes of just these files."""
    card = saved_tagger / "tagger.json"
    named = json.loads(card.read_text())

    def read():
        for name in named["sha256"]:
            named["sha256"][name] = digest(saved_tagger / name)
        card.write_text(json.dumps(named))
        tagged(Tagger.load(saved_tagger))

    return [saved_tagger / name for name in named["sha256"]], read


@pytest.fixture
def card(saved_tagger):  # noqa: F811
    return [saved_tagger / "tagger.json"], lambda: tagged(Tagger.load(saved_tagger))


COUNTS = [500, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]


def attack(count, files, read):
    """Damage one of `files`, read, and put it back, `count` times; how often it was read or refused."""
    whole = {path: path.read_bytes() for path in files}
    read()  # compiles what it needs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = {"read": 0, "refused": 0}
    for seed in range(count):
        draw = random.Random(seed)
        path = draw.choice(files)
        path.write_bytes(damaged(draw, whole[path]))
        began = time.process_time()
        try:
            read()
            outcomes["read"] += 1
        except (TagmillError, OSError) as error:
            line = one_line(translated(error))
            assert "\n" not in line and len(line) < 4000 and line.isprintable(), f"{seed}: {line[:500]}"
            outcomes["refused"] += 1
        except Exception as error:
            error.add_note(f"{path.name}, seed {seed}: {path.read_bytes()[:1000]!r}")
            raise
        assert time.process_time() - began < SECONDS, f"{path.name}, seed {seed}"
        path.write_bytes(whole[path])
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY
    return outcomes


@pytest.mark.parametrize("count", COUNTS)
def test_documents(documents, count):
    assert attack(count, *documents)["read"]  # of Parquet hardly any


@pytest.mark.parametrize("count", COUNTS)
def test_settings(settings_file, count):
    assert min(attack(count, *settings_file).values()) > count / 50


@pytest.mark.parametrize("count", COUNTS)
def test_rules_and_hierarchy(rules_file, count):
    assert min(attack(count, *rules_file).values()) > count / 20


@pytest.mark.parametrize("count", COUNTS)
def test_files_of_a_run(run_folder, count):
    attack(count, *run_folder)


@pytest.mark.parametrize("count", COUNTS)
def test_files_of_a_model(model, count):
    assert min(attack(count, *model).values()) > count / 20


@pytest.mark.parametrize("count", COUNTS)
def test_the_card_of_a_model(card, count):
    attack(count, *card)
