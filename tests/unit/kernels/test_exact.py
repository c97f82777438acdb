from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.kernels.exact import LARGEST, SCALE, add_sums, exact_sum, from_fixed, mean_of, to_fixed


@given(st.floats(-LARGEST, LARGEST))
def test_a_value_moves_by_at_most_half_a_unit(x):
    assert abs(Fraction(int(to_fixed(x)), SCALE) - Fraction(x)) <= Fraction(1, 2 * SCALE) < Fraction(1, 10**12)


def test_integers_are_exact():
    x = np.array([0.0, 1.0, -3.0, 100_000.0, LARGEST])
    assert [from_fixed(value) for value in to_fixed(x)] == x.tolist()


@pytest.mark.parametrize("x", [np.nan, np.inf, 2 * LARGEST])
def test_what_does_not_fit_is_refused(x):
    with pytest.raises(ValueError, match="to_fixed"):
        to_fixed([0.0, x])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_a_sum_beyond_int64_is_exact(values):
    assert exact_sum(np.array(values, dtype=np.int64)) == sum(values)


def test_sums_keep_the_other_axes():
    total = exact_sum(np.full((4, 2), 2**62))
    assert total.tolist() == [2**64, 2**64]


def test_order_and_grouping_do_not_matter():
    rng = np.random.default_rng(3)
    values = rng.lognormal(size=1000)
    whole = exact_sum(to_fixed(values))
    for _ in range(5):
        parts = np.split(rng.permutation(values), np.sort(rng.integers(0, 1000, 7)))
        assert sum(exact_sum(to_fixed(part)) for part in parts) == whole


def test_mean_is_rounded_once_and_0_over_0_is_the_argument():
    assert mean_of(SCALE, 3) == 1 / 3
    assert mean_of(0, 0) == 0.0
    assert mean_of(0, 0, if_undefined=1.0) == 1.0


def test_adding_refuses_sums_of_different_things():
    assert add_sums({"a": 2**70, "b": np.array([1, 2])}, {"a": 1, "b": np.array([3, 4])})["a"] == 2**70 + 1
    with pytest.raises(ValueError, match="'b'"):
        add_sums({"a": 1, "b": 2}, {"a": 1})
