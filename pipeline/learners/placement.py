"""Which labels are solved together, which groups share a task, and what a host needs for it.

Groups of sixteen labels of similar support decide the bits of a model and depend on the data alone.  Blocks, the tasks,
are made of whole groups and may follow what the last run learned about their cost.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from pipeline.kernels.simd import LANES
from pipeline.learners.ovr import groups

MAPPED = 8  # bytes of a non-zero of the matrix: its feature and its value
PROCESS = 280_000_000  # bytes of a Python worker with its imports and compiled kernels


def label_groups(support: np.ndarray, labels_per_block: int, only: Sequence[int] | None = None) -> list[list[int]]:
    """Labels, or some of them, by falling support, sixteen by sixteen (fewer where a block is to hold fewer)."""
    order = np.argsort(-support, kind="stable")
    if only is not None:
        order = order[np.isin(order, np.asarray(only))]
    return groups(order.tolist(), labels_per_block)


def expected_cost(support: np.ndarray, group: Sequence[int], known: np.ndarray | None = None) -> float:
    """Expected seconds of a group relative to one of very rare labels, or those that the last run took.

    All groups stream the same matrix; what differs is how many rows keep moving, which grows with the logarithm of the
    positives (measured on 51,000 long documents: 110 ms for support 1, 165 for 29, 200 for 157, 310 for 792).

    Args:
        known (L,): seconds of each label in an earlier run, NaN where it has none.
    """
    positives = support[list(group)]
    if known is not None:
        seconds = known[list(group)]
        if np.isfinite(seconds).any():
            return float(np.nanmean(seconds) * len(group))
    if positives.max(initial=0) == 0:
        return 0.0
    return float(1 + 0.12 * np.log2(1 + positives.mean()) + 0.02 * np.sqrt(positives.mean()))


def blocks(label_groups: list[list[int]], costs: Sequence[float], count: int) -> list[list[int]]:
    """Label ids of `count` blocks (fewer where there are fewer groups), dearest first, of about equal cost.

    Longest processing time first (Graham, 1969): the next dearest group goes to the cheapest block so far.
    """
    count = max(1, min(count, len(label_groups)))
    heap: list[tuple[float, int, int]] = [(0.0, 0, number) for number in range(count)]
    held: list[list[list[int]]] = [[] for _ in range(count)]
    total = [0.0] * count
    for cost, group in sorted(zip(costs, label_groups, strict=True), key=lambda pair: -pair[0]):
        _, size, number = heapq.heappop(heap)
        held[number].append(group)
        total[number] += cost
        heapq.heappush(heap, (total[number], size + len(group), number))
    order = sorted(range(count), key=lambda number: -total[number])
    return [[label for group in held[number] for label in group] for number in order if held[number]]


def matrix_bytes(rows: int, nonzeros: int, assignments: int) -> int:
    """Bytes of the mapped training matrix of a host; names, of which hardly a page is read, are not among them."""
    return MAPPED * nonzeros + 13 * rows + 4 * assignments


def worker_bytes(rows: int, features: int, candidates: int) -> int:
    """Bytes that one Python worker holds while it solves a group, beside the matrix.

    Weights of the group, the pruned ones, a trial, and the best so far where there are candidates; dual variables,
    scores, signs and temporary arrays by row.  Held against what tracemalloc sees.
    """
    weights = 4 * LANES * (features + 1) * (5 if candidates == 1 else 6)
    by_row = rows * LANES * (4 * (5 if candidates == 1 else 6) + 1) + 16 * rows
    return PROCESS + weights + by_row
