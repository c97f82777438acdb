import json
import time

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_array_equal

from pipeline.errors import ConfigError, InputError
from pipeline.kernels.hierarchy import KINDS, hierarchical_metrics, hierarchical_sums
from pipeline.learners import label_rules
from pipeline.learners.label_rules import (
    apply,
    check_labels,
    compiled,
    hierarchy_closure,
    merged_gold,
    names_of,
    read_rules,
)

ORDINARY = settings(deadline=None, max_examples=300)
NAMES = list("abcdefgh")  # the labels of generated rules; x and y are names that are none
EMPTY = {
    "hierarchy": [],
    "hierarchy_implies": True,
    "implies": {},
    "excludes": [],
    "at_most": [],
    "at_least": [],
    "include": [],
    "exclude": [],
    "synonyms": {},
}


def rules_of(**given):
    return EMPTY | given


def folder(tmp_path, text, hierarchy=None):
    (tmp_path / "rules.yaml").write_text(text, encoding="utf-8")
    if hierarchy is not None:
        (tmp_path / "hierarchy.csv").write_text(hierarchy, encoding="utf-8")
    return tmp_path / "rules.yaml"


# --- the slow, obvious version: one document, sets of names


def above(document, name):
    """The name and all that it implies."""
    edges = [(a, b) for a, implied in document["implies"].items() for b in implied]
    edges += [tuple(row) for row in document["hierarchy"]] if document["hierarchy_implies"] else []
    found = {name}
    while True:
        more = {b for a, b in edges if a in found} - found
        if not more:
            return found
        found |= more


def caps_of(document):
    return [("excludes", 1, set(g)) for g in document["excludes"]] + [
        ("at_most", r["n"], set(r["of"])) for r in document["at_most"]
    ]


def said(document, name):
    return document["synonyms"].get(name, name)


def may_be_tagged(document, name):
    return name not in document["exclude"] and (not document["include"] or name in document["include"])


def fits(document, tags):
    return all(len(tags & group) <= n for _, n, group in caps_of(document))


def with_ancestors(document, labels, name):
    return above(document, name) & set(labels)


def obvious(document, labels, tags, z):
    """Tags of one document (set of names) made to satisfy the rules; z: {name: log-odds}."""
    z = {name: max(z[other] for other in labels if said(document, other) == name or other == name) for name in labels}
    by_probability = sorted(labels, key=lambda name: (-z[name], labels.index(name)))
    tags = {said(document, name) for name in tags}
    tags = {name for name in tags if may_be_tagged(document, name)}
    tags = {a for name in tags for a in with_ancestors(document, labels, name)}
    kept = set()
    for name in by_probability:
        if name in tags and fits(document, kept | with_ancestors(document, labels, name)):
            kept |= with_ancestors(document, labels, name)
    before = None
    while before != kept:
        before = set(kept)
        for rule in document["at_least"]:
            for name in by_probability:
                needed = (rule["when"] is None or rule["when"] in kept) and len(kept & set(rule["of"])) < rule["n"]
                new = with_ancestors(document, labels, name)
                if needed and name in rule["of"] and may_be_tagged(document, name) and fits(document, kept | new):
                    kept |= new
    return kept


