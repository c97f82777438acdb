import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.learners import relations as module
from pipeline.learners.relations import CHANCE, LEAST, columns, pairs, relations
from pipeline.tables import TABLES


def told(Y, parts=1, order=None):
    """Rows (label_id, other_id, kind, documents) by the library, from as many parts."""
    Y = np.asarray(Y, bool)
    Y = Y if order is None else Y[order]
    known = columns(Y.sum(axis=0), len(Y))
    total, needed = {}, {}
    for part in np.array_split(Y, parts):
        row, label_id = np.nonzero(part)
        for batch in pairs(row.astype(np.int64), label_id.astype(np.int32), len(part), known):
            for pair in batch.to_pylist():
                key = pair["label"], pair["other"]
                total[key] = total.get(key, 0) + pair["documents"]
                needed[key] = pair["needed"]
    held = [key for key in total if total[key] == needed[key]]
    found = pa.table(
        {"label": pa.array([a for a, _ in held], pa.int64()), "other": pa.array([b for _, b in held], pa.int64())}
    )
    names = [f"label {j}" for j in range(Y.shape[1])]
    table = relations(found, known, names)
    assert table.schema == TABLES["label_relations"].schema
    for r in table.to_pylist():
        assert (r["label"], r["other"]) == (names[r["label_id"]], names[r["other_id"]])
    return [(r["label_id"], r["other_id"], r["kind"], r["documents"]) for r in table.to_pylist()]


def told_slowly(Y):
    Y = np.asarray(Y, bool)
    n, found = len(Y), []
    for a in range(Y.shape[1]):
        for b in range(Y.shape[1]):
            one, other = Y[:, a], Y[:, b]
            if a == b or one.sum() < LEAST or other.sum() < LEAST:
                continue
            if (one == other).all():
                found += [(a, b, "same", one.sum())] * (a < b)
            elif (one <= other).all() and (other.sum() / n) ** one.sum() < CHANCE:
                found.append((a, b, "implies", one.sum()))
            elif (one != other).all():
                found += [(a, b, "excludes", one.sum())] * (a < b)
    return sorted(found)


@st.composite
def gold(draw):
    """Labels that are drawn, or made of earlier ones: copies, parts, complements."""
    n = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    Y = [rng.random(n) < draw(st.sampled_from([0.1, 0.3, 0.5, 1.0]))]
    for _ in range(draw(st.integers(0, 7))):
        earlier = Y[draw(st.integers(0, len(Y) - 1))]
        made = {
            "new": rng.random(n) < 0.4,
            "copy": earlier,
            "part": earlier & (rng.random(n) < 0.7),
            "complement": ~earlier,
            "nearly": earlier ^ (np.arange(n) == rng.integers(n)),
            "none": np.zeros(n, bool),
        }
        Y.append(made[draw(st.sampled_from(sorted(made)))])
    return np.array(Y).T


@given(gold(), st.integers(1, 6), st.sampled_from([1, 40, 4_000_000]))
@settings(deadline=None, max_examples=200)
def test_relations_are_those_of_all_pairs_whatever_the_parts(Y, parts, at_once):
    before = module.PAIRS
    module.PAIRS = at_once
    try:
        order = np.random.default_rng(len(Y)).permutation(len(Y))
        assert told(Y, parts, order) == told_slowly(Y)
    finally:
        module.PAIRS = before


def test_a_part_without_documents_or_labels():
    known = columns(np.array([20, 30]), 50)
    none = np.empty(0, np.int64)
    assert list(pairs(none, none.astype(np.int32), 0, known)) == []
    known = columns(np.array([], np.int64), 5)
    assert list(pairs(none, none.astype(np.int32), 5, known)) == []


@pytest.mark.parametrize(("support", "expected"), [(LEAST - 1, []), (LEAST, [(0, 1, "implies", LEAST)])])
def test_few_documents_are_chance(support, expected):
    Y = np.zeros((200, 2), bool)
    Y[:support, 0] = Y[:40, 1] = True
    assert told(Y) == expected


def test_a_label_that_nearly_all_documents_carry_is_implied_by_none():
    Y = np.ones((200, 3), bool)
    Y[40:, 0] = False
    Y[199, 2] = False
    assert told(Y) == []


def test_one_of_two_stands_once():
    Y = np.zeros((40, 3), bool)
    Y[:25, 0] = Y[25:, 1] = Y[:5, 2] = True
    assert told(Y) == [(0, 1, "excludes", 25)]
    Y[39, 1] = False  # a document with neither
    assert told(Y) == []
    half = np.arange(40) % 2 == 0
    assert told(np.array([half, ~half]).T, parts=3) == [(0, 1, "excludes", 20)]
