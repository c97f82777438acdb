"""Rules between labels: all ancestors of a node, tags that satisfy rules, precision and recall that count ancestors.

A hierarchy is a directed acyclic graph of n nodes given by its edges child -> parent; a node may have several parents.
Its closure is a CSR structure: the ancestors of node i are closure[closure_indptr[i] : closure_indptr[i + 1]],
ascending, without i itself.
"""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

Ids = NDArray[np.int64]

MAX_PAIRS = 20_000_000  # (node, ancestor) pairs, 8 bytes each: a chain of 6,000 nodes; thesauri have some 10 a node

# kinds of rules in the order they are applied; rows of the counts of `satisfy`
KINDS = ("synonyms", "include", "exclude", "implies", "excludes", "at_most", "at_least")
SYNONYMS, INCLUDE, EXCLUDE, IMPLIES, EXCLUDES, AT_MOST, AT_LEAST = range(len(KINDS))


class CycleError(ValueError):
    """A node is its own ancestor.  `nodes`: one cycle along its edges, its first node again at the end."""

    def __init__(self, nodes: list[int]):
        super().__init__("the hierarchy has a cycle: " + " -> ".join(map(str, nodes)))
        self.nodes = nodes


def ancestor_closure(n: int, child: ArrayLike, parent: ArrayLike) -> tuple[Ids, Ids]:
    """All ancestors of every node: indptr (n + 1,), ancestors (pairs,) int64, ascending within a node.

    child, parent: (edges,) node ids in 0..n-1; repeated edges count once.

    Raises CycleError, a ValueError, with the nodes of one cycle.

    >>> indptr, ancestors = ancestor_closure(4, [0, 1, 0], [1, 2, 3])
    >>> indptr.tolist(), ancestors.tolist()
    ([0, 3, 4, 4, 4], [1, 2, 3, 2])
    """
    child = np.asarray(child, dtype=np.int64).reshape(-1)
    parent = np.asarray(parent, dtype=np.int64).reshape(-1)
    if child.size != parent.size:
        raise ValueError(f"child has {child.size} entries, parent {parent.size}; expected one parent an edge")
    if child.size and (min(child.min(), parent.min()) < 0 or max(child.max(), parent.max()) >= n):
        raise ValueError(
            f"edges join nodes {min(child.min(), parent.min())}..{max(child.max(), parent.max())}; expected 0..{n - 1}"
        )
    up_indptr, up = _grouped(n, child, parent)
    down_indptr, down = _grouped(n, parent, child)
    order = _parents_first(up_indptr, down_indptr, down)
    if order.size < n:
        raise CycleError(_cycle(n, order, up_indptr, up))
    start, length, pairs = _union_upwards(order, up_indptr, up, MAX_PAIRS)
    if pairs.size > MAX_PAIRS:
        raise ValueError(f"the hierarchy has more than {MAX_PAIRS} pairs of a node and an ancestor")
    indptr = np.zeros(n + 1, np.int64)
    np.cumsum(length, out=indptr[1:])
    return indptr, _by_node(indptr, start, pairs)


def _grouped(n, key, value):
    """(indptr, values) of the values by key."""
    indptr = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(key, minlength=n), out=indptr[1:])
    return indptr, value[np.argsort(key, kind="stable")]


def _cycle(n, order, up_indptr, up):
    # whoever is not ordered has an unordered parent, so going up among those must come back
    open_ = np.ones(n, bool)
    open_[order] = False
    node, seen, path = int(np.flatnonzero(open_)[0]), {}, []
    while node not in seen:
        seen[node] = len(path)
        path.append(node)
        parents = up[up_indptr[node] : up_indptr[node + 1]]
        node = int(parents[open_[parents]].min())
    return [*path[seen[node] :], node]


@njit(cache=True, error_model="numpy")
def _parents_first(up_indptr, down_indptr, down):
    """Nodes, each after all its parents (Kahn 1962); nodes on or below a cycle are left out."""
    n = up_indptr.size - 1
    waiting = up_indptr[1:] - up_indptr[:-1]
    order = np.empty(n, np.int64)
    filled = 0
    for i in range(n):
        if waiting[i] == 0:
            order[filled] = i
            filled += 1
    done = 0
    while done < filled:
        i = order[done]
        done += 1
        for e in range(down_indptr[i], down_indptr[i + 1]):
            waiting[down[e]] -= 1
            if waiting[down[e]] == 0:
                order[filled] = down[e]
                filled += 1
    return order[:filled]