@st.composite
def cases(draw):
    """Rules without contradictions, as read_rules would accept them, with tags and scores of some documents."""
    names = [*NAMES, "x", "y"]
    rank = draw(st.permutations(names))
    pair = st.tuples(st.sampled_from(names), st.sampled_from(names)).filter(lambda p: p[0] != p[1])

    def upward(edges):
        return sorted({tuple(sorted(edge, key=rank.index)) for edge in edges})

    document = rules_of(
        hierarchy=[list(e) for e in upward(draw(st.lists(pair, max_size=5)))], hierarchy_implies=draw(st.booleans())
    )
    for a, b in upward(draw(st.lists(pair, max_size=4))):
        document["implies"] = document["implies"] | {a: [*document["implies"].get(a, []), b]}
    groups = st.lists(st.sampled_from(names), min_size=2, max_size=5, unique=True)
    document["excludes"] = draw(st.lists(groups, max_size=3))
    document["at_most"] = [{"n": draw(st.integers(1, 3)), "of": g} for g in draw(st.lists(groups, max_size=2))]
    document["at_least"] = [
        {"n": draw(st.integers(1, len(g))), "of": g, "when": draw(st.none() | st.sampled_from(names))}
        for g in draw(st.lists(groups, max_size=3))
    ]
    some = st.lists(st.sampled_from(names), max_size=3, unique=True)
    document["exclude"] = draw(some)
    document["include"] = draw(st.just([]) | st.lists(st.sampled_from(names), min_size=5, unique=True))
    # what read_rules refuses: repaired here so that many examples remain
    document["exclude"] = [n for n in names if any(a in document["exclude"] for a in above(document, n))]
    if document["include"]:
        document["include"] = sorted({a for n in document["include"] for a in above(document, n)})
    bad = [c for c in caps_of(document) if any(len(above(document, n) & c[2]) > c[1] for n in names)]
    document["excludes"] = [g for g in document["excludes"] if ("excludes", 1, set(g)) not in bad]
    document["at_most"] = [r for r in document["at_most"] if ("at_most", r["n"], set(r["of"])) not in bad]
    labels = list(NAMES)
    used = {name for _, name in label_rules._named(document)} | {n for row in document["hierarchy"] for n in row}
    if draw(st.booleans()):
        labels += ["old1", "old2"]
        document["synonyms"] = {"old1": draw(st.sampled_from(NAMES)), "old2": draw(st.sampled_from(NAMES))}
        assert not used & {"old1", "old2"}
    m = draw(st.integers(1, 4))
    tagged = draw(arrays(bool, (m, len(labels))))
    values = draw(st.sampled_from([st.sampled_from([-1.0, 0.0, 2.0]), st.floats(-9, 9)]))
    return document, labels, tagged, draw(arrays(np.float64, tagged.shape, elements=values))


def names(labels, row):
    return {labels[k] for k in np.flatnonzero(row)}


@ORDINARY
@given(cases())
def test_apply_equals_the_obvious_version(case):
    document, labels, tagged, Z = case
    rules = compiled(document, labels)
    expected = tagged if rules is None else apply(rules, tagged, Z)[0]
    for i in range(len(tagged)):
        z = dict(zip(labels, Z[i], strict=True))
        assert names(labels, expected[i]) == obvious(document, labels, names(labels, tagged[i]), z)


@ORDINARY
@given(cases())
def test_every_rule_is_satisfied(case):
    document, labels, tagged, Z = case
    rules = compiled(document, labels)
    out = tagged if rules is None else apply(rules, tagged, Z)[0]
    for i, row in enumerate(out):
        tags = names(labels, row)
        assert not tags & set(document["synonyms"])
        assert all(may_be_tagged(document, name) for name in tags)
        assert all(with_ancestors(document, labels, name) <= tags for name in tags)
        assert fits(document, tags)
        for rule in document["at_least"]:
            if (rule["when"] is None or rule["when"] in tags) and len(tags & set(rule["of"])) < rule["n"]:
                # only where nothing else of the group fits
                for name in set(rule["of"]) & set(labels) - tags:
                    new = with_ancestors(document, labels, name)
                    assert not may_be_tagged(document, name) or not fits(document, tags | new), (i, rule)


