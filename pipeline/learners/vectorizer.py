"""Text -> TF-IDF rows, by a vocabulary of hashed terms."""

import itertools
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.kernels import text

BATCH_BYTES = 16 << 20  # text that is tokenised at once


class Vocabulary(NamedTuple):
    """Known terms: `hashes` ascending, `ids` the feature of each, `idf` by feature."""

    hashes: np.ndarray  # (d,) uint64
    ids: np.ndarray  # (d,) int32
    idf: np.ndarray  # (d,) float64

    @classmethod
    def from_table(cls, vocabulary: pa.Table) -> "Vocabulary":
        """From the columns hash, feature_id and idf of the table `vocabulary`."""
        hashes = vocabulary["hash"].to_numpy().view(np.uint64)
        order = np.argsort(hashes)
        ids = vocabulary["feature_id"].to_numpy()
        idf = np.empty(len(ids))
        idf[ids] = vocabulary["idf"].to_numpy()
        return cls(hashes[order], ids[order].astype(np.int32), idf)

    def lookup(self, hashes: np.ndarray) -> np.ndarray:
        """Feature of each hash, int32, -1 where it is unknown."""
        if self.hashes.size == 0:
            return np.full(hashes.size, -1, np.int32)
        at = np.minimum(np.searchsorted(self.hashes, hashes), self.hashes.size - 1)
        return np.where(self.hashes[at] == hashes, self.ids[at], -1).astype(np.int32)


def lower_bytes(texts: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Lower-case UTF-8 of n texts: data (bytes,) uint8 with at least one byte, offsets (n + 1,) int64."""
    lowered = pc.utf8_lower(texts.cast(pa.large_string()))
    _, offsets, data = lowered.buffers()
    offsets = np.frombuffer(offsets, np.int64)[lowered.offset : lowered.offset + len(lowered) + 1]
    return np.frombuffer(data, np.uint8) if data is not None and data.size else np.zeros(1, np.uint8), offsets


def tokens_of(texts: pa.Array, ngrams: int):
    """Lower-case `texts` and find their terms.  Returns the bytes and what `kernels.text.tokenize` gives."""
    data, offsets = lower_bytes(texts)
    return data, text.tokenize(data, offsets, text.word_characters(), ngrams)


def count_documents(texts: pa.Array, ngrams: int) -> pa.Table:
    """Distinct terms of a batch of documents: hash int64, df int64, term string (one occurrence, lower-case)."""
    data, (indptr, hashes, starts, lengths) = tokens_of(texts, ngrams)
    _, unique, _, where = text.count_terms(indptr, hashes)
    seen, first, df = np.unique(unique, return_index=True, return_counts=True)
    at = where[first]
    terms = [bytes(data[s : s + n]).decode() for s, n in zip(starts[at], lengths[at], strict=True)]
    if ngrams > 1:  # what stands between two tokens is no part of the term
        words = text.word_characters()
        terms = ["".join(c if words[ord(c)] else " " for c in term) for term in terms]
        terms = [" ".join(word for word in term.split() if len(word) > 1) for term in terms]
    return pa.table({"hash": seen.view(np.int64), "df": df.astype(np.int64), "term": pa.array(terms, pa.string())})


def vectorize(texts: pa.Array, vocabulary: Vocabulary, ngrams: int, sublinear: bool):
    """TF-IDF rows of a batch: indptr (n + 1,) int64, indices int32, values float32 (see `kernels.text.tfidf`)."""
    _, (indptr, hashes, _, _) = tokens_of(texts, ngrams)
    indptr, unique, counts, _ = text.count_terms(indptr, hashes)
    return text.tfidf(indptr, vocabulary.lookup(unique), counts, vocabulary.idf, sublinear)


def batches(table: pa.Table, column: str = "text"):
    """Slices of `table` with at most about 16 MB of text each, so that memory does not grow with the part."""
    lengths = pc.binary_length(table[column]).to_numpy().astype(np.int64)
    if lengths.size == 0:
        return
    group = (np.cumsum(lengths) - lengths) // BATCH_BYTES
    edges = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1, [lengths.size]])
    for start, stop in itertools.pairwise(edges):
        yield table.slice(start, stop - start).combine_chunks()


def one_array(column: pa.ChunkedArray) -> pa.Array:
    """The only chunk of a column whose table has been combined, or an empty array."""
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)