@njit(cache=True, error_model="numpy")
def _union_upwards(order, up_indptr, up, limit):
    """start (n,), length (n,) of every node's ancestors in pairs, unordered; stops once beyond `limit` pairs."""
    n = order.size
    start, length = np.zeros(n, np.int64), np.zeros(n, np.int64)
    seen = np.full(n, -1, np.int64)
    pairs = np.empty(4 * n + 16, np.int64)
    filled = 0
    for i in order:
        begin = filled
        for e in range(up_indptr[i], up_indptr[i + 1]):
            p = up[e]
            if filled + length[p] + 1 > pairs.size:
                larger = np.empty(2 * (filled + length[p] + 1), np.int64)
                larger[:filled] = pairs[:filled]
                pairs = larger
            if seen[p] != i:
                seen[p] = i
                pairs[filled] = p
                filled += 1
            for k in range(start[p], start[p] + length[p]):
                if seen[pairs[k]] != i:
                    seen[pairs[k]] = i
                    pairs[filled] = pairs[k]
                    filled += 1
        start[i], length[i] = begin, filled - begin
        if filled > limit:
            break
    return start, length, pairs[:filled]


@njit(cache=True, error_model="numpy")
def _by_node(indptr, start, pairs):
    out = np.empty(pairs.size, np.int64)
    for i in range(indptr.size - 1):
        size = indptr[i + 1] - indptr[i]
        out[indptr[i] : indptr[i + 1]] = np.sort(pairs[start[i] : start[i] + size])
    return out


class LabelRules(NamedTuple):
    """Rules between L labels, by label id; int64 arrays.  Ragged ones as in CSR, ids ascending.

    An ancestor of a label that may be tagged may itself be tagged: whoever builds this sees to it.
    """

    same: Ids  # (L,) the label that this one counts as; itself but for old names
    old_indptr: Ids  # (L + 1,) the old names of a label
    old: Ids
    never: Ids  # (L,) 0, or the kind of rule (INCLUDE, EXCLUDE) that keeps the label from ever being tagged
    up_indptr: Ids  # (L + 1,) the ancestors of a label, without itself
    up: Ids
    group_indptr: Ids  # (L + 1,) the groups that a label is in
    groups: Ids
    most: Ids  # (G,) labels of the group that may stay
    kind: Ids  # (G,) EXCLUDES or AT_MOST
    least: Ids  # (R,) labels of the group that there should be
    when: Ids  # (R,) only in documents with this label; -1: in all
    of_indptr: Ids  # (R + 1,) the labels of that group
    of: Ids


def satisfy(tagged: NDArray, Z: NDArray, rules: LabelRules) -> tuple[NDArray[np.bool_], Ids, Ids]:
    """Tags that satisfy every rule, and what each kind of rule changed; documents are independent of each other.

    tagged: (m, L) bool or uint8; Z: (m, L) float64 log-odds, comparable across labels.

    Returns tagged (m, L) bool; added, removed (kinds, L) int64, in the order of KINDS.

    In a document, in this order:

    1. Old names become their label, whose Z is the largest among its names.  Labels never tagged go.
    2. Every tag brings its ancestors.
    3. Where a group holds too many, tags are put back one after the other, the largest Z first (ties: smaller id), each
       with its ancestors; one that no longer fits stays out, and so does whatever implies it.  So a label competes with
       the largest Z among itself and the kept tags that imply it, and the order of the groups does not matter.
    4. A group that holds too few is filled with its largest Z, each with its ancestors, passing over labels that do
       not fit and those of Z = -inf (no model).  If none fits, the document keeps fewer.  Repeated until nothing
       changes, as an added label may be the `when` of another rule.

    Whatever satisfies the rules comes back unchanged, so a second application changes nothing.
    """
    if tagged.ndim != 2 or tagged.dtype not in (np.bool_, np.uint8) or tagged.shape[1] != rules.same.size:
        raise ValueError(
            f"tagged is {tagged.dtype} {tagged.shape}; expected bool or uint8, (documents, {rules.same.size} labels)"
        )
    if Z.shape != tagged.shape:
        raise ValueError(f"Z is {Z.shape}; expected {tagged.shape}, as tagged")
    out = np.zeros(tagged.shape, np.uint8)
    added, removed = (np.zeros((len(KINDS), tagged.shape[1]), np.int64) for _ in range(2))
    tagged = np.ascontiguousarray(tagged).view(np.uint8)
    _satisfy(tagged, np.ascontiguousarray(Z, dtype=np.float64), rules, out, added, removed)
    return out.view(np.bool_), added, removed


@njit(cache=True, error_model="numpy")
def _largest(z, rules, label):
    """Largest log-odds among the names of a label; NaN as -inf, which keeps the order total."""
    best = -np.inf
    if z[label] > best:
        best = z[label]
    for k in range(rules.old_indptr[label], rules.old_indptr[label + 1]):
        if z[rules.old[k]] > best:
            best = z[rules.old[k]]
    return best