@ORDINARY
@given(cases())
def test_a_second_application_changes_nothing_and_counts_add_up(case):
    document, labels, tagged, Z = case
    rules = compiled(document, labels)
    if rules is None:
        return
    once, counts = apply(rules, tagged, Z)
    assert once.dtype == bool and list(counts) == list(KINDS)
    change = sum(added - removed for added, removed in counts.values())
    assert_array_equal(once.sum(axis=0) - tagged.sum(axis=0), change)
    twice, none = apply(rules, once, Z)
    assert_array_equal(twice, once)
    assert not any(added.any() or removed.any() for added, removed in none.values())
    alone = np.vstack([apply(rules, tagged[[i]].astype(np.uint8), Z[[i]])[0] for i in range(len(tagged))])
    assert_array_equal(alone, once)


@ORDINARY
@given(cases())
def test_tags_that_satisfy_the_rules_are_left_alone(case):
    document, labels, tagged, Z = case
    rules = compiled(document, labels)
    for i, row in enumerate(tagged):
        tags = names(labels, row)
        satisfied = (
            not tags & set(document["synonyms"])
            and all(may_be_tagged(document, n) and with_ancestors(document, labels, n) <= tags for n in tags)
            and fits(document, tags)
            and all(len(tags & set(r["of"])) >= r["n"] for r in document["at_least"])
        )
        if satisfied and rules is not None:
            assert_array_equal(apply(rules, tagged[[i]], Z[[i]])[0][0], row)


def tags_after(document, labels, tags, z):
    row = np.array([[label in tags for label in labels]])
    out, counts = apply(compiled(document, labels), row, np.array([z], np.float64))
    return names(labels, out[0]), {kind: c for kind, c in counts.items() if c[0].any() or c[1].any()}


def test_excludes_keeps_the_more_probable():
    document = rules_of(excludes=[["a", "b"]])
    assert tags_after(document, "abc", "abc", [1, 2, 0])[0] == {"b", "c"}
    tags, changed = tags_after(document, "abc", "abc", [2, 1, 0])
    assert tags == {"a", "c"}
    assert list(changed) == ["excludes"] and changed["excludes"][1].tolist() == [0, 1, 0]
    assert tags_after(document, "abc", "ab", [1, 1, 0])[0] == {"a"}  # ties: the smaller id


def test_a_label_is_as_probable_as_the_tags_that_imply_it():
    document = rules_of(implies={"corn": ["grain"]}, excludes=[["grain", "oil"]])
    labels = ["corn", "grain", "oil"]
    assert tags_after(document, labels, labels, [2, -3, 1])[0] == {"corn", "grain"}
    assert tags_after(document, labels, labels, [0, -3, 1])[0] == {"oil"}


def test_what_implies_a_removed_label_goes_too_and_ancestors_stay():
    document = rules_of(implies={"a": ["b"], "b": ["c"]}, excludes=[["b", "x"]])
    tags, changed = tags_after(document, "abcx", "ax", [1, 0, 0, 3])
    assert tags == {"c", "x"}
    assert changed["implies"][0].tolist() == [0, 1, 1, 0]
    assert changed["excludes"][1].tolist() == [1, 1, 0, 0]


def test_at_most_keeps_the_most_probable():
    document = rules_of(at_most=[{"n": 2, "of": ["a", "b", "c"]}])
    tags, changed = tags_after(document, "abcd", "abcd", [1, 3, 2, 0])
    assert tags == {"b", "c", "d"} and list(changed) == ["at_most"]


def test_at_least_fills_up_with_what_fits():
    some = {"n": 1, "of": ["a", "b"], "when": None}
    assert tags_after(rules_of(at_least=[some]), "abc", "c", [-2, -1, 3])[0] == {"b", "c"}
    document = rules_of(at_least=[some], excludes=[["b", "c"]])
    tags, changed = tags_after(document, "abc", "c", [-2, -1, 3])
    assert tags == {"a", "c"} and changed["at_least"][0].tolist() == [1, 0, 0]
    document = rules_of(at_least=[some], excludes=[["a", "c"], ["b", "c"]])
    assert tags_after(document, "abc", "c", [-2, -1, 3]) == ({"c"}, {})  # none fits: fewer
    assert tags_after(rules_of(at_least=[some]), "abc", "c", [-np.inf, np.nan, 3]) == ({"c"}, {})  # no models


