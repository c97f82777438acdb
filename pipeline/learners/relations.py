"""Labels of documents -> labels that hang together: the same documents, always with another one, exactly one of two.

A label counts from ten documents on: what fewer of them share is chance.  For the same reason a label implies another
one only where independent labels would do so with a probability below one in a million; that leaves out a label that
(nearly) every document carries.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from scipy import sparse

from pipeline.tables import TABLES

LEAST = 10  # documents of a label
CHANCE = 1e-6  # of independent labels, below which one is said to imply another
PAIRS = 4_000_000  # of labels that are counted at once; 16 bytes each

PAIR_COLUMNS = "label bigint, other bigint, documents bigint, needed bigint"


class Columns(NamedTuple):
    """What is counted beside each other: labels, and after them what some of them leave out.

    The documents without a label are a column where some label is on exactly as many: if they are the same ones, every
    document carries exactly one of the two.
    """

    size: np.ndarray  # (L + complements,) int64: documents
    of: np.ndarray  # (complements,) int64: the label that is left out
    documents: int

    @property
    def labels(self) -> int:
        return self.size.size - self.of.size


def columns(support: np.ndarray, documents: int) -> Columns:
    """Columns for labels with `support` (L,) among so many documents."""
    support = np.asarray(support, np.int64)
    left = documents - support
    # of two such labels at least one is on half of the documents: these are few
    wanted = (support >= LEAST) & (left >= LEAST) & (left <= support) & np.isin(left, support)
    of = np.flatnonzero(wanted)
    return Columns(np.concatenate([support, left[of]]), of, documents)


def pairs(row: np.ndarray, label_id: np.ndarray, documents: int, known: Columns) -> Iterator[pa.RecordBatch]:
    """Pairs (label, other) of which every document here with the first carries the second, and how many these are.

    Args:
        row, label_id: (assignments,); rows count from 0 within the part.
        documents: of the part.

    `needed` is how many the documents of all parts must be: the support of `label`.
    """
    counted = known.size[label_id] >= LEAST
    row, label_id = row[counted], label_id[counted]
    absent = [np.setdiff1d(np.arange(documents), row[label_id == a]) for a in known.of]
    beside = np.repeat(known.labels + np.arange(known.of.size), [rows.size for rows in absent])
    row, label_id = np.concatenate([row, *absent]), np.concatenate([label_id, beside])
    shape = (documents, known.size.size)
    Y = sparse.csc_array((np.ones(row.size, np.int32), (row, label_id)), shape=shape)
    by_document = Y.tocsr()
    here = np.diff(Y.indptr)
    # pairs that a label makes: with every label of every document of it
    work = np.bincount(
        np.repeat(np.arange(known.size.size), here), np.diff(by_document.indptr)[Y.indices], known.size.size
    )[: known.labels]
    group = (np.cumsum(work) // PAIRS).astype(np.int64)
    edges = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1, [known.labels]])
    for start, stop in itertools.pairwise(edges):
        together = sparse.coo_array(Y[:, start:stop].T @ by_document)
        label, other = together.coords[0].astype(np.int64) + start, together.coords[1].astype(np.int64)
        always = (together.data == here[label]) & (label != other) & _possible(label, other, known)
        if always.any():
            label, other = label[always], other[always]
            yield pa.RecordBatch.from_arrays(
                [pa.array(x, pa.int64()) for x in (label, other, together.data[always], known.size[label])],
                names=["label", "other", "documents", "needed"],
            )


def _possible(label, other, known):
    """Whether such a pair would be told: what cannot hold, or may well be chance, is not counted at all."""
    own, larger = known.size[label], known.size[other]
    # (share of `other`) ^ (documents of `label`), which independent draws hardly exceed
    by_chance = own * np.log(larger / known.documents)
    implied = (other < known.labels) & ((own == larger) | ((own < larger) & (by_chance < np.log(CHANCE))))
    return implied | ((other >= known.labels) & (own == larger))


def relations(found: pa.Table, known: Columns, names: list[str]) -> pa.Table:
    """Pairs that hold in every part (label, other) -> the table `label_relations`.

    `same` and `excludes` stand once, at the smaller label_id.
    """
    label, other = found["label"].to_numpy(), found["other"].to_numpy()
    excluded = other >= known.labels
    kind = np.where(excluded, "excludes", np.where(known.size[label] == known.size[other], "same", "implies"))
    other = np.concatenate([np.arange(known.labels), known.of])[other]  # of a column the label
    mutual = kind != "implies"
    label, other = (
        np.where(mutual, np.minimum(label, other), label),
        np.where(mutual, np.maximum(label, other), other),
    )
    told = sorted(set(zip(label.tolist(), other.tolist(), kind.tolist(), strict=True)))
    return pa.table(
        {
            "label_id": [a for a, _, _ in told],
            "label": [names[a] for a, _, _ in told],
            "other_id": [b for _, b, _ in told],
            "other": [names[b] for _, b, _ in told],
            "kind": [kind for _, _, kind in told],
            "documents": [int(known.size[a]) for a, _, _ in told],
        },
        schema=TABLES["label_relations"].schema,
    )