@njit(cache=True, error_model="numpy")
def _by_probability(z, rules, labels):
    """The labels, ascending ids, in descending order of their log-odds; ties keep their order."""
    keys = np.empty(labels.size, np.float64)
    for k in range(labels.size):
        keys[k] = -_largest(z, rules, labels[k])
    return labels[np.argsort(keys, kind="mergesort")]


@njit(cache=True, error_model="numpy")
def _put(label, on, count, rules, new):
    """Tags a label and its ancestors if all groups allow it: (how many are new, in `new`; -1), else (0, group)."""
    size, blocked = 0, -1
    for k in range(rules.up_indptr[label] - 1, rules.up_indptr[label + 1]):
        x = label if k < rules.up_indptr[label] else rules.up[k]
        if on[x]:
            continue
        on[x] = 1
        new[size] = x
        size += 1
        for e in range(rules.group_indptr[x], rules.group_indptr[x + 1]):
            g = rules.groups[e]
            count[g] += 1
            if count[g] > rules.most[g] and (blocked < 0 or g < blocked):
                blocked = g
    if blocked < 0:
        return size, -1
    for k in range(size):
        on[new[k]] = 0
        for e in range(rules.group_indptr[new[k]], rules.group_indptr[new[k] + 1]):
            count[rules.groups[e]] -= 1
    return 0, blocked


@njit(cache=True, error_model="numpy")
def _satisfy(tagged, Z, rules, out, added, removed):
    m, n_labels = tagged.shape
    count = np.zeros(rules.most.size, np.int64)  # tags of each group, in this document
    tags, new = np.empty(n_labels, np.int64), np.empty(n_labels, np.int64)
    for i in range(m):
        on, z = out[i], Z[i]
        size = 0
        for label in range(n_labels):
            if tagged[i, label]:
                same = rules.same[label]
                if same != label:
                    removed[SYNONYMS, label] += 1
                if not on[same]:
                    on[same] = 1
                    tags[size] = same
                    size += 1
                    if not tagged[i, same]:
                        added[SYNONYMS, same] += 1
        kept = 0
        for k in range(size):
            label = tags[k]
            if rules.never[label]:
                on[label] = 0
                removed[rules.never[label], label] += 1
            else:
                tags[kept] = label
                kept += 1
        size = kept
        for k in range(kept):
            for e in range(rules.up_indptr[tags[k]], rules.up_indptr[tags[k] + 1]):
                if not on[rules.up[e]]:
                    on[rules.up[e]] = 1
                    tags[size] = rules.up[e]
                    size += 1
                    added[IMPLIES, rules.up[e]] += 1
        if rules.most.size:
            over = False
            for k in range(size):
                for e in range(rules.group_indptr[tags[k]], rules.group_indptr[tags[k] + 1]):
                    count[rules.groups[e]] += 1
                    over |= count[rules.groups[e]] > rules.most[rules.groups[e]]
            if over:
                size = _thinned(z, rules, on, count, tags, size, new, removed)
        if rules.least.size:
            size = _filled(z, rules, on, count, tags, size, new, added)
        for k in range(size):
            for e in range(rules.group_indptr[tags[k]], rules.group_indptr[tags[k] + 1]):
                count[rules.groups[e]] = 0


@njit(cache=True, error_model="numpy")
def _thinned(z, rules, on, count, tags, size, new, removed):
    """Step 3 in one document; returns the new number of tags."""
    for k in range(size):
        on[tags[k]] = 0
        for e in range(rules.group_indptr[tags[k]], rules.group_indptr[tags[k] + 1]):
            count[rules.groups[e]] = 0
    kept = 0
    for label in _by_probability(z, rules, np.sort(tags[:size])):
        if on[label]:
            continue
        # counts only grow, so a label that does not fit now will not fit as somebody's ancestor later
        more, blocked = _put(label, on, count, rules, new)
        if blocked >= 0:
            removed[rules.kind[blocked], label] += 1
        tags[kept : kept + more] = new[:more]
        kept += more
    return kept


@njit(cache=True, error_model="numpy")
def _filled(z, rules, on, count, tags, size, new, added):
    """Step 4 in one document; returns the new number of tags."""
    changed = True
    while changed:
        changed = False
        for r in range(rules.least.size):
            if rules.when[r] >= 0 and not on[rules.when[r]]:
                continue
            group = rules.of[rules.of_indptr[r] : rules.of_indptr[r + 1]]
            missing = rules.least[r]
            for label in group:
                missing -= on[label]
            if missing <= 0:
                continue
            for label in _by_probability(z, rules, group):
                if on[label] or rules.never[label] or _largest(z, rules, label) == -np.inf:
                    continue
                more, _ = _put(label, on, count, rules, new)
                for k in range(more):
                    tags[size] = new[k]
                    size += 1
                    added[AT_LEAST, new[k]] += 1
                changed |= more > 0
                missing = rules.least[r]
                for other in group:  # an ancestor that came along may be in the group too
                    missing -= on[other]
                if missing <= 0:
                    break
    return size


