"""Pairs of errors against two loops over documents."""

from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from pipeline.learners import confusions
from pipeline.tables import TABLES

L = 5
sets = st.lists(st.tuples(st.sets(st.integers(0, L - 1)), st.sets(st.integers(0, L - 1))), max_size=12)


def documents(pairs):
    n = len(pairs)
    gold, tags = ([sorted(pair[k]) for pair in pairs] for k in (0, 1))
    columns = [range(n), [f"d{i}" for i in range(n)], gold, tags, [[]] * n]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


schema = TABLES["test_documents"].schema


def obvious(pairs):
    return Counter((missed, wrong) for gold, tags in pairs for missed in gold - tags for wrong in tags - gold)


@given(sets)
@settings(deadline=None)
def test_pairs_are_those_of_two_loops(pairs):
    found = confusions.error_pairs(documents(pairs), L)
    assert {divmod(k, L): c for k, c in zip(found.key.tolist(), found.documents.tolist(), strict=True)} == obvious(
        pairs
    )
    assert_array_equal(found.key, np.sort(found.key))


@given(sets, st.integers(0, 12))
@settings(deadline=None)
def test_parts_add_to_the_whole(pairs, cut):
    parts = [confusions.error_pairs(documents(part), L) for part in (pairs[:cut], pairs[cut:])]
    for found, expected in zip(confusions.added(*parts), confusions.error_pairs(documents(pairs), L), strict=True):
        assert_array_equal(found, expected)


def test_a_document_of_errors_only_is_left_out(monkeypatch):
    monkeypatch.setattr(confusions, "MOST_PAIRS", 3)
    many, few = ({0, 1}, {2, 3}), ({0}, {2, 3, 4})
    assert confusions.error_pairs(documents([many, few]), L).documents.tolist() == [1, 1, 1]


def test_pairs_seen_once_go_where_memory_is_short(monkeypatch):
    monkeypatch.setattr(confusions, "REMEMBERED", 1)
    part = confusions.error_pairs(documents([({0}, {1})] * 2 + [({0}, {2})]), L)
    none = confusions.error_pairs(documents([]), L)
    assert confusions.added(part, none).key.tolist() == [1]


def test_the_table_has_what_is_more_than_chance(monkeypatch):
    monkeypatch.setattr(confusions, "INSTEAD", 1)
    pairs = confusions.error_pairs(documents([({0}, {1})] * 3 + [({0}, {2})] * 2 + [({3}, {4})] * 2 + [({3}, {1})]), L)
    fp, fn = np.array([0, 4, 2, 0, 100]), np.array([5, 0, 0, 100, 0])
    table = confusions.table(pairs, list("abcde"), fp, fn, 20)
    # (a, c) is the second of its label; (d, e) is less than 100 * 100 / 20; (d, b) was seen once
    assert table.to_pylist() == [
        {"label_id": 0, "label": "a", "instead_id": 1, "instead": "b", "documents": 3, "expected": 5 * 4 / 20}
    ]
    assert table.schema == TABLES["confusions"].schema
