from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from pipeline.kernels import hierarchy
from pipeline.kernels.hierarchy import CycleError, ancestor_closure, hierarchical_metrics, hierarchical_sums

ORDINARY = settings(deadline=None, max_examples=100)


def ancestors_of(node, edges):
    """Slow and obvious: parents, their parents, until nothing is new."""
    found = set()
    while True:
        more = {p for c, p in edges if c == node or c in found} - found
        if not more:
            return found
        found |= more


@st.composite
def graphs(draw, acyclic=True):
    n = draw(st.integers(1, 9))
    pairs = draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=16))
    if acyclic:
        rank = draw(st.permutations(range(n)))
        pairs = [(a, b) if rank[a] < rank[b] else (b, a) for a, b in pairs if a != b]
    return n, pairs


def closure_of(n, edges):
    return ancestor_closure(n, [c for c, _ in edges], [p for _, p in edges])


def csr(sets):
    return np.cumsum([0] + [len(s) for s in sets]), np.array([x for s in sets for x in sorted(s)], np.int64)


@ORDINARY
@given(graphs())
def test_closure_equals_brute_force(graph):
    n, edges = graph
    indptr, ancestors = closure_of(n, edges)
    assert indptr.dtype == ancestors.dtype == np.int64
    for node in range(n):
        assert ancestors[indptr[node] : indptr[node + 1]].tolist() == sorted(ancestors_of(node, edges))


@ORDINARY
@given(graphs(acyclic=False))
def test_a_cycle_is_named_along_its_edges(graph):
    n, edges = graph
    if not any(node in ancestors_of(node, edges) for node in range(n)):
        closure_of(n, edges)
        return
    with pytest.raises(ValueError, match="cycle: ") as caught:
        closure_of(n, edges)
    assert isinstance(caught.value, CycleError)
    nodes = caught.value.nodes
    assert nodes[0] == nodes[-1] and len(set(nodes)) == len(nodes) - 1
    assert all(edge in edges for edge in pairwise(nodes))


def test_no_edges_and_no_nodes():
    assert_array_equal(ancestor_closure(3, [], [])[0], [0, 0, 0, 0])
    assert_array_equal(ancestor_closure(0, [], [])[0], [0])


@pytest.mark.parametrize(("child", "parent"), [([0], [3]), ([-1], [0]), ([0, 1], [1])])
def test_edges_outside_the_nodes_are_refused(child, parent):
    with pytest.raises(ValueError, match="expected"):
        ancestor_closure(3, child, parent)


def test_a_closure_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(hierarchy, "MAX_PAIRS", 10)
    with pytest.raises(ValueError, match="more than 10 pairs"):
        ancestor_closure(9, range(8), range(1, 9))


@ORDINARY
@given(graphs(), st.data())
def test_sums_equal_sets(graph, data):
    n, edges = graph
    m = data.draw(st.integers(0, 4))
    tags, gold = (data.draw(st.lists(st.sets(st.integers(0, n - 1)), min_size=m, max_size=m)) for _ in range(2))
    sums = hierarchical_sums(*csr(tags), *csr(gold), *closure_of(n, edges))
    augmented = [[s | {a for x in s for a in ancestors_of(x, edges)} for s in sets] for sets in (tags, gold)]
    assert_array_equal(sums[0], [len(t & g) for t, g in zip(*augmented, strict=True)])
    assert_array_equal(sums[1], [len(t) for t in augmented[0]])
    assert_array_equal(sums[2], [len(g) for g in augmented[1]])


def test_without_edges_the_sums_are_plain_counts():
    sums = hierarchical_sums([0, 2, 2], [0, 1], [0, 1, 2], [1, 2], *ancestor_closure(3, [], []))
    assert [s.tolist() for s in sums] == [[1, 0], [2, 0], [1, 1]]


def test_a_sibling_is_half_right():
    # 0 and 1 under 2
    sums = hierarchical_sums([0, 1], [0], [0, 1], [1], *ancestor_closure(3, [0, 1], [2, 2]))
    assert hierarchical_metrics(*sums) == {
        "hierarchical_precision": 0.5,
        "hierarchical_recall": 0.5,
        "hierarchical_f1": 0.5,
    }


def test_metrics_are_micro_over_documents():
    figures = hierarchical_metrics([1, 3], [1, 9], [2, 3], if_undefined=0)
    assert figures["hierarchical_precision"] == 4 / 10
    assert figures["hierarchical_recall"] == 4 / 5
    assert figures["hierarchical_f1"] == 8 / 15
    assert set(hierarchical_metrics([0], [0], [0], if_undefined=1).values()) == {1.0}
    assert hierarchical_metrics([0], [0], [3], if_undefined=1)["hierarchical_recall"] == 0.0


@pytest.mark.parametrize(
    "wrong",
    [([0, 1], [3], [0, 0], []), ([0, 2], [0], [0, 0], []), ([0, 0], [], [0, 0, 0], []), ([1, 1], [0], [0, 0], [])],
)
def test_arrays_that_do_not_fit_are_refused(wrong):
    with pytest.raises(ValueError):
        hierarchical_sums(*wrong, *ancestor_closure(3, [], []))
