import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.feature_extraction.text import TfidfVectorizer

from pipeline.config import FeaturizeConfig
from pipeline.learners import vectorizer
from pipeline.learners.vectorizer import Vocabulary, batches, count_documents, one_array, tokens_of, vectorize
from pipeline.stages.featurize import choose_terms
from tests.reference import terms_of

ORDINARY = settings(deadline=None, max_examples=100)

CORPUS = [
    "The tax on imported wine is raised; the tax on beer is not.",
    "Wine growers protest: the wine tax, the WINE tax, the wine tax!",
    "Beer, beer and more beer. Imported beer is cheap_beer.",
    "Der Straßenbau in Österreich kostet 2024 mehr als 2023, der Bau stockt.",
    "Straßenbau: der Bau in Österreich stockt … 2024",
    "東京 の ワイン 税, 東京 の ビール 税",
    "",
    "a b c",
    "protest protest protest protest",
    "Imported wine tax",
]


def fitted(texts, cfg):
    """The vocabulary of some texts, counted document by document and merged."""
    counted = pa.concat_tables([count_documents(pa.array([t], pa.string()), cfg.ngrams) for t in texts])
    counted = counted.group_by("hash").aggregate([("df", "sum"), ("term", "min")])
    counted = counted.select(["hash", "df_sum", "term_min"]).rename_columns(["hash", "df", "term"])
    counted = counted.filter(pc.greater_equal(counted["df"], cfg.min_df))
    return choose_terms(counted, len(texts), cfg)


def matrix_of(rows, features):
    indptr, indices, values = rows
    return sp.csr_array((values, indices, indptr), (indptr.size - 1, features))


@pytest.mark.parametrize("sublinear", [True, False])
@pytest.mark.parametrize("ngrams", [1, 2, 3])
@pytest.mark.parametrize("min_df", [1, 2, 3])
def test_equals_sklearn(ngrams, min_df, sublinear):
    sklearn = TfidfVectorizer(
        ngram_range=(1, ngrams), min_df=min_df, sublinear_tf=sublinear, dtype=np.float32, norm="l2"
    )
    want = sklearn.fit_transform(CORPUS)
    cfg = FeaturizeConfig(ngrams=ngrams, min_df=min_df, sublinear=sublinear)
    table = fitted(CORPUS, cfg)
    terms = table["term"].to_pylist()
    assert set(terms) == set(sklearn.vocabulary_)
    found = matrix_of(
        vectorize(pa.array(CORPUS), Vocabulary.from_table(table), ngrams, sublinear), table.num_rows
    ).toarray()
    assert_allclose(found, want.toarray()[:, [sklearn.vocabulary_[t] for t in terms]], rtol=0, atol=1e-6)
    assert_allclose(table["idf"].to_numpy(), sklearn.idf_[[sklearn.vocabulary_[t] for t in terms]], rtol=1e-6)


def test_features_go_by_falling_document_frequency_then_by_term():
    table = fitted(CORPUS, FeaturizeConfig(min_df=1))
    pairs = list(zip((-table["df"].to_numpy()).tolist(), table["term"].to_pylist(), strict=True))
    assert pairs == sorted(pairs)
    assert_array_equal(table["feature_id"].to_numpy(), np.arange(table.num_rows))


def test_the_most_frequent_terms_are_kept():
    everything = fitted(CORPUS, FeaturizeConfig(min_df=1))
    assert fitted(CORPUS, FeaturizeConfig(min_df=1, max_features=4)).equals(everything.slice(0, 4))
    rarer = fitted(CORPUS, FeaturizeConfig(min_df=1, max_df=0.3))
    assert rarer["term"].to_pylist() == everything.filter(pc.less_equal(everything["df"], 3))["term"].to_pylist()


UPPER = ["İ", "I", "ı", "Σ", "ΑΣ", "Ǆ", "ẞ", "K", "Ⅷ", "A", "b", "_", "4", " ", "\u0301", "\U0001f600", "中"]
texts = st.lists(
    st.none() | st.text(max_size=15) | st.lists(st.sampled_from(UPPER), max_size=15).map("".join), max_size=6
)