def test_at_least_holds_when_its_label_is_there():
    document = rules_of(
        at_least=[{"n": 1, "of": ["c"], "when": "b"}, {"n": 1, "of": ["b"], "when": "a"}], implies={"c": ["d"]}
    )
    assert tags_after(document, "abcde", "e", [0, 0, 0, 0, 0])[0] == {"e"}
    assert tags_after(document, "abcde", "a", [0, 0, 0, 0, 0])[0] == {"a", "b", "c", "d"}


def test_include_exclude_and_synonyms():
    tags, changed = tags_after(rules_of(include=["a", "b"], exclude=["c"]), "abcd", "acd", [0, 0, 0, 0])
    assert tags == {"a"}
    assert changed["include"][1].tolist() == [0, 0, 0, 1] and changed["exclude"][1].tolist() == [0, 0, 1, 0]
    tags, changed = tags_after(rules_of(synonyms={"a": "b"}), "abc", "ac", [0, 0, 0])
    assert tags == {"b", "c"}
    assert [c.tolist() for c in changed["synonyms"]] == [[0, 1, 0], [1, 0, 0]]
    # the one label has the larger log-odds of its two names
    assert tags_after(rules_of(synonyms={"a": "b"}, excludes=[["b", "c"]]), "abc", "ac", [2, -9, 1])[0] == {"b"}


def test_a_closure_leads_through_names_that_are_no_labels():
    document = rules_of(hierarchy=[["a", "x"], ["x", "b"]])
    assert tags_after(document, "ab", "a", [0, 0])[0] == {"a", "b"}
    assert compiled(document | {"hierarchy_implies": False}, list("ab")) is None
    assert compiled(document, ["a", "c"]) is None


def test_documents_that_read_rules_never_saw_keep_the_rules_too():
    # an ancestor that is never tagged takes its label with it
    tags, changed = tags_after(rules_of(implies={"a": ["b"]}, exclude=["b"]), "abc", "ac", [0, 0, 0])
    assert tags == {"c"} and list(changed) == ["exclude"]
    # two names of one label are no cycle
    document = rules_of(synonyms={"a": "b"}, hierarchy=[["a", "b"], ["b", "c"]])
    assert tags_after(document, "abc", "a", [0, 0, 0])[0] == {"b", "c"}


def test_nothing_to_do_is_none():
    assert compiled(EMPTY, ["a"]) is None
    assert compiled(rules_of(implies={"x": ["y"]}, excludes=[["a", "x"]], synonyms={"a": "new"}), ["a"]) is None


def test_shapes_that_do_not_fit_are_refused():
    rules = compiled(rules_of(exclude=["a"]), ["a", "b"])
    for tagged, Z in [
        (np.ones((1, 3), bool), np.ones((1, 3))),
        (np.ones((1, 2), bool), np.ones((2, 2))),
        (np.ones((1, 2)), np.ones((1, 2))),
    ]:
        with pytest.raises(ValueError, match="expected"):
            apply(rules, tagged, Z)


# --- names


def test_old_names_count_as_new_in_gold():
    labels = ["a", "b", "c"]
    rules = compiled(rules_of(synonyms={"c": "a"}), labels)
    indptr, gold = merged_gold(rules, np.array([0, 2, 2, 4]), np.array([0, 2, 1, 2], np.int32))
    assert indptr.tolist() == [0, 1, 1, 3] and gold.tolist() == [0, 0, 1]
    assert gold.dtype == np.int32
    for none in (None, compiled(rules_of(exclude=["a"]), labels)):
        given = np.array([0, 1]), np.array([2])
        assert merged_gold(none, *given) == given
        assert all(a is b for a, b in zip(merged_gold(none, *given), given, strict=True))


