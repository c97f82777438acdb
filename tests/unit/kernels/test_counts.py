import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.metrics import (
    accuracy_score,
    f1_score,
    hamming_loss,
    jaccard_score,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
)

from pipeline.kernels.counts import (
    confusion,
    label_metrics,
    macro,
    micro,
    precision_recall_f1,
    set_metrics,
    set_sums,
    weighted,
)
from pipeline.kernels.exact import add_sums
from tests.reference import gold_of

EXACT = {"rtol": 0, "atol": 1e-9}
ORDINARY = settings(deadline=None, max_examples=60)


@st.composite
def tagged_and_gold(draw, smallest_L=1):
    shape = draw(st.integers(1, 12)), draw(st.integers(smallest_L, 8))
    density = st.sampled_from([st.booleans(), st.just(False), st.just(True)])
    T, Y = (draw(arrays(bool, shape, elements=draw(density))) for _ in range(2))
    if draw(st.booleans()):
        Y[:, draw(st.integers(0, shape[1] - 1))] = False
    return T, Y


@given(tagged_and_gold(smallest_L=2), st.sampled_from([0.0, 1.0]))
@ORDINARY
def test_equals_sklearn(case, if_undefined):
    T, Y = case
    n, L = Y.shape
    tp, fp, fn = confusion(T, *gold_of(Y))
    matrix = multilabel_confusion_matrix(Y, T)
    assert_array_equal([tp, fp, fn], [matrix[:, 1, 1], matrix[:, 0, 1], matrix[:, 1, 0]])

    want = precision_recall_fscore_support(Y, T, zero_division=if_undefined)
    assert_allclose(precision_recall_f1(tp, fp, fn, if_undefined), want[:3], **EXACT)

    def sklearn_f1(average, labels=None):
        return f1_score(Y, T, average=average, labels=labels, zero_division=if_undefined)

    found = label_metrics(tp, fp, fn, if_undefined)
    want_micro = precision_recall_fscore_support(Y, T, average="micro", zero_division=if_undefined)
    assert_allclose([found["micro_precision"], found["micro_recall"], found["micro_f1"]], want_micro[:3], **EXACT)
    present = np.flatnonzero(Y.any(axis=0))
    assert_allclose(found["macro_f1"], sklearn_f1("macro", present) if present.size else if_undefined, **EXACT)
    assert_allclose(found["macro_f1_all"], sklearn_f1("macro"), **EXACT)
    # without any gold the weights are 0/0: scikit-learn then averages unweighted
    want_weighted = sklearn_f1("weighted") if present.size else if_undefined
    assert_allclose(found["weighted_f1"], want_weighted, **EXACT)

    found = set_metrics(set_sums(T, *gold_of(Y), if_undefined), n, L)
    assert_allclose(found["samples_f1"], sklearn_f1("samples"), **EXACT)
    assert_allclose(found["subset_accuracy"], accuracy_score(Y, T), **EXACT)
    assert_allclose(found["hamming_loss"], hamming_loss(Y, T), **EXACT)
    assert_allclose(
        found["jaccard_samples"], jaccard_score(Y, T, average="samples", zero_division=if_undefined), **EXACT
    )


@given(tagged_and_gold(), st.randoms(use_true_random=False))
@ORDINARY
def test_chunks_add_to_the_same_bits_in_any_order(case, random):
    T, Y = case

    def sums(rows):
        tp, fp, fn = confusion(T[rows], *gold_of(Y[rows]))
        return {**set_sums(T[rows], *gold_of(Y[rows])), "tp": tp, "fp": fp, "fn": fn}

    rows = list(range(len(Y)))
    whole = sums(rows)
    random.shuffle(rows)
    cut = random.randint(0, len(Y))
    parts = add_sums(sums(rows[:cut]), sums(rows[cut:]))
    for name in whole:
        assert_array_equal(parts[name], whole[name])


def test_label_without_gold_keeps_its_place():
    T = np.array([[1, 0, 0], [0, 0, 1]], np.uint8)
    Y = np.array([[1, 0, 0], [1, 0, 0]], bool)
    tp, fp, fn = confusion(T, *gold_of(Y))
    assert (tp.tolist(), fp.tolist(), fn.tolist()) == ([1, 0, 0], [0, 0, 1], [1, 0, 0])
    found = label_metrics(tp, fp, fn)
    assert found["macro_f1"] == pytest.approx(2 / 3)
    assert found["macro_f1_all"] == pytest.approx(2 / 9)


@pytest.mark.parametrize("huge", [2**31, 2**53 + 1])
def test_huge_counts_do_not_overflow(huge):
    # 1500 labels: their sum leaves int64 too, and not by a whole number of turns, which would leave the ratios right
    tp, fp, fn = (np.full(1500, count) for count in (huge, 3 * huge, huge))
    assert_allclose(precision_recall_f1(tp, fp, fn)[2], 1 / 3, rtol=1e-15)
    assert micro(tp, fp, fn) == (1 / 4, 1 / 2, 1 / 3)
    assert_allclose(list(label_metrics(tp, fp, fn).values()), [1 / 4, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 1 / 3], rtol=1e-12)


def test_counts_of_a_narrow_type_are_widened():
    counts = np.full(2, 2**31 - 1, np.int32)
    assert_allclose(precision_recall_f1(counts, counts, counts), 0.5)


def test_averages_of_nothing_are_the_argument():
    nothing = np.zeros(2, np.int64)
    assert macro([0.3, 0.4], over=[False, False], if_undefined=0.7) == 0.7
    assert weighted([0.3, 0.4], nothing, if_undefined=0.7) == 0.7
    assert micro(nothing, nothing, nothing, if_undefined=0.7) == (0.7, 0.7, 0.7)


@pytest.mark.parametrize(
    ("indptr", "labels", "message"),
    [
        ([0, 1], [0], "gold_indptr"),  # too short
        ([1, 1, 2], [0, 1], "gold_indptr"),  # a slice that was not rebased
        ([0, 2, 1], [0], "gold_indptr"),  # descends
        ([0, 1, 2], [0, 3], "gold_labels has ids 0..3"),
        ([0, 1, 2], [-1, 0], "gold_labels has ids -1..0"),
        ([0, 2, 2], [1, 1], "distinct"),
        ([0, 2, 2], [2, 1], "ascending"),
    ],
)
def test_gold_that_compiled_code_cannot_index_is_refused(indptr, labels, message):
    with pytest.raises(ValueError, match=message):
        confusion(np.zeros((2, 3), bool), indptr, labels)


def test_tagged_of_another_type_is_refused():
    with pytest.raises(ValueError, match="float64"):
        confusion(np.zeros((2, 3)), [0, 0, 0], [])