@given(texts, st.sampled_from([1, 2, 3]), st.integers(0, 3))
@ORDINARY
def test_terms_and_document_frequencies_are_those_of_the_lowered_text(documents, ngrams, offset):
    column = pa.array(documents, pa.string()).slice(offset)
    lowered = [t or "" for t in pc.utf8_lower(column).to_pylist()]
    of_each = [terms_of(text, ngrams) for text in lowered]
    _, (indptr, *_) = tokens_of(column, ngrams)
    assert_array_equal(np.diff(indptr), [len(terms) for terms in of_each])
    counted = count_documents(column, ngrams)
    want = {term: sum(term in terms for terms in of_each) for terms in of_each for term in terms}
    assert dict(zip(counted["term"].to_pylist(), counted["df"].to_pylist(), strict=True)) == want
    assert counted["hash"].to_numpy().size == len(want)


@pytest.mark.parametrize("offset", [0, 1, 3, len(CORPUS)])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_slice_gives_what_its_copy_gives(offset, kind):
    whole = pa.array(["ballast ballast", *CORPUS, "ballast"], kind)
    piece = whole.slice(1 + offset, len(CORPUS) - offset)
    copy = pa.array(CORPUS[offset:], kind)
    known = Vocabulary.from_table(fitted(CORPUS, FeaturizeConfig()))
    for a, b in zip(vectorize(piece, known, 2, True), vectorize(copy, known, 2, True), strict=True):
        assert_array_equal(a, b)
    assert count_documents(piece, 2).equals(count_documents(copy, 2))


def test_no_documents_have_no_terms():
    assert count_documents(pa.array([], pa.string()), 2).num_rows == 0
    known = Vocabulary.from_table(fitted(CORPUS, FeaturizeConfig()))
    indptr, indices, values = vectorize(pa.array([], pa.string()), known, 1, True)
    assert (indptr.tolist(), indices.size, values.size) == ([0], 0, 0)


def test_unknown_hashes_have_no_feature():
    known = Vocabulary.from_table(fitted(CORPUS, FeaturizeConfig()))
    missing = np.array([0, 1, 2**64 - 1], np.uint64)
    assert_array_equal(known.lookup(missing), -1)
    assert_array_equal(known.lookup(known.hashes), known.ids)
    empty = Vocabulary(np.empty(0, np.uint64), np.empty(0, np.int32), np.empty(0))
    assert_array_equal(empty.lookup(missing), -1)


def test_the_order_of_the_vocabulary_rows_does_not_matter():
    table = fitted(CORPUS, FeaturizeConfig(min_df=1))
    shuffled = table.take(np.random.default_rng(0).permutation(table.num_rows))
    for a, b in zip(Vocabulary.from_table(table), Vocabulary.from_table(shuffled), strict=True):
        assert_array_equal(a, b)


@given(
    st.lists(st.lists(st.sampled_from(["", "x", "x" * 30, "é" * 70, "x" * 400]), max_size=8), max_size=4),
    st.sampled_from([1, 50, 100, 10_000]),
)
@ORDINARY
def test_batches_hold_every_row_once_and_bound_the_bytes(chunks, size):
    column = pa.chunked_array([pa.array(c, pa.string()) for c in chunks], pa.string())
    table = pa.table({"row": pa.array(range(len(column)), pa.int64()), "text": column})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectorizer, "BATCH_BYTES", size)
        found = list(batches(table))
    assert [row for batch in found for row in batch["row"].to_pylist()] == list(range(len(column)))
    assert [t for batch in found for t in batch["text"].to_pylist()] == column.to_pylist()
    for batch in found:
        assert batch.num_rows
        assert batch["text"].num_chunks == 1
        lengths = [len(t.encode()) for t in batch["text"].to_pylist()]
        assert sum(lengths[:-1]) < size or sum(lengths) == 0  # only the last text may cross the bound


def test_few_batches_are_made():
    table = pa.table({"text": ["x" * 10] * 1000})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectorizer, "BATCH_BYTES", 1000)
        assert [batch.num_rows for batch in batches(table)] == [100] * 10


def test_one_array_of_an_empty_column_is_empty():
    assert one_array(pa.chunked_array([], pa.string())).equals(pa.array([], pa.string()))
