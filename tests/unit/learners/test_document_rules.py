import json

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from pipeline.config import CalibrateConfig
from pipeline.errors import DataError
from pipeline.kernels.documents import samples_f1
from pipeline.learners.document_rules import DocumentRule
from pipeline.learners.label_rules import compiled
from pipeline.learners.tagger import Decisions, tag_lists

NAMES = ["ant", "bee", "cow", "dog", "elk"]
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


def decisions(threshold=(0.0,) * 5, rules=None, **rule):
    compiled_rules = compiled({**EMPTY, **rules}, NAMES) if rules else None
    threshold = np.array(threshold, np.float64)
    return Decisions(threshold, np.ones(5), np.zeros(5), (), compiled_rules, DocumentRule(**rule))


def tags(S, chosen):
    """Label names of each document, from the array and from the lists, which must agree."""
    S = np.array(S, np.float32)
    found, _ = chosen.tagged(S, chosen.log_odds(S))
    named = [[NAMES[j] for j in np.flatnonzero(row)] for row in found]
    listed = [[tag["label"] for tag in row] for row in tag_lists(S, chosen, NAMES).to_pylist()]
    assert [sorted(row) for row in listed] == named
    return named


S = [[3, 1, 2, -1, -2], [-3, -1, -2, -1, -9], [1, 1, 1, 1, 1]]


def test_rcut_tags_the_k_most_probable_labels_that_have_a_model():
    assert tags(S, decisions(rule="rcut", k=2)) == [["ant", "cow"], ["bee", "dog"], ["ant", "bee"]]
    never = (np.inf, 9, 9, 9, 9)  # other thresholds play no part
    assert tags(S, decisions(never, rule="rcut", k=2)) == [["bee", "cow"], ["bee", "dog"], ["bee", "cow"]]
    assert tags(S, decisions(rule="rcut", k=9)) == [NAMES] * 3


def test_samples_f1_is_the_kernel_over_labels_that_have_a_model():
    Z = np.random.default_rng(0).normal(-1, 2, (50, 5))
    may = np.array([1, 1, 0, 1, 1], np.bool_)
    for undefined in (0, 1):
        chosen = decisions(np.where(may, 9, np.inf), rule="samples_f1", if_undefined=undefined)
        found, _ = chosen.tagged(Z.astype(np.float32), Z)
        assert_array_equal(found, samples_f1(Z, may, float(undefined)))


def test_thresholds_then_at_least_one_then_at_most_then_the_rules_between_labels():
    assert tags(S, decisions()) == [["ant", "bee", "cow"], [], NAMES]
    assert tags(S, decisions(at_least_one=True)) == [["ant", "bee", "cow"], ["bee"], NAMES]
    assert tags(S, decisions(at_least_one=True, min_gap=0.5)) == [["ant", "bee", "cow"], [], NAMES]
    assert tags(S, decisions(at_most=2)) == [["ant", "cow"], [], ["ant", "bee"]]
    both = {"at_least_one": True, "at_most": 1}
    assert tags(S, decisions(**both)) == [["ant"], ["bee"], ["ant"]]
    # what a rule brings is no longer counted, and what it takes is not filled up
    assert tags(S, decisions(rules={"implies": {"ant": ["dog"]}}, **both)) == [["ant", "dog"], ["bee"], ["ant", "dog"]]
    assert tags(S, decisions(rules={"exclude": ["ant"]}, **both)) == [[], ["bee"], []]
    assert tags(S, decisions(rule="rcut", k=4, at_most=1)) == [["ant"], ["bee"], ["ant"]]


@pytest.mark.parametrize(
    "rule",
    [{"rule": "rcut", "k": 2}, {"rule": "samples_f1"}, {"at_least_one": True, "min_gap": 0.1}, {"at_most": 2}],
    ids=lambda rule: next(iter(rule.values())),
)
def test_labels_that_are_one_have_one_place(rule):
    """bee is an old name of dog: the two count as one, whether the log-odds have been merged before or not."""
    chosen = decisions((0.0, 0.0, 0.0, np.inf, 0.0), rules={"synonyms": {"bee": "dog"}}, **rule)
    scores = np.random.default_rng(1).normal(-0.5, 2, (200, 5)).astype(np.float32)
    Z = chosen.log_odds(scores)
    merged = Z.copy()
    merged[:, 3], merged[:, 1] = Z[:, [1, 3]].max(axis=1), -np.inf
    found = chosen.tagged(scores, Z)[0]
    assert_array_equal(chosen.tagged(scores, merged)[0], found)
    assert not found[:, 1].any()
    assert found[:, 3].any()  # dog has no model of its own
    if rule.get("rule") == "rcut":
        assert_array_equal(found.sum(axis=1), np.full(200, 2))
    assert Z[0, 1] == scores[0, 1]  # the caller's arrays stay


def test_settings_that_a_rule_does_not_use_are_not_kept():
    def of(if_undefined=1, **settings):
        return DocumentRule.of(CalibrateConfig(**settings), if_undefined).model_dump(exclude_defaults=True)

    assert DocumentRule.of(CalibrateConfig(), 0).plain
    assert of(k=3, min_gap=1) == {}
    assert of(rule="budget", at_least_one=True, min_gap=1) == {"at_least_one": True, "min_gap": 1}
    assert of(rule="rcut", k=3) == {"rule": "rcut", "k": 3}
    assert of(rule="samples_f1", at_most=4) == {"rule": "samples_f1", "if_undefined": 1, "at_most": 4}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "Expecting value"),
        (b"\xff", "decode"),
        (b"[]", "DocumentRule"),
        (b'{"rule": "guess"}', "rule"),
        (b'{"k": 0}', "k "),
        (b'{"k": "3"}', "k "),
        (b'{"at_most": -1}', "at_most"),
        (b'{"min_gap": NaN}', "min_gap"),
        (b'{"kk": 3}', "kk"),
        (b"[" * 100_000, "recursion"),
    ],
    ids=["empty", "no text", "list", "rule", "zero", "text", "negative", "nan", "unknown", "deep"],
)
def test_a_damaged_file_is_refused_by_name(content, said):
    with pytest.raises(DataError, match=r"decision\.json") as error:
        DocumentRule.parsed(content, "run/decision.json")
    assert said in str(error.value)
    assert "tagmill calibrate" in str(error.value)


def test_what_is_written_is_what_is_read():
    rule = DocumentRule(rule="samples_f1", if_undefined=1, at_least_one=True, min_gap=0.25, at_most=7)
    assert DocumentRule.parsed(json.dumps(rule.model_dump()).encode(), "here") == rule


def test_conventions_say_the_rule_by_document():
    assert DocumentRule().conventions() == {}
    assert "the 3 labels" in DocumentRule(rule="rcut", k=3).conventions()["decision"]
    words = DocumentRule(rule="samples_f1", at_least_one=True, min_gap=0.5, at_most=4).conventions()["decision"]
    for part in ("expected F1", "0/0 as 0", "0.5 in log-odds", "at most 4 tags", "never tagged"):
        assert part in words
    assert "threshold" in DocumentRule(at_least_one=True).conventions()["decision"]
