import itertools
import pickle

import numpy as np
import pyarrow as pa
import pytest

from pipeline.kernels import similar
from pipeline.learners import duplicates, vectorizer
from pipeline.tables import TABLES
from tests.unit.kernels.test_similar import corpus, edited, prose


def documents(texts, first=0):
    rows = np.arange(first, first + len(texts))
    return pa.table(
        {
            "row": pa.array(rows),
            "doc_id": pa.array([f"d{row}" for row in rows], pa.string()),
            "text": pa.array(texts, pa.string()),
        }
    )


def pairs(tests, training, similarity, cuts=1):
    """{test row: (training row, similarity)}; both sides in `cuts` parts."""
    split = [documents(tests).slice(*part) for part in _parts(len(tests), cuts)]
    found = [duplicates.shingle_sets(part, similarity) for part in split]
    texts = duplicates.comparable([sets for sets, _ in found], similarity)
    held = np.concatenate([h for _, h in found])
    best = {}
    for part in _parts(len(training), cuts):
        for near in duplicates.nearest(
            documents(training, 10_000).slice(*part), texts.known, held, similarity
        ).to_pylist():
            before = best.setdefault(near["place"], near)
            if (-near["similarity"], near["row"]) < (-before["similarity"], before["row"]):
                best[near["place"]] = near
    table = duplicates.near_duplicates(pa.Table.from_pylist(list(best.values())[::-1], duplicates.FOUND), texts)
    assert table.schema == TABLES["near_duplicates"].schema
    found = table.to_pylist()
    assert (np.diff([r["row"] for r in found]) > 0).all()
    assert all((r["doc_id"], r["other_doc_id"]) == (f"d{r['row']}", f"d{r['other_row']}") for r in found)
    return {r["row"]: (r["other_row"], r["similarity"]) for r in found}


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


def test_what_is_warmed_up_is_all_that_is_compiled(tmp_path):
    duplicates.warm_up.cache_clear()
    duplicates.warm_up(tmp_path)
    kernels = (similar.shingles, similar.signatures, similar.band_keys, similar.sets, similar.nearest)
    before = [len(kernel.signatures) for kernel in kernels]
    assert min(before) > 0
    tests, training = corpus(1)
    sets, held = duplicates.shingle_sets(documents(tests), 0.9)
    held.tofile(tmp_path / "held")
    mapped = np.asarray(np.memmap(tmp_path / "held", np.uint64, "r"))
    known = pickle.loads(pickle.dumps(duplicates.comparable([sets], 0.9).known))  # as Spark sends it
    assert duplicates.nearest(documents(training), known, mapped, 0.9).num_rows
    assert [len(kernel.signatures) for kernel in kernels] == before
