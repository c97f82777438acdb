import itertools

import numpy as np
import pyarrow as pa
import pytest

from pipeline.learners import duplicates, vectorizer
from tests.unit.kernels.test_similar import corpus, edited, prose


def documents(texts, first=0):
    return pa.table({"row": pa.array(np.arange(first, first + len(texts))), "text": pa.array(texts, pa.string())})


def pairs(tests, training, similarity, cuts=1):
    """{test row: (training row, similarity)}; both sides in `cuts` parts."""
    split = [documents(tests).slice(*part) for part in _parts(len(tests), cuts)]
    found = [duplicates.shingle_sets(part, similarity) for part in split]
    texts = duplicates.comparable([sets for sets, _ in found], similarity)
    held = np.concatenate([h for _, h in found])
    near = [
        duplicates.nearest(documents(training, 10_000).slice(*part), texts.known, held, similarity)
        for part in _parts(len(training), cuts)
    ]
    rows, other, values = duplicates.merged(near, texts)
    assert (np.diff(rows) > 0).all()
    return dict(zip(rows.tolist(), zip(other.tolist(), values.tolist(), strict=True), strict=True))


def _parts(n, cuts):
    edges = np.linspace(0, n, cuts + 1).astype(int)
    return [(int(a), int(b - a)) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("template", [False, True])
def test_parts_and_batches_change_nothing(monkeypatch, template):
    tests, training = corpus(11)
    if template:
        rng = np.random.default_rng(0)
        form = prose(rng, 5000, 200)
        tests, training = ([" ".join(edited(rng, form, 2)) for _ in range(80)] for _ in range(2))
    whole = pairs(tests, training, 0.8)
    assert len(whole) > 20
    for cuts in (3, 30, 200):
        assert pairs(tests, training, 0.8, cuts) == whole
    monkeypatch.setattr(vectorizer, "BATCH_BYTES", 1000)
    assert pairs(tests, training, 0.8, 2) == whole


def test_case_and_punctuation_do_not_matter_and_short_texts_are_left_out():
    tests = ["", "An Example: of THIS", "one two", "no such text here", "an example of this"]
    training = ["one two", "", "an example, of this", "An example of this"]
    assert pairs(tests, training, 0.9) == {1: (10_002, 1.0), 4: (10_002, 1.0)}


@pytest.mark.parametrize(("tests", "training"), [([], []), ([], ["a b c"]), (["a b c"], []), (["", "a"], ["", "a"])])
def test_nothing_to_compare(tests, training):
    assert pairs(tests, training, 0.9) == {}