def test_a_new_name_is_written_and_rules_may_use_it():
    document = rules_of(synonyms={"a": "alpha"}, implies={"alpha": ["b"]}, hierarchy=[["alpha", "root"]])
    assert names_of(document, ["a", "b"]) == ["alpha", "b"]
    assert tags_after(document, "ab", "a", [0, 0])[0] == {"a", "b"}
    assert check_labels(document, ["a", "b"]) == []
    indptr, closure = hierarchy_closure(document, ["a", "b"])
    assert indptr.tolist() == [0, 1, 1, 1] and closure.tolist() == [2]


def test_two_labels_of_one_new_name_are_one_label():
    document = rules_of(synonyms={"a": "new", "c": "new"})
    assert tags_after(document, "abc", "c", [0, 0, 0])[0] == {"a"}
    assert names_of(document, ["a", "b", "c"]) == ["new", "b", "new"]


def test_hierarchy_closure_has_further_nodes():
    document = rules_of(hierarchy=[["a", "x"], ["b", "x"], ["x", "top"]], hierarchy_implies=False)
    indptr, closure = hierarchy_closure(document, ["b", "a"])
    assert indptr.tolist() == [0, 2, 4, 4, 5]  # b, a, top, x
    assert closure.tolist() == [2, 3, 2, 3, 2]
    assert hierarchy_closure(EMPTY, ["a"]) is None


def test_warnings_name_the_nearest_label():
    document = rules_of(
        implies={"corn": ["grian"], "x": ["top"]},
        excludes=[["nope1", "nope2"]],
        include=["zzz"],
        synonyms={"grani": "corn"},
        hierarchy=[["x", "top"]],
    )
    warnings = check_labels(document, ["corn", "grain"])
    assert "rules: implies.corn names grian, which is no label; the nearest one is grain" in warnings
    assert "rules: synonyms.grani names grani, which is no label; the nearest one is grain" in warnings
    assert "rules: excludes[0] names no label at all: it does nothing" in warnings
    assert "rules: include names no label at all: nothing is ever tagged" in warnings
    assert not any("implies.x" in w for w in warnings)
    assert check_labels(EMPTY, ["a"]) == []


# --- the file

WHOLE = """
hierarchy: hierarchy.csv
implies:
  corn: grain
  wheat: [grain, food]
excludes:
  - [positive, negative]
at_most:
  - {n: 2, of: [a, b, c]}
at_least:
  - {n: 1, of: [a, b]}
  - {n: 1, of: [c], when: grain}
include: [a, b, c, grain, corn, wheat, food, positive, negative, "1309", crop]
exclude: [d]
synonyms: {old: corn}
"""


def test_a_whole_file_becomes_plain_json(tmp_path):
    path = folder(tmp_path, WHOLE, "\ufeffchild,parent\r\ngrain, food\r\nold,crop\n\ncorn,crop\n")
    document = read_rules(str(path))
    assert document == {
        "hierarchy": [["corn", "crop"], ["grain", "food"]],
        "hierarchy_implies": True,
        "implies": {"corn": ["grain"], "wheat": ["grain", "food"]},
        "excludes": [["positive", "negative"]],
        "at_most": [{"n": 2, "of": ["a", "b", "c"]}],
        "at_least": [{"n": 1, "of": ["a", "b"], "when": None}, {"n": 1, "of": ["c"], "when": "grain"}],
        "include": ["a", "b", "c", "grain", "corn", "wheat", "food", "positive", "negative", "1309", "crop"],
        "exclude": ["d"],
        "synonyms": {"old": "corn"},
    }
    assert json.loads(json.dumps(document)) == document


def test_hierarchy_for_evaluation_only(tmp_path):
    path = folder(tmp_path, "hierarchy: {file: hierarchy.csv, implies: false}\nexclude: [b]", "child,parent\na,b\n")
    document = read_rules(path)
    assert document == rules_of(hierarchy=[["a", "b"]], hierarchy_implies=False, exclude=["b"])
    assert read_rules(folder(tmp_path, "")) == rules_of(hierarchy_implies=False)
    assert read_rules(folder(tmp_path, "implies:\ninclude:\n")) == rules_of(hierarchy_implies=False)


