"""Rules between labels: a YAML file -> a document that the run keeps -> arrays by label id -> tags that satisfy them.

The document is plain JSON with label names and all keys: hierarchy (list of [child, parent]), hierarchy_implies,
implies, excludes, at_most, at_least, include, exclude, synonyms.  Empty means that there is no such rule.
"""

import csv
import difflib
import io
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveInt,
    StrictBool,
    ValidationError,
    field_validator,
    model_validator,
)
from scipy import sparse

from pipeline.config import MAX_CONFIG_BYTES, Section, _parsed
from pipeline.errors import ConfigError, InputError, shown
from pipeline.kernels.hierarchy import (
    AT_MOST,
    EXCLUDE,
    EXCLUDES,
    INCLUDE,
    KINDS,
    CycleError,
    LabelRules,
    ancestor_closure,
    satisfy,
)

__all__ = [
    "LabelRules",
    "apply",
    "check_labels",
    "compiled",
    "hierarchy_closure",
    "merged_gold",
    "names_of",
    "parsed",
    "read_rules",
]

MAX_HIERARCHY_BYTES = 50_000_000
MAX_COMPARISONS = 500_000  # names looked up for a nearest label, times labels: some seconds
MAX_SHOWN = 5  # contradictions in one message

Document = dict[str, Any]
Ids = NDArray[np.int64]


def _text(value):
    # YAML reads 1309, no and 2024-01-01 as something else, and 0123 as 83
    if isinstance(value, bool):
        raise ValueError("a label as text; YAML reads yes, no, on and off as true and false where no quotes stand")
    if not isinstance(value, str):
        raise ValueError(f"a label as text, in quotes: '{shown(value)}'")
    if not value.strip():
        raise ValueError("a label")
    return value.strip()


def _listed(value):
    return [value] if isinstance(value, str) else value


def _distinct(labels):
    seen = set()
    for label in labels:
        if label in seen:
            raise ValueError(f"distinct labels, and {shown(label)} stands there twice")
        seen.add(label)
    return labels


Label = Annotated[str, BeforeValidator(_text)]
OneOrMore = Annotated[tuple[Label, ...], BeforeValidator(_listed), Field(min_length=1), AfterValidator(_distinct)]
Group = Annotated[tuple[Label, ...], Field(min_length=1), AfterValidator(_distinct)]
Several = Annotated[tuple[Label, ...], Field(min_length=2), AfterValidator(_distinct)]


class _Hierarchy(Section):
    file: str = Field(min_length=1)
    implies: StrictBool = True


class _AtMost(Section):
    n: PositiveInt
    of: Group


class _AtLeast(_AtMost):
    when: Label | None = None


class _Rules(Section):
    """The YAML file."""

    hierarchy: _Hierarchy | None = None
    implies: dict[Label, OneOrMore] = Field(default_factory=dict)
    excludes: tuple[Several, ...] = ()
    at_most: tuple[_AtMost, ...] = ()
    at_least: tuple[_AtLeast, ...] = ()
    include: OneOrMore | None = None
    exclude: OneOrMore | None = None
    synonyms: dict[Label, Label] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data):
        data = {key: value for key, value in data.items() if value is not None}  # a key with nothing behind it
        if isinstance(data.get("hierarchy"), str):
            data["hierarchy"] = {"file": data["hierarchy"]}
        return data

    @field_validator("implies", "synonyms", mode="before")
    @classmethod
    def _stripped_keys_are_distinct(cls, value):
        if isinstance(value, dict):
            _distinct([key.strip() for key in value if isinstance(key, str)])
        return value


class _Kept(Section):
    """The document."""

    hierarchy: list[Annotated[list[str], Field(min_length=2, max_length=2)]]
    hierarchy_implies: StrictBool
    implies: dict[str, list[str]]
    excludes: list[list[str]]
    at_most: list[_AtMost]
    at_least: list[_AtLeast]
    include: list[str]
    exclude: list[str]
    synonyms: dict[str, str]