def hierarchical_sums(
    tagged_indptr: ArrayLike,
    tagged_labels: ArrayLike,
    gold_indptr: ArrayLike,
    gold_labels: ArrayLike,
    closure_indptr: ArrayLike,
    closure: ArrayLike,
) -> tuple[Ids, Ids, Ids]:
    """Sizes of each document's tags and gold, both with all their ancestors; they add over documents.

    tagged_*, gold_*: CSR of label ids of m documents; ids are nodes of the closure.

    Returns hits |aug(tags) & aug(gold)|, tags |aug(tags)|, gold |aug(gold)|, each (m,) int64.  A root counts like any
    other node: leave it out of the hierarchy where all documents share it.
    """
    closure_indptr, closure = _checked("closure", closure_indptr, closure, np.size(closure_indptr) - 1)
    n = closure_indptr.size - 1
    tagged_indptr, tagged_labels = _checked("tagged", tagged_indptr, tagged_labels, n)
    gold_indptr, gold_labels = _checked("gold", gold_indptr, gold_labels, n)
    if tagged_indptr.size != gold_indptr.size:
        raise ValueError(f"{tagged_indptr.size - 1} documents with tags, {gold_indptr.size - 1} with gold")
    return _sums(tagged_indptr, tagged_labels, gold_indptr, gold_labels, closure_indptr, closure)


def _checked(name, indptr, ids, n):
    """Two int64 arrays, or an error: the compiled loops index with them unchecked."""
    indptr = np.ascontiguousarray(indptr, dtype=np.int64)
    ids = np.ascontiguousarray(ids, dtype=np.int64)
    if indptr.size < 1 or indptr[0] != 0 or indptr[-1] != ids.size or np.any(np.diff(indptr) < 0):
        raise ValueError(f"{name}: indptr of {indptr.size} entries does not fit {ids.size} ids")
    if ids.size and (ids.min() < 0 or ids.max() >= n):
        raise ValueError(f"{name} has ids {ids.min()}..{ids.max()}; expected 0..{n - 1}")
    return indptr, ids


@njit(cache=True, error_model="numpy")
def _sums(tagged_indptr, tagged_labels, gold_indptr, gold_labels, closure_indptr, closure):
    m = tagged_indptr.size - 1
    hits, tags, gold = np.zeros(m, np.int64), np.zeros(m, np.int64), np.zeros(m, np.int64)
    # the last document that had the node in its tags, in its gold: no clearing between documents
    in_tags, in_gold = np.full(closure_indptr.size - 1, -1, np.int64), np.full(closure_indptr.size - 1, -1, np.int64)
    for i in range(m):
        for t in range(tagged_indptr[i], tagged_indptr[i + 1]):
            node = tagged_labels[t]
            if in_tags[node] == i:
                continue  # already there, and so are its ancestors
            in_tags[node] = i
            tags[i] += 1
            for k in range(closure_indptr[node], closure_indptr[node + 1]):
                if in_tags[closure[k]] != i:
                    in_tags[closure[k]] = i
                    tags[i] += 1
        for g in range(gold_indptr[i], gold_indptr[i + 1]):
            node = gold_labels[g]
            if in_gold[node] == i:
                continue
            in_gold[node] = i
            gold[i] += 1
            hits[i] += in_tags[node] == i
            for k in range(closure_indptr[node], closure_indptr[node + 1]):
                if in_gold[closure[k]] != i:
                    in_gold[closure[k]] = i
                    gold[i] += 1
                    hits[i] += in_tags[closure[k]] == i
    return hits, tags, gold


def hierarchical_metrics(hits: ArrayLike, tags: ArrayLike, gold: ArrayLike, if_undefined: float = 0.0):
    """Micro precision, recall and F1 over tags and gold with their ancestors, in [0, 1].

    hits, tags, gold: (m,) of `hierarchical_sums`, or their totals.  `if_undefined` is the value of 0/0.
    Source: Kiritchenko, Matwin, Famili 2005; Silla, Freitas 2011, section 5.2 (hP, hR, hF).
    """
    both, said, true = (int(np.sum(x)) for x in (hits, tags, gold))
    return {
        "hierarchical_precision": both / said if said else float(if_undefined),
        "hierarchical_recall": both / true if true else float(if_undefined),
        "hierarchical_f1": 2 * both / (said + true) if said + true else float(if_undefined),
    }