def test_columns_of_the_hierarchy_go_by_name(tmp_path):
    path = folder(tmp_path, "hierarchy: hierarchy.csv", 'note,parent,child\nx,"b, c",a\n')
    assert read_rules(path)["hierarchy"] == [["a", "b, c"]]


REFUSED = {
    "implys: {a: b}": "implys is no rule; the nearest known one is implies",
    "at_most: [{N: 1, of: [a]}]": "at_most[0].n is missing; expected a list such as [{n: 2, of: [a, b, c]}]; "
    "at_most[0].N is no key there; the nearest known one is n",
    "hierarchy: {file: h.csv, imply: false}": "hierarchy.imply is no key there; the nearest known one is implies",
    "hierarchy: {file: h.csv, implies: 1}": "hierarchy.implies is 1; expected true or false",
    "hierarchy: [h.csv]": "hierarchy is ['h.csv']; expected a CSV file with columns child,parent",
    "at_most: [{n: 0, of: [a, b]}]": "at_most[0].n is 0; expected a whole number of at least 1",
    "at_most: [{n: true, of: [a, b]}]": "at_most[0].n is True; expected a whole number of at least 1",
    "at_most: [{n: 1.5, of: [a, b]}]": "at_most[0].n is 1.5; expected a whole number of at least 1",
    "at_most: {n: 1, of: [a, b]}": "at_most is {'n': 1, 'of': ['a', 'b']}; expected a list such as",
    "exclude: [1309]": "exclude[0] is 1309; expected a label as text, in quotes: '1309'",
    "implies: {no: [a]}": "implies.False is False; expected a label as text; YAML reads yes, no",
    "implies: {1: [a]}": "implies.1 is 1; expected a label as text, in quotes",
    "implies: {a: [b, b]}": "expected distinct labels, and b stands there twice",
    "implies: {a: b, ' a': c}": "expected distinct labels, and a stands there twice",
    "implies: {a: []}": "implies.a is []; expected label: label, or label: [label, ...]",
    "implies: [a]": "implies is ['a']; expected label: label",
    "excludes: [a, b]": "excludes[0] is 'a'; expected a list of sets of at least two labels",
    "excludes: [[a]]": "excludes[0] is ['a']; expected a list of sets of at least two labels",
    "excludes: [[a, ' a']]": "excludes[0] is ['a', ' a']; expected distinct labels",
    "include: []": "include is []; expected a list of labels",
    "exclude: ['']": "exclude[0] is ''; expected a label",
    "[a, b]": "the whole is ['a', 'b']; expected rules: hierarchy, implies",
    "a: b: c": "not valid YAML",
    "exclude: [a]\nexclude: [b]": "key 'exclude' is given twice",
    "include: &x [a]\nexclude: *x": "aliases are not allowed",
    # contradictions
    "implies: {a: b, b: c, c: a}": "a -> b -> c -> a is a cycle",
    "implies: {a: a}": "a -> a is a cycle",
    "implies: {a: b, b: c, a2: d}\nexcludes: [[c, d], [d, a2]]": "a2 -> d, and excludes[1] lets 1 of d, a2 stay; "
    "so a2 could never be tagged",
    "implies: {a: [b, d], b: c}\nexcludes: [[c, d]]": "a -> b -> c, a -> d, and excludes[0] lets 1 of c, d stay; "
    "so a could never be tagged",
    "implies: {a: [b, d], b: c}\nat_most: [{n: 2, of: [a, c, d]}]": "a -> b -> c, a -> d, and at_most[0] lets 2 of "
    "a, c, d stay",
    "implies: {corn: grain}\nexclude: [grain]": "corn -> grain, and grain is in exclude; so corn could never be tagged",
    "implies: {corn: grain}\ninclude: [corn]": "corn -> grain, and grain is not in include; so corn could never",
    "include: [a]\nexclude: [a]": "a is in include and in exclude",
    "at_least: [{n: 3, of: [a, b]}]": "at_least[0].n is 3; expected at most 2, the labels of its group",
    "at_least: [{n: 2, of: [a, b]}]\nexcludes: [[a, b, c]]": "at_least[0].n is 2, and excludes[0] leaves at most 1",
    "at_least: [{n: 3, of: [a, b, c]}]\nat_most: [{n: 1, of: [a, b]}]": "at_least[0].n is 3, and at_most[0] leaves at "
    "most 2 of that group",
    "at_least: [{n: 1, of: [a, b]}]\nexclude: [b]": "at_least[0] may add b, and b is in exclude",
    "at_least: [{n: 1, of: [a, b]}]\ninclude: [b]": "at_least[0] may add a, and a is not in include",
    "synonyms: {a: b, b: c}": "synonyms: a -> b -> c; expected one step",
    "synonyms: {a: b, b: a}": "synonyms: a -> b -> a; expected one step",
    "synonyms: {a: a}": "synonyms.a is itself",
    "synonyms: {a: b}\nimplies: {c: a}": "implies.c names a, an old name in synonyms; say b there",
    "synonyms: {a: b}\nat_least: [{n: 1, of: [c], when: a}]": "at_least[0] names a, an old name in synonyms; say b",
    "synonyms: {a: b}\nexclude: [a]": "exclude names a, an old name in synonyms; say b there",
}


