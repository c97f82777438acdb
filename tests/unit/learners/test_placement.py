import numpy as np
import pytest

from pipeline.learners.placement import blocks, expected_cost, label_groups, matrix_bytes, worker_bytes
from tests.reference import least_makespan


def support_of(seed=0, labels=200):
    return np.random.default_rng(seed).zipf(1.5, labels).clip(0, 5000) - 1


@pytest.mark.parametrize("per_block", [1, 5, 16, 32])
def test_groups_are_labels_by_falling_support(per_block):
    support = support_of()
    groups = label_groups(support, per_block)
    order = [label for group in groups for label in group]
    assert sorted(order) == list(range(200))
    assert (np.diff(support[order]) <= 0).all()
    assert {len(group) for group in groups[:-1]} == {min(16, per_block)}


def test_groups_of_some_labels():
    assert label_groups(np.array([3, 9, 1, 9]), 16, only=[2, 0, 1]) == [[1, 0, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_blocks_hold_whole_groups_and_are_balanced(seed):
    rng = np.random.default_rng(seed)
    groups = [[2 * k, 2 * k + 1] for k in range(37)]
    costs = rng.exponential(size=37)
    found = blocks(groups, costs, 8)
    assert len(found) == 8
    cost_of = {tuple(group): cost for group, cost in zip(groups, costs, strict=True)}
    loads = []
    for block in found:
        pairs = [tuple(block[k : k + 2]) for k in range(0, len(block), 2)]
        loads.append(sum(cost_of.pop(pair) for pair in pairs))  # every group once, none cut
    assert not cost_of
    assert loads == sorted(loads, reverse=True)
    # a list schedule ends at most one group above the mean (Graham, 1969)
    assert loads[0] <= costs.sum() / 8 + costs.max() * (1 - 1 / 8) + 1e-9
    assert blocks(groups, costs, 8) == found


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_fullest_block_is_at_most_a_third_above_the_best_possible(seed, count):
    costs = np.random.default_rng(seed).choice([1.0, 2.0, 3.0, 5.0, 5.5], 9)
    found = blocks([[k] for k in range(9)], costs, count)
    best = least_makespan(costs, count)
    assert best <= max(costs[block].sum() for block in found) <= (4 / 3 - 1 / (3 * count)) * best + 1e-9


def test_the_bound_is_reached_where_graham_reaches_it():
    """5 5 4 4 3 3 3 on three blocks: the best is 9, longest first gives 11."""
    costs = np.array([5.0, 5, 4, 4, 3, 3, 3])
    assert least_makespan(costs, 3) == 9
    assert max(costs[block].sum() for block in blocks([[k] for k in range(7)], costs, 3)) == 11


def test_seconds_of_the_last_run_decide_the_blocks():
    """By support alone the frequent labels would stand apart; what the last run took says otherwise."""
    support = np.array([5000, 4000, 2, 1])
    groups = label_groups(support, 1)
    by_support, by_seconds = (
        blocks(groups, [expected_cost(support, group, known) for group in groups], 2)
        for known in (None, np.array([1.0, 1.0, 1.0, 9.0]))
    )
    assert {frozenset(block) for block in by_support} == {frozenset({0, 3}), frozenset({1, 2})}
    assert {frozenset(block) for block in by_seconds} == {frozenset({3}), frozenset({0, 1, 2})}


def test_more_blocks_than_groups_and_groups_that_cost_nothing():
    assert blocks([[0], [1]], [1.0, 2.0], 9) == [[1], [0]]
    assert sorted(map(len, blocks([[k] for k in range(6)], [0.0] * 6, 3))) == [2, 2, 2]
    assert blocks([], [], 3) == []


def test_frequent_labels_cost_more_and_labels_without_positives_nothing():
    support = np.array([5000, 100, 3, 0])
    costs = [expected_cost(support, [label]) for label in range(4)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0
    assert expected_cost(support, [0, 3]) > 0


def test_seconds_of_the_last_run_go_before_the_model():
    known = np.array([4.0, np.nan, 1.0, np.nan])
    support = np.array([1, 9, 9, 9])
    assert expected_cost(support, [0, 2], known) == 5.0
    assert expected_cost(support, [0, 1], known) == 8.0  # an unknown label as its neighbours
    assert expected_cost(support, [1, 3], known) == expected_cost(support, [1, 3])


def test_sizes_grow_with_what_they_hold():
    assert matrix_bytes(10, 200, 5) < matrix_bytes(10, 201, 5) < matrix_bytes(1000, 201, 500)
    base = worker_bytes(1000, 1000, 1)
    assert base < worker_bytes(2000, 1000, 1)
    assert base < worker_bytes(1000, 2000, 1)
    assert base < worker_bytes(1000, 1000, 2)
