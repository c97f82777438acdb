"""One Spark task per part: the wiring that all stages share."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.learners.document_rules import DocumentRule
from pipeline.learners.label_rules import parsed
from pipeline.storage import explained
from pipeline.store import Run


class Outcome(NamedTuple):
    """What a stage hands to the manifest: its files by table, and facts worth keeping."""

    tables: dict[str, list[dict]]
    facts: dict[str, Any]


def run_tasks(spark, what: str, function: Callable[[Any], Any], tasks: Sequence[Any]) -> list[Any]:
    """function(task) for every task, each as one Spark task; results in the order of the tasks.

    Tasks and results are small (paths, numbers, manifest entries); rows travel through files.
    """
    if not tasks:
        return []
    context = spark.sparkContext
    context.setJobDescription(what)
    numbered = context.parallelize(list(enumerate(tasks)), len(tasks))
    done = numbered.map(lambda task: (task[0], function(task[1]))).collect()
    return [result for _, result in sorted(done, key=lambda pair: pair[0])]


def map_tasks(spark, tasks: Sequence[Any], function: Callable[[Any], Iterator[pa.RecordBatch]], schema: str):
    """A DataFrame of the record batches that function(task) yields, one partition a task.

    The source is a range of numbers, which Spark makes without a Python process of its own.
    """

    def run(batches):
        for batch in batches:
            for number in batch.column(0).to_pylist():
                yield from function(tasks[number])

    return spark.range(0, len(tasks), 1, max(1, len(tasks))).mapInArrow(run, schema)


def rules_of(run: Run, verify: bool = False) -> dict:
    """The rules between labels that the run keeps; empty where there are none."""
    if "rules.json" not in run.finished("calibrate")["tables"]:  # a run of before
        return {}
    [path] = run.files("rules.json", verify)
    with explained(path, "read"):
        return parsed(path.read_bytes(), path)


def decision_of(run: Run, verify: bool = False) -> DocumentRule:
    """How the run chooses the tags of a document; by thresholds alone where it says nothing."""
    if "decision.json" not in run.finished("calibrate")["tables"]:  # a run of before
        return DocumentRule()
    [path] = run.files("decision.json", verify)
    with explained(path, "read"):
        return DocumentRule.parsed(path.read_bytes(), path)


def hashes(values: pa.Array | pa.ChunkedArray, seed: str) -> np.ndarray:
    """64-bit hash of each string, uint64; another seed gives an independent hash (BLAKE2b, keyed)."""
    key = seed.encode()
    digests = (hashlib.blake2b(v.encode(), digest_size=8, key=key).digest() for v in values.to_pylist())
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def share(hashed: np.ndarray) -> np.ndarray:
    """Hashes as numbers in [0, 1)."""
    return (hashed >> np.uint64(11)) * 2.0**-53
