"""Texts on both sides of the split that are nearly the same.

test texts of all parts -> what is compared with;  + training texts of one part -> those that are like them
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.host import alone
from pipeline.kernels import similar, text
from pipeline.learners.vectorizer import batches, lower_bytes, one_array
from pipeline.tables import TABLES

FOUND_COLUMNS = "place bigint, similarity double, row bigint, doc_id string"
FOUND = pa.schema([("place", pa.int64()), ("similarity", pa.float64()), ("row", pa.int64()), ("doc_id", pa.string())])


class Shingled(NamedTuple):
    """Texts of at least three words."""

    rows: np.ndarray  # (n,) int64
    doc_ids: pa.Array  # (n,) string
    identity: np.ndarray  # (n,) uint64, equal for equal texts
    keys: np.ndarray  # (n, bands) uint64
    indptr: np.ndarray  # (n + 1,) int64
    hashes: np.ndarray  # (places,) uint64, in the order of the text, repetitions included


def shingled(documents: pa.Table, similarity: float) -> Iterator[Shingled]:
    """Batches of documents (row, doc_id, text); texts of fewer than three words are left out."""
    count, size = similar.bands(similarity)
    for batch in batches(documents):
        data, offsets = lower_bytes(one_array(batch["text"]))
        indptr, hashes = similar.shingles(data, offsets, text.word_characters())
        long = np.flatnonzero(np.diff(indptr))
        indptr = indptr[np.concatenate([long, [indptr.size - 1]])]  # a text that is left out has no places
        signature, identity = similar.signatures(indptr, hashes, similar.seeds())
        keys = similar.band_keys(signature, count, size)
        doc_ids = one_array(batch["doc_id"]).take(pa.array(long))
        yield Shingled(batch["row"].to_numpy()[long], doc_ids, identity, keys, indptr, hashes)


class Sets(NamedTuple):
    """Test texts, without their shingles."""

    rows: np.ndarray  # (n,) int64
    doc_ids: pa.Array  # (n,) string
    identity: np.ndarray  # (n,) uint64
    keys: np.ndarray  # (n, bands) uint64
    size: np.ndarray  # (n,) int64: distinct shingles


def shingle_sets(documents: pa.Table, similarity: float) -> tuple[Sets, np.ndarray]:
    """Test documents (row, doc_id, text) of one part, and their distinct shingles one text after the other, uint64."""
    parts, held = [], [np.empty(0, np.uint64)]
    for batch in shingled(documents, similarity):
        indptr, distinct = similar.sets(batch.indptr, batch.hashes)
        parts.append(Sets(batch.rows, batch.doc_ids, batch.identity, batch.keys, np.diff(indptr)))
        held.append(distinct)
    return joined(parts, similarity), np.concatenate(held)


class Compared(NamedTuple):
    """All test texts: what training texts are compared with."""

    rows: np.ndarray  # (n,) int64
    doc_ids: pa.Array  # (n,) string
    place: np.ndarray  # (n,) int64: texts with the same words share one
    known: similar.Known


def comparable(parts: list[Sets], similarity: float) -> Compared:
    """The test texts of all parts, in their order."""
    whole = joined(parts, similarity)
    known, place = similar.index(whole.identity, whole.keys, np.cumsum(whole.size) - whole.size, whole.size)
    return Compared(whole.rows, whole.doc_ids, place, known)


def nearest(documents: pa.Table, known: similar.Known, held: np.ndarray, similarity: float) -> pa.RecordBatch:
    """Training documents (row, doc_id, text) of one part -> of each place that one of them is like, the most similar.

    Columns place, similarity, row, doc_id; of equally similar ones the smallest row.
    """
    best = np.zeros(known.identity.size)
    best_row = np.full(known.identity.size, -1, np.int64)
    for batch in shingled(documents, similarity):
        similar.nearest(
            known, held, batch.indptr, batch.hashes, batch.identity, batch.keys, batch.rows, similarity, best, best_row
        )
    place = np.flatnonzero(best_row >= 0)
    row = best_row[place]
    at = np.searchsorted(documents["row"].to_numpy(), row)
    doc_ids = documents["doc_id"].take(pa.array(at)).combine_chunks()
    return pa.RecordBatch.from_arrays([place, best[place], row, doc_ids], schema=FOUND)


def near_duplicates(found: pa.Table, texts: Compared) -> pa.Table:
    """The table of that name from the most similar training document of each place (any order of rows)."""
    at = np.full(texts.known.identity.size, -1, np.int64)
    at[found["place"].to_numpy()] = np.arange(found.num_rows)
    alike = np.flatnonzero(at[texts.place] >= 0)
    other = found.take(pa.array(at[texts.place[alike]]))
    return pa.table(
        {
            "row": texts.rows[alike],
            "doc_id": texts.doc_ids.take(pa.array(alike)),
            "other_row": other["row"],
            "other_doc_id": other["doc_id"],
            "similarity": other["similarity"],
        },
        schema=TABLES["near_duplicates"].schema,
    )


@functools.cache
def warm_up(lock_folder: Path) -> None:
    """Have every kernel compiled, or read from numba's cache, once a process; one process of a host compiles."""
    documents = pa.table({"row": [0, 1], "doc_id": ["a", "b"], "text": ["one two three", "one two three four"]})
    with alone(lock_folder / "compile.lock"):
        sets, held = shingle_sets(documents, 0.5)
        held.setflags(write=False)  # as one that is mapped: numba compiles for either kind apart
        nearest(documents, comparable([sets], 0.5).known, held, 0.5)


def joined(parts: list[Sets], similarity: float) -> Sets:
    """Sets of several batches as one."""
    none = np.empty(0, np.int64)
    no_keys = np.empty((0, similar.bands(similarity)[0]), np.uint64)
    empty = Sets(none, pa.array([], pa.string()), none.astype(np.uint64), no_keys, none)
    rows, doc_ids, identity, keys, size = zip(empty, *parts, strict=True)
    return Sets(
        np.concatenate(rows),
        pa.concat_arrays(doc_ids),
        np.concatenate(identity),
        np.concatenate(keys),
        np.concatenate(size),
    )
