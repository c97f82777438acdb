"""Texts of one part -> shingles and band keys; test texts of all parts -> what training texts are compared with."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.kernels import similar, text
from pipeline.learners.vectorizer import batches, one_array


class Shingled(NamedTuple):
    """Texts of at least three words."""

    rows: np.ndarray  # (n,) int64
    identity: np.ndarray  # (n,) uint64, equal for equal texts
    keys: np.ndarray  # (n, bands) uint64
    indptr: np.ndarray  # (n + 1,) int64
    hashes: np.ndarray  # (places,) uint64, in the order of the text, repetitions included


def shingled(documents: pa.Table, similarity: float) -> Iterator[Shingled]:
    """Batches of documents (row, text); texts of fewer than three words are left out."""
    count, size = similar.bands(similarity)
    for batch in batches(documents):
        lowered = pc.utf8_lower(one_array(batch["text"]).cast(pa.large_string()))
        _, offsets, data = lowered.buffers()
        offsets = np.frombuffer(offsets, np.int64)[lowered.offset : lowered.offset + len(lowered) + 1]
        data = np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(1, np.uint8)
        indptr, hashes = similar.shingles(data, offsets, text.word_characters())
        long = np.flatnonzero(np.diff(indptr))
        indptr = indptr[np.concatenate([long, [indptr.size - 1]])]  # a text that is left out has no places
        signature, identity = similar.signatures(indptr, hashes, similar.seeds())
        yield Shingled(
            batch["row"].to_numpy()[long], identity, similar.band_keys(signature, count, size), indptr, hashes
        )


class Sets(NamedTuple):
    """The test texts of one part, without their shingles."""

    rows: np.ndarray  # (n,) int64
    identity: np.ndarray  # (n,) uint64
    keys: np.ndarray  # (n, bands) uint64
    size: np.ndarray  # (n,) int64: distinct shingles


def shingle_sets(documents: pa.Table, similarity: float) -> tuple[Sets, np.ndarray]:
    """Test documents (row, text) of one part, and their distinct shingles one text after the other, uint64."""
    parts, held = [_no_sets(similarity)], [np.empty(0, np.uint64)]
    for batch in shingled(documents, similarity):
        indptr, distinct = similar.sets(batch.indptr, batch.hashes)
        parts.append(Sets(batch.rows, batch.identity, batch.keys, np.diff(indptr)))
        held.append(distinct)
    return _joined(parts), np.concatenate(held)


class Compared(NamedTuple):
    """All test texts: what training texts are compared with."""

    rows: np.ndarray  # (n,) int64
    place: np.ndarray  # (n,) int64: texts with the same words share one
    known: similar.Found


def comparable(parts: list[Sets], similarity: float) -> Compared:
    """The test texts of all parts, in their order."""
    whole = _joined([_no_sets(similarity), *parts])
    known, place = similar.index(whole.identity, whole.keys, np.cumsum(whole.size) - whole.size, whole.size)
    return Compared(whole.rows, place, known)


def nearest(documents: pa.Table, known: similar.Found, held: np.ndarray, similarity: float):
    """Training documents (row, text) of one part -> places of test texts that they are like, similarity, row."""
    best = np.zeros(known.identity.size)
    best_row = np.full(known.identity.size, -1, np.int64)
    for batch in shingled(documents, similarity):
        similar.nearest(
            known, held, batch.indptr, batch.hashes, batch.identity, batch.keys, batch.rows, similarity, best, best_row
        )
    found = np.flatnonzero(best_row >= 0)
    return found, best[found], best_row[found]


def merged(parts, texts: Compared) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `nearest` gave for each part -> test rows, ascending, the training row each is most like, similarity.

    Of equally similar ones the smallest row.
    """
    best = np.zeros(texts.known.identity.size)
    best_row = np.full(best.size, -1, np.int64)
    for place, similarity, row in parts:
        better = (similarity > best[place]) | ((similarity == best[place]) & (row < best_row[place]))
        best[place[better]], best_row[place[better]] = similarity[better], row[better]
    found = np.flatnonzero(best_row[texts.place] >= 0)
    place = texts.place[found]
    return texts.rows[found], best_row[place], best[place]


def _joined(parts):
    return Sets(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _no_sets(similarity):
    none, bands = np.empty(0, np.int64), similar.bands(similarity)[0]
    return Sets(none, none.astype(np.uint64), np.empty((0, bands), np.uint64), none)