@pytest.mark.parametrize("text", REFUSED)
def test_wrong_rules_are_refused(tmp_path, text):
    path = folder(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read_rules(path)
    assert REFUSED[text] in str(caught.value)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "hierarchy", "expected"),
    [
        ("hierarchy: hierarchy.csv", "child,parent\na,b\nb,c\nc,b\n", "hierarchy.csv: b -> c -> b is a cycle"),
        ("hierarchy: hierarchy.csv", "child,parent\na,a\n", "a -> a is a cycle"),
        ("hierarchy: {file: hierarchy.csv, implies: false}", "child,parent\na,b\nb,a\n", "a -> b -> a is a cycle"),
        ("hierarchy: hierarchy.csv\nimplies: {b: a}", "child,parent\na,b\n", "rules.yaml: a -> b -> a is a cycle"),
        ("hierarchy: hierarchy.csv\nexcludes: [[b, c]]", "child,parent\na,b\na,c\n", "a -> b, a -> c, and excludes[0]"),
        ("hierarchy: hierarchy.csv\nexclude: [c]", "child,parent\na,b\nb,c\n", "b -> c, and c is in exclude"),
        ("hierarchy: hierarchy.csv", "a,b\nc,d\n", "the header is a,b; expected columns child,parent"),
        ("hierarchy: hierarchy.csv", "", "the header is ; expected columns child,parent"),
        ("hierarchy: hierarchy.csv", "child,parent\na,b\nc\n", "line 3 is c; expected 2 cells"),
        ("hierarchy: hierarchy.csv", "child,parent\na,b,c\n", "line 2 is a,b,c; expected 2 cells"),
        ("hierarchy: hierarchy.csv", "child,parent\na, \n", "line 2 is a, ; expected 2 cells"),
        ("hierarchy: hierarchy.csv", 'child,parent\na,"b\n', "is not valid CSV"),
    ],
)
def test_wrong_hierarchies_are_refused(tmp_path, text, hierarchy, expected):
    with pytest.raises(ConfigError) as caught:
        read_rules(folder(tmp_path, text, hierarchy))
    assert expected in str(caught.value)