_EXPECTED = {
    "hierarchy": "a CSV file with columns child,parent, or {file: hierarchy.csv, implies: false}",
    "implies": "label: label, or label: [label, ...]",
    "excludes": "a list of sets of at least two labels, such as [[positive, negative]]",
    "at_most": "a list such as [{n: 2, of: [a, b, c]}]",
    "at_least": "a list such as [{n: 1, of: [a, b]}], each with when: label where it holds for some documents only",
    "include": "a list of labels",
    "exclude": "a list of labels",
    "synonyms": "old: new",
}


def read_rules(path: str | Path) -> Document:
    """The rules of a YAML file and its hierarchy, checked, as plain JSON that needs neither file any more.

    Raises InputError for a missing file, ConfigError for whatever is wrong in one, contradictions included.
    """
    path = Path(path)
    text = _read(path, "file of rules", MAX_CONFIG_BYTES)
    try:
        value = _parsed(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {shown(error, 300)}") from error
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: the whole is {shown(repr(value))}; expected rules: {', '.join(_EXPECTED)}")
    try:
        rules = _Rules.model_validate(value)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_limited([_explain(e) for e in error.errors()]))) from error
    document: Document = {
        "hierarchy": [],
        "hierarchy_implies": bool(rules.hierarchy and rules.hierarchy.implies),
        "implies": {label: list(implied) for label, implied in rules.implies.items()},
        "excludes": [list(group) for group in rules.excludes],
        "at_most": [{"n": rule.n, "of": list(rule.of)} for rule in rules.at_most],
        "at_least": [{"n": rule.n, "of": list(rule.of), "when": rule.when} for rule in rules.at_least],
        "include": list(rules.include or ()),
        "exclude": list(rules.exclude or ()),
        "synonyms": dict(rules.synonyms),
    }
    if wrong := _wrong_synonyms(document):
        raise ConfigError(f"{path}: " + "; ".join(_limited(wrong)))
    if rules.hierarchy:
        source = path.parent / rules.hierarchy.file
        document["hierarchy"] = _read_hierarchy(source, document["synonyms"])
        _Graph(document["hierarchy"], source)
    edges = [[a, b] for a, implied in document["implies"].items() for b in implied]
    graph = _Graph(edges + (document["hierarchy"] if document["hierarchy_implies"] else []), path)
    if wrong := [*_wrong_numbers(document), *_contradictions(document, graph)]:
        raise ConfigError(f"{path}: " + "; ".join(_limited(wrong)))
    return document


def parsed(content: bytes, place: object) -> Document:
    """The document from the bytes of rules.json, {} where there are no rules.

    Raises DataError, which names `place`, where they are something else.
    """
    if content.strip() == b"{}":
        return {}
    return _Kept.of_bytes(content, place, "the rules").model_dump(mode="json")


