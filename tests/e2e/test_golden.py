"""The same documents, one answer: whatever the number of parts, files, workers, rows at once, and the environment.

A fit for each row of a covering array: every value of a factor meets every value of every other one.
"""

import csv
import gzip
import itertools
import json
import os
import random
import signal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.tag import tag
from pipeline import config
from pipeline.tables import TABLES
from tests.chaos import checker
from tests.chaos.__main__ import SETS, Fit, Local, corpus
from tests.conftest import SMALL

FACTORS = {
    "partitions": (1, 2, 4, 7),
    "order": ("given", "reversed"),
    "files": ("one", "five", "kinds"),
    "batch": (1, 7, 64, 999),
    "master": ("local[1]", "local[2]", "local[4]"),
    "environment": (
        {},
        {"PYTHONHASHSEED": "0", "LC_ALL": "C"},
        {"PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8", "TZ": "Pacific/Kiritimati"},
        {"PYTHONHASHSEED": "4242", "LC_ALL": "POSIX", "TZ": "America/St_Johns"},
        {"PYTHONHASHSEED": "77", "OMP_NUM_THREADS": "4", "OPENBLAS_NUM_THREADS": "3"},
    ),
}


def covering(factors, seed=0):
    """Rows, one value of each factor in each, such that any two values of two factors stand in one of them."""

    def pairs(row):
        return set(itertools.combinations(enumerate(row), 2))

    draw = random.Random(seed)
    numbers = [range(len(values)) for values in factors.values()]
    missing = set().union(*map(pairs, itertools.product(*numbers)))
    rows = []
    while missing:
        wanted = dict(min(missing))  # and the rest as it comes
        drawn = [[wanted.get(k, draw.choice(values)) for k, values in enumerate(numbers)] for _ in range(100)]
        rows.append(max(drawn, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return [dict(zip(factors, map(tuple.__getitem__, factors.values(), row), strict=True)) for row in rows]


# two values of each, as far apart as they are
FEW = {name: (values[0], values[-1]) for name, values in FACTORS.items()}


@pytest.mark.parametrize(("factors", "most"), [(FEW, 8), (FACTORS, 25)])
def test_the_rows_hold_every_pair(factors, most):
    rows = covering(factors)
    for (one, first), (other, second) in itertools.combinations(factors.items(), 2):
        for a, b in itertools.product(first, second):
            assert any(row[one] == a and row[other] == b for row in rows), (one, a, other, b)
    assert len(rows) <= most


def write(folder, documents, order, files):
    """The documents in files; which document is in which one depends on the order too."""
    documents = documents[::-1] if order == "reversed" else documents
    folder.mkdir()
    step = {"one": len(documents), "five": -(-len(documents) // 5), "kinds": -(-len(documents) // 3)}[files]
    for number, start in enumerate(range(0, len(documents), step)):
        part = documents[start : start + step]
        if files == "kinds" and number == 0:
            pq.write_table(pa.Table.from_pylist(part), folder / "a.parquet", row_group_size=7)
        elif files == "kinds" and number == 1:
            with gzip.open(folder / "b.csv.gz", "wt", newline="") as sink:
                lines = csv.writer(sink)
                lines.writerow(part[0])
                lines.writerows([(d["doc_id"], d["text"], "|".join(d["labels"])) for d in part])
        else:
            (folder / f"{number}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in part))
    return folder


@pytest.fixture(scope="module")
def documents(memory):
    folder = memory / "golden"
    folder.mkdir()
    corpus(folder, 200, 12)
    lines = (folder / "documents.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines if line.startswith('{"doc_id": "d')]
    assert len(found) == 200
    return folder, found


def fitted(folder, name, row, documents):
    """Run the command; its run folder and its input."""
    place = Local()
    place.master, place.environment = row["master"], row["environment"]
    place.sets = ("spark.driver_memory=1g", f"spark.partitions={row['partitions']}",
                  f'spark.options.spark.sql.execution.arrow.maxRecordsPerBatch="{row["batch"]}"')  # fmt: skip
    source = write(folder / f"in-{name}", documents, row["order"], row["files"])
    fit = Fit(folder, folder / name, place, source=source)
    try:
        assert fit.process.wait(500) == 0, fit.said()
    finally:
        if fit.process.poll() is None:
            os.killpg(fit.process.pid, signal.SIGKILL)
    return folder / name, source


def tags(spark, run, source, row, output):
    """Tags by document of a run, from as many parts, the same files and as many rows at once."""
    cfg, _ = config.load(sets=[*SMALL, *SETS, f"spark.partitions={row['partitions']}"])
    at_once = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(at_once)
    spark.conf.set(at_once, str(row["batch"]))
    try:
        tag(str(run), None, str(source), str(output), cfg)
    finally:
        spark.conf.set(at_once, before)
    parts = [pq.read_table(path).cast(TABLES["tags"].schema) for path in sorted(output.glob("*.parquet"))]
    return pa.concat_tables(parts).sort_by("doc_id").combine_chunks()


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "factors",
    [pytest.param(FEW, marks=pytest.mark.slow, id="few"), pytest.param(FACTORS, marks=pytest.mark.chaos, id="all")],
)
def test_every_pair_of_circumstances_gives_the_same_bytes(spark, documents, factors):
    folder, found = documents
    golden, answer = None, None
    for number, row in enumerate(covering(factors)):
        run, source = fitted(folder, f"{len(factors['batch'])}-{number}", row, found)
        prints = checker.prints(run)
        assert prints == (golden := golden or prints), row
        tagged = tags(spark, run, source, row, folder / f"tags-{len(factors['batch'])}-{number}")
        answer = answer or tagged
        assert tagged.equals(answer), row
        assert tagged.num_rows == 200