def test_files_that_are_missing_too_large_or_not_text(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"none\.yaml: no such file of rules"):
        read_rules(tmp_path / "none.yaml")
    path = folder(tmp_path, "hierarchy: hierarchy.csv")
    with pytest.raises(InputError, match=r"hierarchy\.csv: no such hierarchy file"):
        read_rules(path)
    (tmp_path / "hierarchy.csv").write_bytes(b"child,parent\n\xff,a\n")
    with pytest.raises(ConfigError, match="byte 13 is not UTF-8"):
        read_rules(path)
    monkeypatch.setattr(label_rules, "MAX_HIERARCHY_BYTES", 5)
    with pytest.raises(ConfigError, match=r"hierarchy\.csv: 17 bytes; a hierarchy file has at most 5"):
        read_rules(path)


def test_many_contradictions_come_in_one_message(tmp_path):
    text = "implies: {" + ", ".join(f"a{k}: b" for k in range(9)) + "}\nexclude: [b]"
    with pytest.raises(ConfigError, match=r"a0 -> b, .*a4 -> b.*; and 4 more"):
        read_rules(folder(tmp_path, text))


@ORDINARY
@given(cases())
def test_generated_rules_hold_no_contradiction(case):
    """What the laws above are tested on is what read_rules lets through (but for its refusals of at_least)."""
    document = case[0]
    edges = [[a, b] for a, implied in document["implies"].items() for b in implied]
    edges += document["hierarchy"] if document["hierarchy_implies"] else []
    assert not list(label_rules._contradictions(document, label_rules._Graph(edges, "rules.yaml")))


# --- a large thesaurus


def test_eurlex57k_hierarchy(data, tmp_path, capsys):
    corpus = data / "eurlex57k"
    table = pyarrow.parquet.read_table(corpus / "documents.parquet", columns=["labels", "split"])
    gold, split = (table[column].to_pylist() for column in ("labels", "split"))
    labels = sorted({label for row in gold for label in row})
    test = [row for row, part in zip(gold, split, strict=True) if part == "test"]
    place = {label: k for k, label in enumerate(labels)}
    text = f"hierarchy: {corpus / 'hierarchy.csv'}\nat_least: [{{n: 1, of: ['{labels[0]}', '{labels[1]}']}}]\n"
    started = time.perf_counter()
    document = read_rules(folder(tmp_path, text))
    read = time.perf_counter()
    document["excludes"] = [["1309", "3568"], ["161", "20"]]
    rules = compiled(document, labels)
    built = time.perf_counter()
    tagged = np.zeros((len(test), len(labels)), bool)
    for i, row in enumerate(test):
        tagged[i, [place[label] for label in row]] = True
    Z = np.random.default_rng(0).normal(size=tagged.shape)
    apply(rules, tagged[:2], Z[:2])  # compiles
    begun = time.perf_counter()
    out, counts = apply(rules, tagged, Z)
    done = time.perf_counter()
    for i in range(0, len(test), 200):
        near = {a for name in test[i] for a in above(document, name)}
        near |= {a for name in labels[:2] for a in above(document, name)}
        some = sorted(near & set(labels))
        z = {name: Z[i, place[name]] for name in some}
        assert names(labels, out[i]) == obvious(document, some, set(test[i]), z)
    indptr, closure = hierarchy_closure(document, labels)
    assert indptr.size - 1 > len(labels)
    csr = np.cumsum([0, *map(len, test)]), np.array([place[label] for row in test for label in sorted(row)])
    assert set(hierarchical_metrics(*hierarchical_sums(*csr, *csr, indptr, closure)).values()) == {1.0}
    with capsys.disabled():
        print(
            f"\neurlex57k: {len(labels):,} labels, {rules.up.size:,} implied pairs; read {read - started:.2f} s, "
            f"compiled {built - read:.2f} s, applied to {len(test):,} documents {done - begun:.3f} s, "
            f"implies added {counts['implies'][0].sum():,}"
        )
    assert done - begun < 2