def check_labels(document: Document, labels: list[str]) -> list[str]:
    """Warnings about names in the rules that are no labels, with the nearest one.  Rows of the hierarchy may be."""
    known = set(labels)
    known |= {new for old, new in document["synonyms"].items() if old in known}
    inner = {name for row in document["hierarchy"] for name in row}
    by_place: dict[str, list[str]] = defaultdict(list)
    for place, name in _named(document):
        by_place[place].append(name)
    warnings, seen = [], set()
    left = max(1, MAX_COMPARISONS // max(1, len(labels)))
    for place, names in by_place.items():
        # a name between labels of the hierarchy does its work there
        passes = inner if place.partition(".")[0] in ("implies", "include", "exclude") else set()
        for name in names:
            if name in known or name in passes or name in seen:
                continue
            seen.add(name)
            near = difflib.get_close_matches(name, labels, n=1, cutoff=0.5) if left > 0 else []
            left -= 1
            hint = f"; the nearest one is {shown(near[0])}" if near else ""
            warnings.append(f"rules: {shown(place)} names {shown(name)}, which is no label{hint}")
        if not any(name in known or name in passes for name in names):
            effect = "nothing is ever tagged" if place == "include" else "it does nothing"
            warnings.append(f"rules: {shown(place)} names no label at all: {effect}")
    return warnings


def compiled(document: Document, labels: list[str]) -> LabelRules | None:
    """The rules by label id (place in `labels`); None where they can change nothing.

    Names that are no labels are left out, but a hierarchy leads through them.
    """
    size = len(labels)
    same, known = _resolved(document, labels)
    pairs = [[a, b] for a, implied in document["implies"].items() for b in implied]
    if document["hierarchy_implies"]:
        pairs += document["hierarchy"]
    indptr, ancestors = _closure(pairs, known, size)
    up_indptr, up = _only_below(indptr, ancestors, size)

    def ids(names):
        return sorted({known[name] for name in names if name in known})

    never = np.zeros(size, np.int64)
    if document["include"]:
        never[np.setdiff1d(same, ids(document["include"]))] = INCLUDE
    never[ids(document["exclude"])] = EXCLUDE
    # read_rules refuses such rules; for names that only meet here, the ancestor decides
    owner = np.repeat(np.arange(size), np.diff(up_indptr))
    lost = (never[owner] == 0) & (never[up] > 0)
    never[owner[lost]] = never[up[lost]]

    caps = [(1, EXCLUDES, ids(group)) for group in document["excludes"]]
    caps += [(rule["n"], AT_MOST, ids(rule["of"])) for rule in document["at_most"]]
    caps = [cap for cap in caps if len(cap[2]) > cap[0]]
    least = [(r["n"], known.get(r["when"], -2) if r["when"] else -1, ids(r["of"])) for r in document["at_least"]]
    least = [(n, when, of) for n, when, of in least if of and when >= -1]

    folded = np.flatnonzero(same != np.arange(size))
    if not (folded.size or never.any() or up.size or caps or least):
        return None
    old_indptr, old = _csr(size, same[folded], folded)
    members = [(label, g) for g, cap in enumerate(caps) for label in cap[2]]
    group_indptr, groups = _csr(size, _column(members, 0), _column(members, 1))
    filled = [(r, label) for r, rule in enumerate(least) for label in rule[2]]
    of_indptr, of = _csr(len(least), _column(filled, 0), _column(filled, 1))
    return LabelRules(
        same=same,
        old_indptr=old_indptr,
        old=old,
        never=never,
        up_indptr=up_indptr,
        up=up,
        group_indptr=group_indptr,
        groups=groups,
        most=_column(caps, 0),
        kind=_column(caps, 1),
        least=_column(least, 0),
        when=_column(least, 1),
        of_indptr=of_indptr,
        of=of,
    )


def apply(rules: LabelRules, tagged: NDArray, Z: NDArray) -> tuple[NDArray[np.bool_], dict[str, tuple[Ids, Ids]]]:
    """Tags (m, L) that satisfy the rules, and by kind of rule, in the order applied, (added, removed) (L,) documents.

    tagged: (m, L) bool or uint8; Z: (m, L) calibrated log-odds.  Which labels stay: see `kernels.hierarchy.satisfy`.
    """
    out, added, removed = satisfy(tagged, Z, rules)
    return out, {kind: (added[k], removed[k]) for k, kind in enumerate(KINDS)}


def merged_gold(rules: LabelRules | None, indptr: NDArray, labels: NDArray) -> tuple[NDArray, NDArray]:
    """Gold (CSR) with old names counted as their label, ascending and distinct; the same objects without synonyms."""
    if rules is None or not rules.old.size:
        return indptr, labels
    m, size = len(indptr) - 1, rules.same.size
    key = np.repeat(np.arange(m, dtype=np.int64), np.diff(indptr)) * size + rules.same[labels]
    key = np.unique(key)
    merged = np.zeros(m + 1, np.asarray(indptr).dtype)
    np.cumsum(np.bincount(key // size, minlength=m), out=merged[1:])
    return merged, (key % size).astype(np.asarray(labels).dtype)


def names_of(document: Document, labels: list[str]) -> list[str]:
    """The names that tags are written with, by label id."""
    return [document["synonyms"].get(label, label) for label in labels]


def hierarchy_closure(document: Document, labels: list[str]) -> tuple[Ids, Ids] | None:
    """(indptr, ancestors) of labels 0..L-1 and, after them, the hierarchy's further names; None without a hierarchy."""
    if not document["hierarchy"]:
        return None
    return _closure(document["hierarchy"], _resolved(document, labels)[1], len(labels))


def _resolved(document, labels):
    """(same (L,), {name: id}): the label that each one counts as, and what a name in the rules means."""
    known = {label: k for k, label in enumerate(labels)}
    same = np.arange(len(labels), dtype=np.int64)
    olds = sorted((known[old], old, new) for old, new in document["synonyms"].items() if old in known)
    for label_id, _, new in olds:
        # where `new` is no label, the first label of that name stands for it: two labels may not be written alike
        same[label_id] = known.setdefault(new, label_id)
    for label_id, old, _ in olds:
        known[old] = int(same[label_id])
    return same, known


def _closure(pairs, known, size):
    node = dict(known)
    further = sorted({name for pair in pairs for name in pair if name not in node})
    node.update((name, size + k) for k, name in enumerate(further))
    edges = np.array([(node[a], node[b]) for a, b in pairs if node[a] != node[b]], np.int64).reshape(-1, 2)
    return ancestor_closure(size + len(further), edges[:, 0], edges[:, 1])


def _only_below(indptr, ancestors, size):
    """The first `size` rows of a closure, without ids >= size."""
    own, owner = ancestors[: indptr[size]], np.repeat(np.arange(size), np.diff(indptr[: size + 1]))
    return _csr(size, owner[own < size], own[own < size])


def _csr(n, key, value):
    indptr = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(key, minlength=n), out=indptr[1:])
    return indptr, value[np.lexsort((value, key))].astype(np.int64)


def _column(rows, k):
    return np.array([row[k] for row in rows], np.int64)


def _named(document) -> Iterator[tuple[str, str]]:
    """(rule, label name) wherever a rule names a label; of synonyms the old names, of the hierarchy nothing."""
    for label, implied in document["implies"].items():
        for name in (label, *implied):
            yield f"implies.{label}", name
    for kind in ("excludes", "at_most", "at_least"):
        for k, rule in enumerate(document[kind]):
            group = rule if kind == "excludes" else rule["of"]
            when = [rule["when"]] if kind == "at_least" and rule["when"] else []
            for name in (*group, *when):
                yield f"{kind}[{k}]", name
    for kind in ("include", "exclude"):
        for name in document[kind]:
            yield kind, name
    for old in document["synonyms"]:
        yield f"synonyms.{old}", old


def _read(path, what, limit):
    try:
        if not path.is_file():
            raise InputError(f"{shown(path, 300)}: no such {what}")
        size = path.stat().st_size
        data = path.read_bytes() if size <= limit else b""
    except OSError as error:  # a name may be too long to ask for
        raise InputError(f"{shown(path, 300)}: not readable: {error.strerror}") from error
    if size > limit:
        raise ConfigError(f"{path}: {size} bytes; a {what} has at most {limit}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: byte {error.start} is not UTF-8; expected UTF-8") from error


def _read_hierarchy(path, synonyms):
    """Sorted, distinct [child, parent] of a CSV file; old names are read as new ones."""
    rows = csv.reader(io.StringIO(_read(path, "hierarchy file", MAX_HIERARCHY_BYTES), newline=""), strict=True)
    pairs = set()
    try:
        header = [cell.strip() for cell in next(rows, [])]
        if not {"child", "parent"} <= set(header):
            raise ConfigError(f"{path}: the header is {shown(','.join(header))}; expected columns child,parent")
        columns = header.index("child"), header.index("parent")
        for row in rows:
            if not row:
                continue
            pair = [row[k].strip() if k < len(row) else "" for k in columns]
            if len(row) != len(header) or not all(pair):
                raise ConfigError(
                    f"{path}: line {rows.line_num} is {shown(','.join(row))}; "
                    f"expected {len(header)} cells, with a child and its parent"
                )
            child, parent = (synonyms.get(name, name) for name in pair)
            if child != parent or pair[0] == pair[1]:  # two names of one label are no cycle
                pairs.add((child, parent))
    except csv.Error as error:
        raise ConfigError(f"{path}: line {rows.line_num} is not valid CSV: {error}") from error
    return [list(pair) for pair in sorted(pairs)]


def _explain(error):
    top, *below = error["loc"]
    if below and top in ("implies", "synonyms"):  # keys are labels, whatever YAML read
        key = error["input"] if below[-1] == "[key]" else below[0]
        top, below = f"{top}.{key}", below[1:]
    where = shown(f"{top}" + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in below if p != "[key]"))
    if error["type"] in ("extra_forbidden", "invalid_key"):
        inside = error["loc"][0] if len(error["loc"]) > 1 else ""
        models = {"hierarchy": _Hierarchy, "at_most": _AtMost, "at_least": _AtLeast}
        known = list(models.get(inside, _Rules).model_fields)
        near = difflib.get_close_matches(str(error["loc"][-1]).lower(), known, n=1, cutoff=0.3)
        hint = f"the nearest known one is {near[0]}" if near else f"known are {', '.join(known)}"
        return f"{where} is no {'key there' if inside else 'rule'}; {hint}"
    if error["type"] == "missing":
        return f"{where} is missing; expected {_EXPECTED[error['loc'][0]]}"
    if error["type"] == "value_error":
        expected = error["msg"].removeprefix("Value error, ")
    elif error["type"] in ("greater_than", "int_type", "int_from_float", "not_a_number"):
        expected = "a whole number of at least 1"
    elif error["type"] == "bool_type":
        expected = "true or false"
    else:
        expected = _EXPECTED[error["loc"][0]]
    return f"{where} is {shown(repr(error['input']))}; expected {expected}"


class _Graph:
    """Who implies whom, by name.  Raises ConfigError with the path of a cycle."""

    def __init__(self, edges, path):
        self.names = sorted({name for edge in edges for name in edge})
        self.node = {name: k for k, name in enumerate(self.names)}
        self.edges = edges
        pairs = np.array([(self.node[a], self.node[b]) for a, b in edges], np.int64).reshape(-1, 2)
        try:
            self.indptr, self.ancestors = ancestor_closure(len(self.names), pairs[:, 0], pairs[:, 1])
        except CycleError as error:
            way = _arrows(self.names[k] for k in error.nodes)
            raise ConfigError(f"{path}: {way} is a cycle; expected that no label implies itself") from error
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
        self.parents = defaultdict(list)
        for a, b in sorted(map(tuple, edges)):
            self.parents[a].append(b)

    def way(self, start, end):
        """A shortest way up, "a -> b -> c"."""
        before, level = {start: None}, [start]
        while level and end not in before:
            above = []
            for name in level:
                for parent in self.parents[name]:
                    if parent not in before:
                        before[parent] = name
                        above.append(parent)
            level = above
        steps = [end]
        while before[steps[-1]] is not None:
            steps.append(before[steps[-1]])
        return _arrows(reversed(steps))

    def with_ancestors(self) -> sparse.csr_array:
        """(nodes, nodes): 1 where the row's label implies the column's, or is it."""
        n = len(self.names)
        above = sparse.csr_array((np.ones(self.ancestors.size, np.int64), self.ancestors, self.indptr), shape=(n, n))
        return (above + sparse.eye_array(n, dtype=np.int64)).tocsr()


def _arrows(names):
    return " -> ".join(shown(name) for name in names)


def _caps(document):
    """(place, n, labels): at most n of the labels stay."""
    for k, group in enumerate(document["excludes"]):
        yield f"excludes[{k}]", 1, group
    for k, rule in enumerate(document["at_most"]):
        yield f"at_most[{k}]", rule["n"], rule["of"]


def _wrong_synonyms(document):
    synonyms = document["synonyms"]
    wrong = []
    for old, new in synonyms.items():
        if old == new:
            wrong.append(f"synonyms.{shown(old)} is itself; expected another name")
        elif new in synonyms:
            steps = [old, new]
            while steps[-1] in synonyms and steps[-1] not in steps[:-1]:
                steps.append(synonyms[steps[-1]])
            wrong.append(f"synonyms: {_arrows(steps)}; expected one step, to a name that is not old itself")
    for place, name in dict.fromkeys(_named(document)):
        if name in synonyms and not place.startswith("synonyms."):
            wrong.append(
                f"{shown(place)} names {shown(name)}, an old name in synonyms; say {shown(synonyms[name])} there"
            )
    return wrong


def _never(document, names):
    """{name: why it is never tagged, or nothing}."""
    include, exclude = set(document["include"]), set(document["exclude"])
    why = {}
    for name in names:
        why[name] = f"{shown(name)} is in exclude" if name in exclude else ""
        if include and name not in include and name not in exclude:
            why[name] = f"{shown(name)} is not in include"
    return why


def _wrong_numbers(document):
    for name in sorted(set(document["include"]) & set(document["exclude"])):
        yield f"{shown(name)} is in include and in exclude; expected one of them"
    caps, capped_by = list(_caps(document)), defaultdict(list)
    for c, cap in enumerate(caps):
        for name in cap[2]:
            capped_by[name].append(c)
    for k, rule in enumerate(document["at_least"]):
        place, n, group = f"at_least[{k}]", rule["n"], set(rule["of"])
        if n > len(group):
            yield f"{place}.n is {n}; expected at most {len(group)}, the labels of its group"
            continue
        for name, reason in _never(document, rule["of"]).items():
            if reason:
                yield f"{place} may add {shown(name)}, and {reason}; leave it out of the group"
        for c, common in Counter(c for name in group for c in capped_by.get(name, ())).items():
            reachable = len(group) - common + min(caps[c][1], common)
            if reachable < n:
                yield f"{place}.n is {n}, and {caps[c][0]} leaves at most {reachable} of that group; expected no more"


def _contradictions(document, graph):
    never = _never(document, graph.names)
    for child, parent in graph.edges:
        # along any way from a label that may be tagged to one that may not there is such an edge
        if not never[child] and never[parent]:
            yield f"{_arrows((child, parent))}, and {never[parent]}; so {shown(child)} could never be tagged"
    caps = [cap for cap in _caps(document) if sum(name in graph.node for name in cap[2]) > cap[1]]
    if not caps:
        return
    inside = [(graph.node[name], c) for c, cap in enumerate(caps) for name in cap[2] if name in graph.node]
    membership = sparse.csr_array(
        (np.ones(len(inside), np.int64), (_column(inside, 0), _column(inside, 1))), shape=(len(graph.names), len(caps))
    )
    held = (graph.with_ancestors() @ membership).tocoo()
    most = np.array([cap[1] for cap in caps])
    reported = set()
    by_depth = np.lexsort((held.row, np.diff(graph.indptr)[held.row]))  # the shortest explanation of each first
    for e in by_depth[held.data[by_depth] > most[held.col[by_depth]]]:
        name, c = graph.names[held.row[e]], int(held.col[e])
        if c in reported or never[name]:
            continue
        reported.add(c)
        above = graph.ancestors[graph.indptr[held.row[e]] : graph.indptr[held.row[e] + 1]]
        implied = {graph.names[k] for k in above} & set(caps[c][2])
        ways = ", ".join(graph.way(name, other) for other in sorted(implied)[: caps[c][1] + 1])
        group = ", ".join(shown(other) for other in caps[c][2][:MAX_SHOWN])
        rule = f"{caps[c][0]} lets {caps[c][1]} of {group}{', …' * (len(caps[c][2]) > MAX_SHOWN)} stay"
        yield f"{ways}, and {rule}; so {shown(name)} could never be tagged"


def _limited(messages):
    more = len(messages) - MAX_SHOWN
    return [re.sub(r"\s+", " ", text) for text in messages[:MAX_SHOWN]] + ([f"and {more} more"] if more > 0 else [])
