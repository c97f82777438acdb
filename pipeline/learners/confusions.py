"""Which label is tagged instead of which: pairs of errors in the same document.

A document that misses label a and wrongly carries label b adds one to the pair (a, b).  Multi-label errors have no
confusion matrix; how often two errors fall together, against how often they would by chance, is what takes its place.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.tables import TABLES

MOST_PAIRS = 1_000  # of one document; one with more says nothing about what stands for what
INSTEAD = 10  # rows a label
REMEMBERED = 20_000_000  # distinct pairs held; beyond that, pairs seen once are dropped


class Pairs(NamedTuple):
    """Pairs as missed x L + wrong, ascending, and in how many documents each is."""

    key: NDArray[np.int64]
    documents: NDArray[np.int64]


def error_pairs(documents: pa.Table, n_labels: int) -> Pairs:
    """Pairs of rows of the table `test_documents`; documents with more than MOST_PAIRS pairs are left out."""
    (gold_row, gold), (tag_row, tag) = (_pairs(documents[name]) for name in ("gold", "tags"))
    known, said = gold_row * n_labels + gold, tag_row * n_labels + tag
    missed = known[~np.isin(known, said, assume_unique=True)]
    wrong = said[~np.isin(said, known, assume_unique=True)]
    n = documents.num_rows
    misses, wrongs = (np.bincount(keys // n_labels, minlength=n) for keys in (missed, wrong))
    # every missed label of a document with every wrong tag of it, without a loop over documents
    row = missed // n_labels
    each = np.where(misses * wrongs > MOST_PAIRS, 0, wrongs)[row]
    first = (np.cumsum(wrongs) - wrongs)[row]
    place = np.arange(each.sum()) - np.repeat(np.cumsum(each) - each, each) + np.repeat(first, each)
    found = np.repeat(missed % n_labels, each) * n_labels + wrong[place] % n_labels
    return Pairs(*np.unique(found, return_counts=True))


def added(a: Pairs, b: Pairs) -> Pairs:
    """Both together.  Where there are too many, those that were seen once go (lossy counting, Manku, Motwani 2002)."""
    key, place = np.unique(np.concatenate([a.key, b.key]), return_inverse=True)
    documents = np.bincount(place, np.concatenate([a.documents, b.documents]), key.size).astype(np.int64)
    often = documents > (key.size > REMEMBERED)
    return Pairs(key[often], documents[often])


def table(pairs: Pairs, names: list[str], fp: NDArray, fn: NDArray, n: int) -> pa.Table:
    """The table `confusions`: pairs seen twice or more, and more often than by chance; INSTEAD rows a label at most.

    fp, fn (L,): errors of each label in n documents; by chance a pair is in fn[missed] x fp[wrong] / n of them.
    """
    label, instead = np.divmod(pairs.key, len(names))
    expected = np.asarray(fn, float)[label] * np.asarray(fp, float)[instead] / max(n, 1)
    kept = np.flatnonzero((pairs.documents >= 2) & (pairs.documents > expected))
    # the most frequent first within a label, then the least expected
    order = kept[np.lexsort((instead[kept], expected[kept], -pairs.documents[kept], label[kept]))]
    first = np.searchsorted(label[order], label[order])
    order = np.sort(order[np.arange(order.size) - first < INSTEAD])
    columns = {
        "label_id": label[order].astype(np.int32),
        "label": pa.array([names[j] for j in label[order]], pa.string()),
        "instead_id": instead[order].astype(np.int32),
        "instead": pa.array([names[j] for j in instead[order]], pa.string()),
        "documents": pairs.documents[order],
        "expected": expected[order],
    }
    return pa.table(columns, schema=TABLES["confusions"].schema)


def _pairs(lists):
    """(row, label id) of a column of lists."""
    lists = lists.combine_chunks()
    lengths = pc.list_value_length(lists).to_numpy()
    return np.repeat(np.arange(len(lengths)), lengths), lists.flatten().to_numpy().astype(np.int64)
