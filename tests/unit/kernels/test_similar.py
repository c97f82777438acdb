import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from pipeline.kernels import similar
from pipeline.kernels.text import word_characters

ORDINARY = settings(deadline=None, max_examples=150)


def shingles_of(text):
    """The slow way: all runs of three words, with repetitions."""
    words = re.findall(r"\w+", text)
    return [tuple(words[i : i + similar.WORDS]) for i in range(len(words) - similar.WORDS + 1)]


def jaccard_of(one, other):
    a, b = set(shingles_of(one)), set(shingles_of(other))
    return len(a & b) / len(a | b) if a | b else 0.0


def hashed(texts):
    encoded = [t.encode() for t in texts]
    data = np.frombuffer(b"".join(encoded) or b"\0", np.uint8)
    offsets = np.cumsum([0, *map(len, encoded)]).astype(np.int64)
    return similar.shingles(data, offsets, word_characters())


def keys_of(texts, similarity):
    indptr, hashes = hashed(texts)
    signature, identity = similar.signatures(indptr, hashes, similar.seeds())
    return indptr, hashes, identity, similar.band_keys(signature, *similar.bands(similarity))


def compare(known, others, similarity, rows=None):
    """{place of a known text: (most similar of the others, similarity)} by the kernels."""
    indptr, hashes, identity, keys = keys_of(known, similarity)
    sets_indptr, held = similar.sets(indptr, hashes)
    found, place = similar.index(identity, keys, sets_indptr[:-1], np.diff(sets_indptr))
    best, best_row = np.zeros(found.identity.size), np.full(found.identity.size, -1, np.int64)
    indptr, hashes, identity, keys = keys_of(others, similarity)
    rows = np.arange(len(others)) if rows is None else np.asarray(rows)
    similar.nearest(found, held, indptr, hashes, identity, keys, rows, similarity, best, best_row)
    return {i: (int(best_row[g]), float(best[g])) for i, g in enumerate(place) if best_row[g] >= 0}


def compare_slowly(known, others, similarity):
    """All pairs; of equally similar ones the first."""
    found = {}
    for i, one in enumerate(known):
        values = [jaccard_of(one, other) for other in others]
        best = max(range(len(others)), key=lambda k: (values[k], -k), default=None)
        if best is not None and values[best] >= similarity and shingles_of(one):
            found[i] = (best, values[best])
    return found


def prose(rng, words, size=40):
    return [f"w{k}" for k in rng.integers(0, words, size)]


def edited(rng, text, changes):
    text = list(text)
    for at in rng.choice(len(text), changes, replace=False):
        text[at] = f"new{rng.integers(1000)}"
    return text


def corpus(seed, n=60):
    """Texts, and others of which each is one of them with 0 to 4 words changed, or is new."""
    rng = np.random.default_rng(seed)
    known = [prose(rng, 5000, rng.integers(30, 200)) for _ in range(n)]
    others = [edited(rng, known[k % n], k % 5) if k % 6 else prose(rng, 5000) for k in range(3 * n)]
    return [" ".join(t) for t in known], [" ".join(t) for t in others]


PIECES = ["a", "b", "é", "中", "_", "7", " ", "  ", "-", "\n", ", "]


@given(st.lists(st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(max_size=30), max_size=4))
@ORDINARY
def test_shingles_are_runs_of_three_words(texts):
    indptr, hashes = hashed(texts)
    seen = {}
    for i, text in enumerate(texts):
        expected = shingles_of(text)
        assert indptr[i + 1] - indptr[i] == len(expected)
        for shingle, h in zip(expected, hashes[indptr[i] : indptr[i + 1]].tolist(), strict=True):
            assert seen.setdefault(shingle, h) == h
    assert len(set(seen.values())) == len(seen)


@given(st.lists(st.lists(st.sampled_from("abc "), max_size=60).map("".join), min_size=2, max_size=4))
@ORDINARY
def test_jaccard_is_that_of_sets_of_shingles(texts):
    indptr, held = similar.sets(*hashed(texts))
    sets = [held[indptr[i] : indptr[i + 1]] for i in range(len(texts))]
    for i, j in itertools.product(range(len(texts)), repeat=2):
        assert similar.jaccard(sets[i], sets[j]) == jaccard_of(texts[i], texts[j])


def test_signatures_agree_as_often_as_texts_are_similar():
    rng = np.random.default_rng(0)
    agree, wanted = [], []
    for changes in (0, 1, 3, 8, 15, 40):
        for _ in range(40):
            text = prose(rng, 5000, 120)
            pair = [" ".join(text), " ".join(edited(rng, text, changes))]
            signature, _ = similar.signatures(*hashed(pair), similar.seeds())
            agree.append(np.mean(signature[0] == signature[1]))
            wanted.append(jaccard_of(*pair))
    agree, wanted = np.reshape(agree, (-1, 40)), np.reshape(wanted, (-1, 40))
    # forty signatures of 64 hashes: a standard deviation of at most 0.01
    assert_allclose(agree.mean(axis=1), wanted.mean(axis=1), atol=0.04)
    spread = (agree - wanted).std(axis=1)
    assert (spread < 1.5 * np.sqrt(np.maximum(wanted * (1 - wanted), 1e-9) / similar.HASHES).mean(axis=1) + 1e-6).all()


