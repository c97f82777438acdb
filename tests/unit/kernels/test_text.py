import math
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from pipeline.kernels.text import count_terms, smooth_idf, tfidf, tokenize, word_characters
from tests.reference import terms_of

ORDINARY = settings(deadline=None, max_examples=150)

PIECES = ["a", "ab", "b_", "_", "9", "é", "e\u0301", "中", "中文", "ß", "\U0001f600", "\U00020000", "٣", "İ", " ", "-"]
texts = st.lists(st.text(max_size=12) | st.lists(st.sampled_from(PIECES), max_size=12).map("".join), max_size=5)


def tokenized(documents, ngrams=1):
    """Terms of each document as text, and their hashes."""
    encoded = [d.encode() for d in documents]
    data = np.frombuffer(b"".join(encoded) or b"\0", np.uint8)
    offsets = np.cumsum([0, *map(len, encoded)]).astype(np.int64)
    indptr, hashes, starts, lengths = tokenize(data, offsets, word_characters(), ngrams)
    spans = [bytes(data[s : s + n]).decode() for s, n in zip(starts, lengths, strict=True)]
    return indptr, hashes, spans


def of_document(indptr, values, i):
    return list(values[indptr[i] : indptr[i + 1]])


def test_word_characters_are_those_of_regular_expressions():
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    table = word_characters()
    assert table.size == 0x110000
    assert {c for c in everything if table[ord(c)]} == set(re.findall(r"\w", everything))


@given(texts)
@ORDINARY
def test_tokens_are_those_of_the_default_pattern(documents):
    indptr, _, spans = tokenized(documents)
    for i, text in enumerate(documents):
        assert of_document(indptr, spans, i) == re.findall(r"(?u)\b\w\w+\b", text)


@given(texts, st.sampled_from([2, 3]))
@ORDINARY
def test_terms_are_runs_of_tokens(documents, ngrams):
    indptr, hashes, spans = tokenized(documents, ngrams)
    names = {}
    for i, text in enumerate(documents):
        want = terms_of(text, ngrams)
        for term, span, h in zip(want, of_document(indptr, spans, i), of_document(indptr, hashes, i), strict=True):
            assert terms_of(span, ngrams)[-1] == term
            assert names.setdefault(int(h), term) == term  # one hash, one term
    assert len(set(names.values())) == len(names)  # one term, one hash


def test_the_hash_of_a_run_knows_the_order_and_not_what_stands_between():
    _, hashes, _ = tokenized(["ab cd", "ab, … cd", "cd ab", "abcd", "ab ab cd"], 2)
    assert_array_equal(hashes[:3], hashes[3:6])
    (ab, cd, ab_cd), (cd2, ab2, cd_ab), (abcd,) = hashes[:3], hashes[6:9], hashes[9:10]
    assert (ab, cd) == (ab2, cd2)
    assert len({ab, cd, ab_cd, cd_ab, abcd}) == 5
    assert ab_cd == hashes[-1]


def test_runs_do_not_cross_documents():
    indptr, _, spans = tokenized(["ab", "cd ef"], 3)
    assert_array_equal(indptr, [0, 1, 4])
    assert spans == ["ab", "cd", "ef", "cd ef"]


@given(texts, st.sampled_from([1, 2, 3]))
@ORDINARY
def test_counts_are_those_of_a_counter(documents, ngrams):
    indptr, hashes, _ = tokenized(documents, ngrams)
    out_indptr, unique, counts, where = count_terms(indptr, hashes)
    assert_array_equal(hashes[where], unique)
    for i in range(len(documents)):
        inside = of_document(out_indptr, unique, i)
        assert inside == sorted(set(inside))
        assert dict(zip(inside, of_document(out_indptr, counts, i), strict=True)) == Counter(
            of_document(indptr, hashes, i)
        )
        assert all(indptr[i] <= k < indptr[i + 1] for k in of_document(out_indptr, where, i))


def test_hashes_of_many_terms_are_distinct():
    _, hashes, _ = tokenized([" ".join(f"w{k:x}" for k in range(200_000))])
    assert np.unique(hashes).size == 200_000


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        ("\u0301" * 100_000, 0),
        ("a\u0301" * 70_000, 0),
        ("\U0001f600" * 50_000, 0),
        ("a" * 5_000_000, 1),
        ("中" * 100_000, 1),
        ("ab " * 100_000, 100_000),
        ("a " * 100_000, 0),
        ("ab" + " " * 1_000_000 + "cd", 2),
        ("_" * 200_000, 1),
        ("", 0),
    ],
)
def test_hostile_texts_are_counted_right(document, tokens):
    for ngrams in (1, 3):
        indptr, _, _ = tokenized([document, "ab"], ngrams)
        assert_array_equal(indptr, [0, sum(max(tokens - k, 0) for k in range(ngrams)), indptr[1] + 1])


@pytest.mark.parametrize("sublinear", [False, True])
def test_tfidf_is_the_formula(sublinear):
    rng = np.random.default_rng(0)
    lengths = np.array([0, 5, 1, 12, 3])
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([rng.permutation(20)[:n] for n in lengths]).astype(np.int32)
    ids[[1, 7, 18, 19, 20]] = -1  # unknown terms; the last document has no other
    counts = rng.integers(1, 9, ids.size).astype(np.int32)
    idf = rng.uniform(1, 5, 20)
    out_indptr, indices, values = tfidf(indptr, ids, counts, idf, sublinear)
    assert (indices.dtype, values.dtype) == (np.int32, np.float32)
    for i in range(5):
        weight = {
            ids[k]: (1 + math.log(counts[k]) if sublinear else counts[k]) * idf[ids[k]]
            for k in range(indptr[i], indptr[i + 1])
            if ids[k] >= 0
        }
        norm = math.sqrt(sum(w * w for w in weight.values()))
        assert of_document(out_indptr, indices, i) == sorted(weight)
        assert_allclose(of_document(out_indptr, values, i), [weight[f] / norm for f in sorted(weight)], rtol=1e-6)


def test_smooth_idf_never_reaches_0():
    found = smooth_idf(np.array([1, 3, 7]), 7)
    assert_allclose(found, [math.log(8 / 2) + 1, math.log(8 / 4) + 1, 1.0])