@pytest.mark.parametrize("similarity", [0.05, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_bands_propose_what_is_wanted_and_are_the_most_selective_that_do(similarity):
    def certainty(size):
        return 1 - (1 - similarity**size) ** (similar.HASHES // size)

    count, size = similar.bands(similarity)
    assert count * size <= similar.HASHES
    assert certainty(size) >= similar.CERTAINTY
    assert all(certainty(r) < similar.CERTAINTY for r in range(size + 1, similar.HASHES + 1))


@pytest.mark.parametrize("similarity", [0.6, 0.9, 1.0])
def test_nearly_all_pairs_that_are_similar_enough_are_found_and_no_other(similarity):
    found, wanted = {}, {}
    for seed in range(4):
        pair = corpus(seed)
        found |= {(seed, i): v for i, v in compare(*pair, similarity).items()}
        wanted |= {(seed, i): v for i, v in compare_slowly(*pair, similarity).items()}
    assert len(wanted) >= 40
    assert set(found) <= set(wanted)
    assert len(found) >= 0.95 * len(wanted)
    assert np.mean([found[k] == wanted[k] for k in found]) >= 0.95
    for k, (row, value) in found.items():  # exact, also where a still more similar one was missed
        known, others = corpus(k[0])
        assert value == jaccard_of(known[k[1]], others[row])


def test_equal_texts_are_always_found_and_give_the_smallest_row():
    rng = np.random.default_rng(3)
    known = [" ".join(prose(rng, 50, size)) for size in (3, 4, 10, 200)]
    others = [text + " " for text in known for _ in range(3)]
    rows = np.arange(12)[::-1]
    found = compare(known, others, 0.9, rows)
    assert found == {i: (int(rows[3 * i : 3 * i + 3].min()), 1.0) for i in range(4)}


def test_different_texts_and_short_ones_are_like_nothing():
    rng = np.random.default_rng(4)
    known = [" ".join(prose(rng, 5000, 50)) for _ in range(50)] + ["", "two words", "--"]
    others = [" ".join(prose(rng, 5000, 50)) for _ in range(50)] + ["", "two words", "--"]
    assert compare(known, others, 0.3) == {}


def test_a_changed_digit_is_a_changed_word():
    assert compare(["shr 5 cts vs 3 cts"], ["shr 6 cts vs 4 cts"], 0.5) == {}


def test_a_template_in_many_texts_costs_no_square_and_equal_ones_are_found_still():
    rng = np.random.default_rng(5)
    form = prose(rng, 5000, 300)
    texts = [" ".join(edited(rng, form, 2)) for _ in range(600)]
    others = [" ".join(edited(rng, form, 2)) for _ in range(600)]
    tried = []
    jaccard = similar.jaccard.py_func

    def counting(one, other):
        tried.append(1)
        return jaccard(one, other)

    slow = similar.nearest.py_func
    found = compare(texts, [*others, *texts[:200]], 0.9)
    assert all(found[i] == (600 + i, 1.0) for i in range(200))
    assert len(found) > 550  # of each there are some five hundred chances
    # the same in plain Python, where comparisons can be counted
    original = slow.__globals__["jaccard"]
    slow.__globals__["jaccard"] = counting
    try:
        indptr, hashes, identity, keys = keys_of(texts, 0.9)
        sets_indptr, held = similar.sets(indptr, hashes)
        known, _ = similar.index(identity, keys, sets_indptr[:-1], np.diff(sets_indptr))
        best, best_row = np.zeros(known.identity.size), np.full(known.identity.size, -1, np.int64)
        indptr, hashes, identity, keys = keys_of(others[:20], 0.9)
        with np.errstate(over="ignore"):
            slow(known, held, indptr, hashes, identity, keys, np.arange(20), 0.9, best, best_row)
    finally:
        slow.__globals__["jaccard"] = original
    assert 20 < len(tried) <= 20 * similar.TRIED * (similar.bands(0.9)[0] + 1)


@pytest.mark.parametrize("template", [False, True])
def test_what_is_found_does_not_depend_on_who_is_compared_together(template):
    known, others = corpus(9)
    if template:  # more in a bucket than are tried
        rng = np.random.default_rng(9)
        form = prose(rng, 5000, 200)
        known = [" ".join(edited(rng, form, 2)) for _ in range(120)]
        others = [" ".join(edited(rng, form, 2)) for _ in range(120)]
    whole = compare(known, others, 0.8)
    for parts in (2, 7):
        merged = {}
        for part in range(parts):
            rows = np.arange(part, len(others), parts)[::-1]
            for i, (row, value) in compare(known, [others[r] for r in rows], 0.8, rows).items():
                merged[i] = min((row, value), merged.get(i, (row, value)), key=lambda m: (-m[1], m[0]))
        assert merged == whole


def test_equal_known_texts_share_one_place():
    texts = ["a b c d", "x y z", "a b c d", "a  b, c d"]
    indptr, hashes, identity, keys = keys_of(texts, 0.9)
    sets_indptr, _ = similar.sets(indptr, hashes)
    found, place = similar.index(identity, keys, sets_indptr[:-1], np.diff(sets_indptr))
    assert place[0] == place[2] == place[3] != place[1]
    assert_array_equal(np.sort(found.size), [1, 2])
